"""How processes end: one rule for servers, agents and the operator's commands.

0: done. 1: something broke or did not answer; it may work later, so a supervisor should try again. 2: refused, for what
was given or for who asks, again and again until somebody changes something.
"""

from typing import Final

from shelora.errors import DomainError, Reason

EXIT_FAILED: Final = 1
"""Something broke or is away; what was said, or the log, says what."""
EXIT_REFUSED: Final = 2
"""Refused; standard error says why, and what to change."""

_REFUSED: Final = frozenset(
    {
        Reason.CONFIGURATION_INVALID,
        Reason.INVALID_ARGUMENT,
        Reason.PACKAGE_UNUSABLE,
        Reason.DATA_INVALID,
        Reason.MODEL_INVALID,
        Reason.MODEL_MISMATCH,
        Reason.VERSION_REFUSED,
        Reason.PROTECTION_REFUSED,
        Reason.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CERTIFICATE_REVOKED,
        Reason.SERVER_UNTRUSTED,
        Reason.TOKEN_REFUSED,
        Reason.CLIENT_EXISTS,
        Reason.CLIENT_REPLACED,
        Reason.CLIENT_UNKNOWN,
        Reason.FEDERATION_CLOSED,
        Reason.FEDERATION_EXISTS,
        Reason.FEDERATION_UNKNOWN,
    }
)


def exit_code(error: DomainError) -> int:
    """The exit code of a process that ends with this error."""
    return EXIT_REFUSED if error.reason in _REFUSED else EXIT_FAILED
