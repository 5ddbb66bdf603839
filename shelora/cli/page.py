"""What `shelora dashboard` needs to know before it can serve."""

import re
import time
from collections.abc import Sequence
from typing import Final

from shelora.cli.cluster import LocalCluster
from shelora.configuration import invalid
from shelora.transport.address import HostPort

_ADDRESS: Final = re.compile(r"^(http://127\.0\.0\.1:\S+token=\S+)$", re.MULTILINE)
_POLL_S: Final = 0.1


def metrics_addresses(given: Sequence[str]) -> dict[str, str]:
    """Addresses by name from `NAME=HOST:PORT` each. Raises: CONFIGURATION_INVALID."""
    found = {}
    for text in given:
        name, _, address = text.partition("=")
        if not name or not address:
            raise invalid(f"--metrics {text}: write NAME=HOST:PORT, as in coordinator=10.0.0.5:9100")
        found[name] = str(HostPort.parse(address))
    return found


def open_beside(cluster: LocalCluster) -> str:
    """Serves the page of a local cluster until the cluster stops. Returns its address.

    Raises: INTERNAL with the end of its log if it does not start.
    """
    at = cluster.addresses
    metrics = [f"--metrics={name}={address}" for name, address in at.metrics.items()]
    environment = {
        "SHELORA_COORDINATOR": at.coordinator,
        "SHELORA_KEY_AUTHORITY": at.key_authority,
        "SHELORA_IDENTITY": at.operator_identity,
    }
    arguments = ["dashboard", f"--enrolment={at.enrolment}", *metrics]
    page = cluster.spawn("dashboard", "shelora.cli.main", arguments, environment)
    while not (found := _ADDRESS.search(page.log.read_text(errors="replace"))):
        page.require_alive()
        time.sleep(_POLL_S)
    return found[1]


def require_dashboard() -> None:
    """Raises: CONFIGURATION_INVALID if a package of the extra `dashboard` is missing."""
    for package in ("jinja2", "starlette", "uvicorn"):
        try:
            __import__(package)
        except ImportError:
            raise invalid(f"the page needs the package {package}: pip install 'shelora[dashboard]'") from None
