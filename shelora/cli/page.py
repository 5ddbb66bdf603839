"""What `shelora dashboard` needs to know before it can serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shelora.configuration import invalid
from shelora.transport.address import HostPort


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Whom the page talks to, and as whom."""

    coordinator: str
    identity: Path
    """Folder of the operator's key and certificate."""
    key_authority: str | None
    """None: no tokens, no revocation, and nobody renews the certificate."""
    enrolment: str = ""
    """Where devices exchange tokens, for the command line that is shown; "" if it is not known."""
    metrics: Mapping[str, str]
    """Prometheus address by server."""


def metrics_addresses(given: Sequence[str]) -> dict[str, str]:
    """Addresses by name from `NAME=HOST:PORT` each. Raises: CONFIGURATION_INVALID."""
    found = {}
    for text in given:
        name, _, address = text.partition("=")
        if not name or not address:
            raise invalid(f"--metrics {text}: write NAME=HOST:PORT, as in coordinator=10.0.0.5:9100")
        found[name] = str(HostPort.parse(address))
    return found


def require_dashboard() -> None:
    """Raises: CONFIGURATION_INVALID if a package of the extra `dashboard` is missing."""
    for package in ("jinja2", "starlette", "uvicorn"):
        try:
            __import__(package)
        except ImportError:
            raise invalid(f"the page needs the package {package}: pip install 'shelora[dashboard]'") from None
