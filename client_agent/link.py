"""Calls to the coordinator that know whether the agent is offline, and tell its owner."""

from typing import TypeVar

import grpc
import structlog

from client_agent.config import AgentConfig
from shelora.errors import DomainError
from shelora.telemetry.outages import Outage
from shelora.transport.channel import RETRY_S, TIMEOUT_S, call, is_transient

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_log = structlog.get_logger(__name__)


class Link:
    """Makes calls. Heartbeats go out all the time, so it knows whether the agent is offline."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._offline = Outage(_log, "offline", over="online")

    async def __call__(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
    ) -> _Response:
        """The coordinator's answer. Raises: DomainError."""
        try:
            answer = await call(method, request, timeout_s=timeout_s, retry_s=retry_s)
        except DomainError as error:
            if is_transient(error):
                self._offline.failed(error, **self._while_offline())
            else:
                self._offline.ended()
            raise
        self._offline.ended()
        return answer

    def _while_offline(self) -> dict[str, str]:
        """What its owner wants to know of an agent that is offline."""
        told = {"then": "goes on with what it has, keeps what is finished, and tries again by itself"}
        try:
            expires = self._config.identity.read().facts.expires
        except DomainError:  # only in tests
            return told
        return {**told, "certificate_valid_until": expires.isoformat(timespec="minutes")}
