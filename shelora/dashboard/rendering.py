"""Templates: everything that is shown is escaped by them, except the charts, which escape what they hold themselves."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from shelora.dashboard.memory import PresenceHistory
from shelora.dashboard.model import federation_page
from shelora.v1 import coordinator_pb2 as pb
from shelora.version import VERSION
from shelora.view import size, when

STATIC: Final = Path(__file__).parent / "static"

_QUOTED: Final = re.compile("`([^`]*)`")


def _quoted(text: str) -> Markup:
    """Names in backquotes as code."""
    return Markup(_QUOTED.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


environment: Final = Environment(
    loader=PackageLoader("shelora.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters["size"] = size
environment.filters["when"] = when
environment.filters["quoted"] = _quoted


def rendered(template: str, **values: Any) -> str:  # noqa: ANN401 - a template's own
    """A template with these values."""
    return environment.get_template(template).render(**values)


def report(federation: pb.Federation) -> str:
    """One HTML file about a federation that needs nothing else: no script, no address, its style inside.

    Members are named with what they did; the figures are those of the page.
    """
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return rendered(
        "report.html",
        page=federation_page(federation, PresenceHistory(), 0.0),
        settings=MessageToDict(federation.spec, preserving_proto_field_name=True),
        at=when(federation.now_unix_ms),
        version=VERSION,
        style=style,
        digest=digest,
    )
