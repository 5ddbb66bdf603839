"""What goes wrong: faults that a seed draws while a run goes on, each noted with the one event that it spoiled.

A fault names its event by who does what for the how-manieth time, not by a time, so that a run can be repeated with
the faults that were noted, and with fewer of them, and each still meets its event.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal, TypeAlias

CallKind = Literal["drop-request", "drop-response", "duplicate", "break"]


@dataclass(frozen=True)
class Call:
    """A call fails on its way: the request or the response is lost, the request comes twice, the stream breaks."""

    caller: str
    method: str
    nth: int
    kind: CallKind
    seconds: float
    """Until the caller hears of it; until the duplicate arrives."""
    position: int = 0
    """Messages of a stream that pass before it breaks."""

    def __str__(self) -> str:
        where = f" after {self.position} messages" if self.kind == "break" else ""
        return f"{self.kind} of {self.caller}'s {self.method} #{self.nth}{where}, {self.seconds:.2f} s"


@dataclass(frozen=True)
class Crash:
    """A process ends, without a word, shortly after (0: before) its nth operation: store commands and calls."""

    process: str
    nth: int
    delay_s: float
    down_s: float

    def __str__(self) -> str:
        when = f"{1000 * self.delay_s:.1f} ms into" if self.delay_s else "before"
        return f"{self.process} crashes {when} operation #{self.nth}, back after {self.down_s:.1f} s"


@dataclass(frozen=True)
class Pause:
    """A process stands still: a stopped machine, a long collection."""

    process: str
    nth: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.process} stands still for {self.seconds:.1f} s before operation #{self.nth}"


@dataclass(frozen=True)
class Store:
    """A store command whose answer is lost, or that takes long on its way.

    "repeat": redis-py sends it again over a new connection; "lost": the second attempt fails too; "late": it takes
    effect after `seconds`, whatever has become of the caller since.
    """

    process: str
    nth: int
    kind: Literal["repeat", "lost", "late"]
    seconds: float = 0.0

    def __str__(self) -> str:
        after = f" by {self.seconds:.2f} s" if self.kind == "late" else ""
        return f"{self.kind}{after}: {self.process}'s operation #{self.nth} at the store"


@dataclass(frozen=True)
class Slow:
    """A call in a thread of a process takes long: training, a busy machine."""

    process: str
    nth: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.process} works {self.seconds:.2f} s at call #{self.nth} in a thread"


@dataclass(frozen=True)
class Outage:
    """The store restarts: no command is answered, subscriptions break, nothing that was written is lost."""

    at_s: float
    seconds: float

    def __str__(self) -> str:
        return f"the store is away for {self.seconds:.1f} s at {self.at_s:.1f} s"


@dataclass(frozen=True)
class Loss:
    """The store loses the bytes of the nth update shard that became complete, some time later."""

    nth: int
    delay_s: float

    def __str__(self) -> str:
        return f"the store loses update shard #{self.nth} {self.delay_s:.2f} s after it was complete"


@dataclass(frozen=True)
class WorkerDeath:
    """The worker of the nth aggregation dies; its pool answers WORKER_FAILED."""

    process: str
    nth: int
    commands: int
    """Store commands of the job that had taken effect."""

    def __str__(self) -> str:
        return f"{self.process}'s worker dies in job #{self.nth} after {self.commands} commands"


@dataclass(frozen=True)
class Skew:
    """The clock of a process is off."""

    process: str
    ms: int

    def __str__(self) -> str:
        return f"the clock of {self.process} is {self.ms:+d} ms off"


@dataclass(frozen=True)
class Jitter:
    """Every step takes its own time, wake-ups get lost; without this fault all steps take one millisecond."""

    def __str__(self) -> str:
        return "uneven latencies, lost wake-ups"


Fault: TypeAlias = Call | Crash | Pause | Store | Slow | Outage | Loss | WorkerDeath | Skew | Jitter

SERVERS: Final = ("coordinator-0", "coordinator-1", "aggregation-0", "aggregation-1")


class Chance:
    """Draws faults. Some runs know many, some few; some kinds are left out of a run altogether.

    Args:
        kinds: The only kinds, and those often; empty to draw which and how often.
    """

    def __init__(self, rng: Random, kinds: Sequence[str] = ()) -> None:
        self._rng = rng
        self._kinds = set(kinds or rng.sample(KINDS, rng.randint(1, len(KINDS))))
        self._rate = 10.0 if kinds else rng.choice((0.5, 1.0, 2.0, 4.0))
        self.until_s = 60.0 if kinds else rng.choice((10.0, 30.0, 60.0))
        """Virtual time after which nothing new goes wrong."""

    def _happens(self, kind: str, rate: float) -> bool:
        return kind in self._kinds and self._rng.random() < rate * self._rate

    def standing(self) -> list[Fault]:
        """What holds for the whole run, and what happens at a time."""
        rng = self._rng
        found: list[Fault] = [Jitter()] if rng.random() < 0.8 else []
        if "skew" in self._kinds:
            found += [Skew(name, rng.randint(-3000, 3000)) for name in SERVERS if rng.random() < 0.5]
        if "outage" in self._kinds:
            found += [Outage(rng.uniform(0, 20), rng.choice((rng.uniform(0.1, 3), rng.uniform(0.5, 40))))]
        return found

    def call(self, caller: str, method: str, nth: int, streamed: bool) -> Fault | None:
        if not self._happens("call", 0.02):
            return None
        kinds: list[CallKind] = ["drop-request", "drop-response", "break" if streamed else "duplicate"]
        seconds = self._rng.choice((0.0, self._rng.uniform(0, 2), self._rng.uniform(0, 30)))
        return Call(caller, method, nth, self._rng.choice(kinds), seconds, self._rng.randint(0, 3))

    def operation(self, process: str, nth: int, kind: str) -> Fault | None:
        """`kind`: "call", "read", "write" or "script": what matters most is most often spoiled."""
        rng, weight = self._rng, {"read": 1.0, "write": 2.0, "call": 4.0, "script": 8.0}[kind]
        if self._happens("crash", 0.001 * weight):
            down_s = rng.choice((0.6, rng.uniform(0.6, 5), rng.uniform(5, 40)))
            return Crash(process, nth, rng.choice((0.0, rng.uniform(0.0001, 0.02))), down_s)
        if self._happens("pause", 0.001 * weight):
            return Pause(process, nth, rng.choice((rng.uniform(0, 2), rng.uniform(0.5, 40))))
        if kind != "call" and self._happens("store", 0.002 * weight):
            seconds = rng.choice((rng.uniform(0, 1), rng.uniform(0, 40)))
            return Store(process, nth, rng.choice(("repeat", "lost", "late")), seconds)
        return None

    def thread(self, process: str, nth: int) -> Fault | None:
        if not self._happens("slow", 0.03):
            return None
        return Slow(process, nth, self._rng.choice((self._rng.uniform(0, 2), self._rng.uniform(0, 70))))

    def promotion(self, nth: int) -> Fault | None:
        if not self._happens("loss", 0.05):
            return None
        return Loss(nth, self._rng.choice((0.0, self._rng.uniform(0, 1), self._rng.uniform(0, 10))))

    def job(self, process: str, nth: int) -> Fault | None:
        return WorkerDeath(process, nth, self._rng.randint(0, 8)) if self._happens("worker", 0.1) else None


KINDS: Final = ("call", "crash", "loss", "outage", "pause", "skew", "slow", "store", "worker")


class Faults:
    """The faults of a run: asked at every event, remembers which took place.

    Args:
        known: Faults that take place if their event does.
        chance: Draws others; None for none.
        now_s: Virtual time.
    """

    def __init__(self, known: Sequence[Fault], chance: Chance | None, now_s: Any) -> None:
        self._chance = chance
        self._now_s = now_s
        self._counts: Counter[tuple[str, ...]] = Counter()
        self.standing = [fault for fault in known if isinstance(fault, Jitter | Skew | Outage)]
        self.standing += chance.standing() if chance else []
        self._known = {self._event(fault): fault for fault in known}
        self.met: dict[Fault, None] = dict.fromkeys(self.standing)
        self.over_s = max((f.at_s + f.seconds for f in self.standing if isinstance(f, Outage)), default=0.0)
        """Virtual time at which all faults that took place are over."""

    @staticmethod
    def _event(fault: Fault) -> tuple[object, ...]:
        match fault:
            case Call(caller, method, nth):
                return "call", caller, method, nth
            case Crash(process, nth) | Pause(process, nth) | Store(process, nth):
                return "operation", process, nth
            case Slow(process, nth):
                return "thread", process, nth
            case Loss(nth):
                return "promotion", nth
            case WorkerDeath(process, nth):
                return "job", process, nth
            case _:
                return (fault,)

    def on(self, event: str, *who: str, **more: Any) -> Any:
        """The fault of this event, if it has one."""
        self._counts[event, *who] += 1
        nth = self._counts[event, *who]
        fault = self._known.get((event, *who, nth))
        if fault is None and self._chance is not None and self._now_s() < self._chance.until_s:
            fault = getattr(self._chance, event)(*who, nth, **more)
        if fault is not None:
            self.met[fault] = None
            self.over_s = max(self.over_s, self._now_s() + _lasts_s(fault))
        return fault


def _lasts_s(fault: Fault) -> float:
    match fault:
        case Crash(delay_s=delay_s, down_s=down_s):
            return delay_s + down_s
        case Loss(delay_s=delay_s):
            return delay_s
        case Call(seconds=seconds) | Pause(seconds=seconds) | Store(seconds=seconds) | Slow(seconds=seconds):
            return seconds
        case _:
            return 0.0
