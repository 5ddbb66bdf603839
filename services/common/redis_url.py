"""The address of Redis as operators write it. No error shows it, as it may hold a password."""

from typing import Final
from urllib.parse import SplitResult, urlsplit

from shelora.errors import DomainError, Reason

_ILLEGIBLE: Final = (
    "cannot be read: write redis://host:6379/0; the port is 1 to 65535, and odd characters of user and password are "
    "written as %XX"
)


def parts_of(url: str) -> SplitResult:
    """The parts of an address that names one server. Raises: CONFIGURATION_INVALID with the remedy."""
    scheme, separator, _ = url.strip().partition("://")
    if not (separator and scheme.replace("+", "").isalnum()):
        raise unusable("has no scheme: write redis://host:6379/0, or rediss:// for TLS")
    if "sentinel" in scheme or "cluster" in scheme:
        raise unusable(
            f"{scheme}:// is not supported: give the address of one Redis or Valkey server, redis://host:6379/0"
        )
    if scheme not in {"redis", "rediss", "unix"}:
        raise unusable(f"{scheme}:// is not supported: write redis://, rediss:// (TLS) or unix://")
    parts = _split(url.strip())
    if scheme == "unix":
        if not parts.path:
            raise unusable("names no socket: write unix:///run/redis.sock")
        return parts
    _require_one_server(parts)
    database = parts.path.strip("/")
    if database and not (database.isascii() and database.isdecimal()):
        raise unusable("names no database: write its number after the host, redis://host:6379/0")
    return parts


def unusable(what: str) -> DomainError:
    """CONFIGURATION_INVALID. Args: what: is wrong, as what follows the setting's name."""
    return DomainError(Reason.CONFIGURATION_INVALID, f"redis_url {what}")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # its words may show all of it
        raise unusable(_ILLEGIBLE) from None


def _require_one_server(parts: SplitResult) -> None:
    if "," in parts.netloc.rpartition("@")[2]:
        raise unusable("names several servers: give the address of one Redis or Valkey server")
    if not parts.hostname:
        raise unusable("names no host: write redis://host:6379/0")
    try:
        port = parts.port
    except ValueError:
        raise unusable(_ILLEGIBLE) from None
    if port == 0:
        raise unusable("has the port 0: write that of Redis, 6379 as a rule")
