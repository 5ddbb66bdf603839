"""`shelora revoke`: whose certificates, and what it means for everyone who is still trusted."""

from typing import Final

from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import REVOCABLE_ROLES

_OPERATORS: Final = """\
All operators are cut off, including you, and all unused tokens are void. Rounds continue.
To come back, start the key authority again with --operator-token-file FILE, then on its machine

  shelora enroll --token-file FILE --authority HOST:7099 --identity FOLDER

Then look at what a stolen certificate was used for: token_created and certificate_issued in the key authority's log."""

_SERVERS: Final = """\
All {role} servers are cut off, and their tokens are void. Rounds wait until servers have new certificates:
- Servers with a workload key get one by themselves, within seconds. Anyone who stole that key gets one, too: give the
  key authority and the servers another key (openssl rand -hex 32) and start them again BEFORE you revoke.
- Other servers need you, while they run: shelora token create --role {role} --name NAME, and on its machine
  shelora enroll --token TOKEN --authority HOST:7099 --identity FOLDER
Agents do not learn of it: a stolen key poses as that server to them until its certificate expires, within a day."""


def holder(role: Role, federation: str | None, client: str | None) -> Identity:
    """Whom to revoke. Raises: DomainError CONFIGURATION_INVALID, saying what to give."""
    if role is Role.CLIENT:
        if not federation or not client:
            raise _unusable("give FEDERATION and CLIENT, or --role for all operators or servers of a kind")
        return Identity(role, federation, client)
    if federation or client:
        raise _unusable(f"--role {role} revokes all of that role: give no federation and no client")
    if role not in REVOCABLE_ROLES:
        raise _unusable("the key authority certifies itself anew at every start: start it again")
    return Identity(role)


def consequences(role: Role) -> str:
    """What revoking a role does, and how trusted holders come back."""
    return _OPERATORS if role is Role.OPERATOR else _SERVERS.format(role=role)


def _unusable(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
