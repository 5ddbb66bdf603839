"""Who may call what: one table for every service, and the rule that keeps federations apart.

Whatever is not in the table is refused. Clients may name no federation, client or round but their own, in any field
of any request; `services.common.guard` enforces both on every RPC.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role

ANYONE: Final = frozenset(Role)
"""Everyone who has a valid certificate of this authority."""

NO_CERTIFICATE_NEEDED: Final = frozenset(
    {"/shelora.v1.Enrolment/Enroll", "/shelora.v1.Enrolment/EnrollServer"}
)
"""What a stranger may call: exchange a token, or prove to hold a workload key."""

_OPERATOR: Final = frozenset({Role.OPERATOR})
_COORDINATOR: Final = frozenset({Role.COORDINATOR})
_AGGREGATION: Final = frozenset({Role.AGGREGATION})
_CLIENT: Final = frozenset({Role.CLIENT})

PERMISSIONS: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        "/shelora.v1.Coordinator/CreateFederation": _OPERATOR,
        "/shelora.v1.Coordinator/GetFederation": _OPERATOR | _CLIENT,
        "/shelora.v1.Coordinator/ListFederations": _OPERATOR,
        "/shelora.v1.Coordinator/StartFederation": _OPERATOR,
        "/shelora.v1.Coordinator/RotateKeys": _OPERATOR,
        "/shelora.v1.Coordinator/StopFederation": _OPERATOR,
        "/shelora.v1.Coordinator/ExtendFederation": _OPERATOR,
        "/shelora.v1.Coordinator/DeleteFederation": _OPERATOR,
        "/shelora.v1.Coordinator/Join": _CLIENT,
        "/shelora.v1.Coordinator/Watch": _CLIENT,
        "/shelora.v1.Coordinator/Heartbeat": _CLIENT,
        "/shelora.v1.Coordinator/GiveUp": _CLIENT,
        "/shelora.v1.Coordinator/ObjectToResult": _CLIENT,
        "/shelora.v1.Coordinator/CommitUpdate": _CLIENT,
        "/shelora.v1.Coordinator/CastBallot": _CLIENT,
        "/shelora.v1.Coordinator/PublishPlan": _CLIENT,
        "/shelora.v1.Coordinator/GetPlan": _CLIENT,
        "/shelora.v1.Coordinator/RejectPlan": _CLIENT,
        "/shelora.v1.Coordinator/ReportEvaluation": _CLIENT,
        "/shelora.v1.Coordinator/PostCommitteeKey": _CLIENT,
        "/shelora.v1.Coordinator/GetCommitteeKeys": _CLIENT,
        "/shelora.v1.Coordinator/LeaveCommittee": _CLIENT,
        "/shelora.v1.Coordinator/GetShares": _CLIENT,
        "/shelora.v1.Coordinator/PostCheck": _CLIENT,
        "/shelora.v1.Coordinator/SignSet": _CLIENT,
        "/shelora.v1.Coordinator/PostAnswer": _CLIENT,
        "/shelora.v1.Coordinator/GetOpening": _CLIENT,
        "/shelora.v1.Aggregation/OpenRound": _COORDINATOR,
        "/shelora.v1.Aggregation/PutShard": _CLIENT,
        "/shelora.v1.Aggregation/QueryShards": _CLIENT | _COORDINATOR,
        "/shelora.v1.Aggregation/SealUpdate": _COORDINATOR,
        "/shelora.v1.Aggregation/AggregateShard": _COORDINATOR,
        "/shelora.v1.Aggregation/HelpAggregate": _COORDINATOR,
        "/shelora.v1.Aggregation/GetResult": _CLIENT,
        "/shelora.v1.Aggregation/CloseRound": _COORDINATOR,
        "/shelora.v1.Aggregation/ListReplicas": _CLIENT | _COORDINATOR,
        "/shelora.v1.KeyAuthority/OpenEpoch": _COORDINATOR,
        "/shelora.v1.KeyAuthority/GetEpochSecrets": _CLIENT,
        "/shelora.v1.KeyAuthority/RetireEpochs": _COORDINATOR,
        "/shelora.v1.Enrolment/CreateToken": _OPERATOR,
        "/shelora.v1.Enrolment/Enroll": ANYONE,
        "/shelora.v1.Enrolment/EnrollServer": ANYONE,
        "/shelora.v1.Enrolment/Renew": ANYONE - {Role.KEY_AUTHORITY},
        "/shelora.v1.Enrolment/RevokeClient": _OPERATOR,
        "/shelora.v1.Enrolment/RevokeRole": _OPERATOR,
        "/shelora.v1.Enrolment/ListRevocations": _OPERATOR | _COORDINATOR | _AGGREGATION,
        "/grpc.health.v1.Health/Check": ANYONE,
        "/grpc.health.v1.Health/Watch": ANYONE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATOR,
    }
)
"""Roles that may call each RPC, by its full name. docs/threat-model.md gives the reasons."""

SMALL_REQUEST_BYTES: Final = 64 * 2**10
"""Largest request of a call that is not listed below."""

LARGEST_REQUESTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "/shelora.v1.Coordinator/CreateFederation": 2**20,
        # Matrices and tensors of a model: 16 384 of each at most, some 70 bytes each.
        "/shelora.v1.Coordinator/Join": 4 * 2**20,
        "/shelora.v1.Coordinator/PublishPlan": 4 * 2**20,
        # A layout, and a rank a client of the cohort.
        "/shelora.v1.Aggregation/OpenRound": 4 * 2**20,
        # A digest a shard.
        "/shelora.v1.Coordinator/CommitUpdate": 2 * 2**20,
        "/shelora.v1.Aggregation/SealUpdate": 2 * 2**20,
        # A contribution a client of the cohort.
        "/shelora.v1.Aggregation/AggregateShard": 4 * 2**20,
        "/shelora.v1.Aggregation/HelpAggregate": 4 * 2**20,
        # Pieces of 256 KiB.
        "/shelora.v1.Coordinator/CastBallot": 2**19,
        "/shelora.v1.Aggregation/PutShard": 2**19,
    }
)
"""Bytes of a request of the other calls; of a stream, of each of its requests."""

_SCOPED: Final = frozenset({"federation_id", "client_id", "round_id"})


def largest_request(method: str) -> int:
    """Bytes that a request of `method` (`/service/method`) may have."""
    return LARGEST_REQUESTS.get(method, SMALL_REQUEST_BYTES)


def check_role(method: str, identity: Identity | None) -> None:
    """Refuses a caller whose role may not call `method` (`/service/method`); None is a caller without a certificate.

    Raises: DomainError UNAUTHENTICATED without a certificate, PERMISSION_DENIED with one of another role.
    """
    if identity is None:
        if method not in NO_CERTIFICATE_NEEDED:
            raise DomainError(Reason.UNAUTHENTICATED, f"{method} needs a client certificate")
    elif identity.role not in PERMISSIONS.get(method, frozenset()):
        raise DomainError(Reason.PERMISSION_DENIED, f"{identity} may not call {method}")


def check_scope(request: Message, identity: Identity | None) -> None:
    """Refuses a client's request that names another federation, client or round than its own.

    Raises: DomainError PERMISSION_DENIED, naming the field.
    """
    if identity is None or identity.role is not Role.CLIENT:
        return
    descriptor = cast("Descriptor", request.DESCRIPTOR)  # the stub adds the class of another implementation
    for path in scoped_fields(descriptor):
        value = _value(request, path)
        if value is not None and not _own(path[-1], value, identity):
            raise DomainError(
                Reason.PERMISSION_DENIED,
                f"{identity} may not name another {path[-1].removesuffix('_id')} in {'.'.join(path)}",
            )


@cache
def scoped_fields(message: Descriptor) -> tuple[tuple[str, ...], ...]:
    """Paths of the fields that name a federation, client or round, those in messages within it included."""
    return tuple(_scoped(message, ()))


def _scoped(message: Descriptor, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for field in message.fields:
        if field.name in _SCOPED:
            yield (*above, field.name)
        elif field.message_type is not None and not field.is_repeated:
            yield from _scoped(field.message_type, (*above, field.name))


def _value(message: Message, path: tuple[str, ...]) -> str | None:
    """The field's value; None if a message on the way to it is absent."""
    for name in path[:-1]:
        if not message.HasField(name):
            return None
        message = getattr(message, name)
    return str(getattr(message, path[-1]))


def _own(field: str, value: str, identity: Identity) -> bool:
    if field == "round_id":  # federation.instance.number, and a federation's name holds no dot
        return value.partition(".")[0] == identity.federation_id
    return value == {"federation_id": identity.federation_id, "client_id": identity.client_id}[field]
