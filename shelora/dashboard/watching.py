"""What the page knows now: one loop asks the coordinator and the servers' metrics, however many browsers look."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import structlog

from shelora.dashboard.alerts import Alert, federation_alerts, server_alerts
from shelora.dashboard.memory import SAMPLE_S, PresenceHistory
from shelora.dashboard.servers import Sample, ServerRow, redis_row, sampled, server_row
from shelora.errors import DomainError, Reason
from shelora.operator import Operator
from shelora.v1 import coordinator_pb2 as pb

_log = structlog.get_logger(__name__)

REFRESH_S: Final = 1.0
METRICS_S: Final = 5.0
LATE_S: Final = 5.0
"""Seconds without an answer after which the page says so. The call goes on: it tries again by itself."""


class Watch:
    """Federations, members and servers as they were a moment ago.

    Args:
        operator: Whom to ask.
        metrics: Prometheus address by server; none if they are not known.
    """

    def __init__(self, operator: Operator, metrics: Mapping[str, str]) -> None:
        self._operator = operator
        self._metrics = metrics
        self._viewed: Counter[str] = Counter()
        self._read: dict[str, pb.Federation] = {}
        self._read_s: dict[str, float] = {}
        self._samples: dict[str, Sample | None] = {}
        self._before: dict[str, Sample | None] = {}
        self._looked = False
        self._changed = asyncio.Condition()
        self._over = False
        self.memory = PresenceHistory()
        self.federations: list[pb.Federation] = []
        self.problem = ""
        """Why what is shown is old; "" if it is not."""

    @property
    def now_s(self) -> float:
        """The clock of the memory."""
        return time.monotonic()

    def federation(self, name: str) -> pb.Federation | None:
        """As it was last read."""
        return self._read.get(name)

    @property
    def viewers(self) -> int:
        """Browser tabs that look now."""
        return self._viewed.total()

    @property
    def alerts(self) -> list[Alert]:
        """What needs somebody."""
        return [*server_alerts(self._samples), *federation_alerts(self._read.values())]

    @property
    def servers(self) -> list[ServerRow]:
        """Every server whose metrics are known, and Redis."""
        rows = [
            server_row(name, self._metrics[name], sample, self._before.get(name))
            for name, sample in self._samples.items()
        ]
        redis = redis_row(self._samples)
        return [*rows, redis] if redis else rows

    @contextmanager
    def viewing(self, name: str) -> Iterator[None]:
        """While somebody looks at a federation it is read every second."""
        self._viewed[name] += 1
        try:
            yield
        finally:
            self._viewed[name] -= 1
            self._viewed += Counter()  # drops those nobody looks at

    async def fresh(self, name: str) -> pb.Federation:
        """Reads a federation at once. Raises: DomainError."""
        federation = await self._operator.get(name, self._known(name))
        self._take(federation)
        return federation

    async def look(self) -> None:
        """Reads the federations that are due."""
        try:
            self.federations = await self._operator.list()
            await self._read_due()
            self.problem = ""
        except DomainError as error:
            self.problem = f"{error.reason}: {error.message}"

    async def sample(self) -> None:
        """Reads the metrics of all servers."""
        self._before, self._samples = self._samples, await sampled(self._metrics, time.time())

    async def changes(self) -> AsyncIterator[None]:
        """Yields after every look, until the page ends."""
        while not self._over:
            yield
            async with self._changed:
                await self._changed.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks again and again while the page serves, which begins when there is something to show."""
        tasks = [
            asyncio.create_task(self._again(REFRESH_S, self._look_or_say)),
            asyncio.create_task(self._again(METRICS_S, self.sample)),
        ]
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._looked)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.end()

    async def end(self) -> None:
        """Ends all `changes`."""
        self._over = True
        await self._tell()

    async def _again(self, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - one answer must not stop the page
                # A server may answer with what nobody foresaw. The page says so and looks again.
                _log.exception("look_failed")
                self.problem = f"{Reason.INTERNAL}: {type(error).__name__}; the page's own output says more"
                self._looked = True
            await self._tell()
            await asyncio.sleep(every_s)

    async def _look_or_say(self) -> None:
        """`look`, which may take long: what is shown is old then, and the page says so meanwhile."""
        look = asyncio.create_task(self.look())
        try:
            done, _ = await asyncio.wait({look}, timeout=LATE_S)
            self._looked = True
            if not done:
                self.problem = self.problem or f"the coordinator has not answered for {LATE_S:.0f} s"
                await self._tell()
            await look
        finally:
            look.cancel()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _read_due(self) -> None:
        names = [f.federation_id for f in self.federations]
        self.memory.keep(names)
        for gone in self._read.keys() - set(names):
            del self._read[gone]
        for federation in self.federations:
            if self._due(federation):
                await self._read_one(federation.federation_id)

    async def _read_one(self, name: str) -> None:
        try:
            await self.fresh(name)
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_UNKNOWN:
                raise
            self._read.pop(name, None)

    def _due(self, federation: pb.Federation) -> bool:
        name = federation.federation_id
        if self._viewed[name]:
            return True
        late = self.now_s - self._read_s.get(name, -SAMPLE_S) >= SAMPLE_S
        return federation.phase == pb.PHASE_RUNNING and late

    def _known(self, name: str) -> list[pb.RoundSummary]:
        read = self._read.get(name)
        return list(read.history) if read else []

    def _take(self, federation: pb.Federation) -> None:
        name, now_s = federation.federation_id, self.now_s
        self._read[name], self._read_s[name] = federation, now_s
        self.memory.note(federation, now_s)
