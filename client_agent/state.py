"""What an agent keeps on disk, so that a restart loses no finished work.

    applied.safetensors     weights after the last result that was applied
    before.safetensors      weights after the result before it, which the coordinator may go back to
    trained.safetensors     weights after the last training, until a result is applied
                            each of the three with what the optimizer goes on from, if that is kept
    plan_fit.json           how the newest plan serves this client, and the weight of its next vote
    promise.json            the strongest protection it took part under
    client-privacy.json     the client privacy it first took part under
    spool/<round>/          serialized shards of the update being uploaded; complete once its manifest is there
    privacy.json            what was spent of the privacy budget (`client_agent.privacy`)
    sums.json               the sums that this client was in, under client privacy (`client_agent.sum_budget`)
    result.json             digests of the results that were applied last
    figures.json            what was measured of each result (`client_agent.measured`)
    certified.json          the set of updates that this client certified for each round, as a member of its committee
    inbox/<round>/          shards of the result being downloaded
    adapter/                the adapter of the newest result that was applied, and which one that is (`adapters`)
    adapter-best/           that of the result with the smallest loss on this client's own test examples
    adapter-best.before/    the best one before it, while the result of the best one can be taken back
    samples/                what the model wrote to the prompts of its configuration, a file a round

Every file is written beside its place and renamed into it, so a file that is there is whole; so is an adapter's folder.
Folders have mode 0700 and files 0600: weights are the client's own. Secrets are never written.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from client_agent.access import unwritable
from client_agent.adapters import ADAPTER, BEST, Adapters
from client_agent.config import HiddenClient
from client_agent.learning import Weights
from client_agent.measured import Measured
from client_agent.moments import NONE, Estimates, Moments
from client_agent.sum_budget import SumBudget
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.federation import ClientPrivacySpec
from shelora.levels import Level
from shelora.lora.shards import Float32, LoraFactors
from shelora.lora.sketches import Exponents
from shelora.transport.pieces import Digest

_FORMAT: Final = 1
_APPLIED: Final = "applied.safetensors"
_BEFORE: Final = "before.safetensors"
_TRAINED: Final = "trained.safetensors"
_MANIFEST: Final = "manifest.json"
_PLAN_FIT: Final = "plan_fit.json"
SAMPLES: Final = "samples"
_PROMISE: Final = "promise.json"
_HIDDEN: Final = "client-privacy.json"
_CERTIFIED: Final = "certified.json"
_RESULT: Final = "result.json"
_STEPS: Final = "moments/steps"
_MAX_NOTED: Final = 100
"""Results that are known by their digests: more than are taken back in a row while a spoiler is looked for."""
_HASH_BLOCK: Final = 1 << 20
_UNREADABLE: Final = (OSError, ValueError, TypeError, RecursionError)
"""What reading a damaged file may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateNote:
    """What is committed with an update beside its shards."""

    round_id: str
    layout_digest: bytes
    rank: int
    scaling: float
    example_count: int
    """Aggregation weight."""
    train_loss: float
    train_s: float
    encrypt_s: float
    overlap: float | None = None
    """What is reported of drift; None if the federation does not ask."""
    base: str = ""
    """Digest of the base model in hex; never sent as it is."""
    base_tags: Mapping[str, str] | None = None
    """The same by part, in hex, keyed by the epoch's secret: what is sent."""
    privacy: str = ""
    """How the examples are hidden, as `LocalLearner.privacy`; never sent."""


@dataclass(frozen=True, slots=True)
class PlanFit:
    """How the newest plan serves this client."""

    vote_round_id: str = ""
    """Vote behind that plan; "" before the first."""
    weight: float = 1.0
    """Weight of this client's next vote."""
    fresh_overlap: float = 1.0
    """Share of its top columns that the plan protected when it was new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spool:
    """A protected update on disk, ready to be uploaded."""

    folder: Path
    note: UpdateNote
    shards: tuple[Digest, ...]
    dealt: bytes = b""
    """The update's key, shared among a committee: a serialized DealtShares; empty without one."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(digest.total_bytes for digest in self.shards)

    def read(self, index: int) -> bytes:
        """The serialized shard of that index."""
        return (self.folder / _shard_name(index)).read_bytes()


class SpoolWriter:
    """Writes a spool shard by shard, in order; the spool exists once `finish` returned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[Digest] = []
        self._dealt = b""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Of the shards written so far."""
        return tuple(self._shards)

    def deal(self, dealt: bytes) -> None:
        """Keeps the update's key, shared among a committee: a serialized DealtShares."""
        self._dealt = dealt

    def add(self, data: bytes) -> None:
        """Writes the next shard."""
        files.replace(self._folder / _shard_name(len(self._shards)), data)
        self._shards.append(Digest.of(data))

    def finish(self, note: UpdateNote) -> Spool:
        """Writes the manifest, which makes the spool complete."""
        fields = {**asdict(note), "layout_digest": note.layout_digest.hex()}
        shards = [{"sha256": d.sha256.hex(), "total_bytes": d.total_bytes} for d in self._shards]
        manifest: dict[str, Any] = {"format": _FORMAT, "note": fields, "shards": shards}
        if self._dealt:
            manifest["dealt"] = self._dealt.hex()
        files.replace(self._folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        return Spool(folder=self._folder, note=note, shards=tuple(self._shards), dealt=self._dealt)


class AgentState:
    """The state folder. One agent at a time holds it.

    Args:
        folder: Where.
        free_bytes: Bytes that can still be written to the file system of a folder.

    Raises: DomainError CONFIGURATION_INVALID if it cannot be made or another agent holds it.
    """

    def __init__(self, folder: Path, free_bytes: Callable[[Path], int] | None = None) -> None:
        self._folder = folder
        self._free_bytes = free_bytes or (lambda folder: shutil.disk_usage(folder).free)
        try:
            _make_folder(folder)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(folder, error.strerror or str(error)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise _unusable(folder, "another agent uses it; give each agent a folder of its own") from error
        files.remove_drafts(folder)
        self.adapters = Adapters(folder)
        self.measured = Measured(folder)

    def close(self) -> None:
        """Lets another agent use the folder."""
        os.close(self._lock)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around work that writes here. Raises: DomainError DISK_UNAVAILABLE, with the remedy, if the disk refuses."""
        with files.failures_named(self._folder):
            try:
                yield
            except safetensors.SafetensorError as error:  # how PEFT's writer says it
                raise OSError(str(error)) from error

    def require_room(self, needed: int) -> None:
        """Raises: DomainError DISK_UNAVAILABLE unless `needed` bytes are free: better to wait than to break off."""
        free = self._free_bytes(self._folder)
        if free < needed:
            why = f"{free / 1e6:,.1f} MB are free, and the work at hand may write {needed / 1e6:,.1f} MB"
            raise files.unavailable(self._folder, why)

    def save_applied(self, key: Mapping[str, str], weights: Weights) -> None:
        """Keeps the weights after a result was applied, and those before it; what was trained before is obsolete."""
        newest = self._folder / _APPLIED
        if newest.is_file():
            files.replace(self._folder / _BEFORE, newest.read_bytes())
        _save_weights(newest, key, weights)
        (self._folder / _TRAINED).unlink(missing_ok=True)

    def forget_applied(self) -> None:
        """Deletes applied weights, and those before them; what was trained stays."""
        for name in (_BEFORE, _APPLIED):
            (self._folder / name).unlink(missing_ok=True)

    def applied(self) -> tuple[dict[str, str], Weights] | None:
        """The last applied weights and their key; None if there are none, or none that can be read."""
        return _load_weights(self._folder / _APPLIED)

    def applied_before(self) -> tuple[dict[str, str], Weights] | None:
        """The weights after the result before the last one, and their key; None as in `applied`."""
        return _load_weights(self._folder / _BEFORE)

    def take_back(self) -> None:
        """Makes the weights before the last result those that were applied last."""
        (self._folder / _BEFORE).replace(self._folder / _APPLIED)
        (self._folder / _TRAINED).unlink(missing_ok=True)

    def save_trained(self, key: Mapping[str, str], weights: Weights) -> None:
        """Keeps the weights after training."""
        _save_weights(self._folder / _TRAINED, key, weights)

    def trained(self) -> tuple[dict[str, str], Weights] | None:
        """The last trained weights and their key; None if there are none, or none that can be read."""
        return _load_weights(self._folder / _TRAINED)

    def save_samples(self, number: int, content: bytes) -> Path:
        """Keeps what the model wrote after that training round; 0: before the first. Returns the file."""
        folder = self._folder / SAMPLES
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"round-{number:04}.json"
        files.replace(path, content)
        return path

    def save_plan_fit(self, fit: PlanFit) -> None:
        """Keeps how the newest plan serves this client."""
        files.replace(self._folder / _PLAN_FIT, json.dumps({"format": _FORMAT, **asdict(fit)}).encode())

    def plan_fit(self) -> PlanFit:
        """As last kept; that of a new client if nothing is, or nothing that can be read."""
        try:
            fields = json.loads((self._folder / _PLAN_FIT).read_bytes())
            if fields.pop("format") != _FORMAT:
                return PlanFit()
            fit = PlanFit(
                str(fields["vote_round_id"]), float(fields["weight"]), float(fields["fresh_overlap"])
            )
        except (*_UNREADABLE, KeyError, AttributeError):
            return PlanFit()
        sound = 1 <= fit.weight < math.inf and 0 <= fit.fresh_overlap < math.inf  # NaN is neither
        return fit if sound else PlanFit()

    def save_promise(self, level: Level) -> None:
        """Remembers that this client took part under that protection, unless it did under a stronger one."""
        known = self.promise()
        if known is None or known.strength < level.strength:
            files.replace(self._folder / _PROMISE, json.dumps({"format": _FORMAT, "level": level}).encode())

    def promise(self) -> Level | None:
        """The strongest protection this client took part under; None if it took part in nothing yet.

        Raises: DomainError CONFIGURATION_INVALID if the file cannot be read: a promise is not forgotten in silence.
        """
        path = self._folder / _PROMISE
        try:
            return Level(json.loads(path.read_bytes())["level"])
        except FileNotFoundError:
            return None
        except (*_UNREADABLE, KeyError) as error:
            raise _unusable(self._folder, f"{_PROMISE} is damaged; delete it") from error

    def save_hidden(self, hidden: HiddenClient) -> None:
        """Remembers under what client privacy this client first took part."""
        if self.hidden() is None:
            files.replace(self._folder / _HIDDEN, hidden.model_dump_json().encode())

    def hidden(self) -> HiddenClient | None:
        """The client privacy that this client first took part under; None if it took part in no such federation.

        Raises: DomainError CONFIGURATION_INVALID if the file cannot be read.
        """
        try:
            return HiddenClient.model_validate_json((self._folder / _HIDDEN).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _unusable(self._folder, f"{_HIDDEN} is damaged; delete it") from error

    def note_result(self, round_id: str, digest: bytes) -> None:
        """Notes which result is applied as a round's, before it is. The newest are known: one may be gone back to."""
        noted = self._noted_results()
        noted.pop(round_id, None)
        newest = dict([*noted.items(), (round_id, digest.hex())][-_MAX_NOTED:])
        files.replace(self._folder / _RESULT, json.dumps({"format": _FORMAT, "results": newest}).encode())

    def require_result(self, round_id: str, digest: bytes) -> None:
        """Refuses another result of a round than the one that was applied as its.

        Raises: COMMITTEE_REFUSED: servers show agents different ones.
        """
        if self._noted_results().get(round_id, digest.hex()) != digest.hex():
            raise DomainError(
                Reason.COMMITTEE_REFUSED, f"this client was given another result of {round_id} before"
            )

    def _noted_results(self) -> dict[str, str]:
        """Digests in hex of the results that were applied, by round, the newest last."""
        try:
            note = json.loads((self._folder / _RESULT).read_bytes())
            return {str(round_id): str(digest) for round_id, digest in note["results"].items()}
        except (*_UNREADABLE, KeyError, AttributeError):  # none was applied
            return {}

    def certified_sets(self) -> "CertifiedSetsFile":
        """What this client certified as a member of committees."""
        return CertifiedSetsFile(self._folder / _CERTIFIED)

    def sum_budget(self, promised: ClientPrivacySpec) -> SumBudget:
        """What sums have told of this client, under what its federation promises."""
        return SumBudget(self._folder, promised)

    def begin_spool(self, round_id: str) -> SpoolWriter:
        """An empty spool; every other one is deleted."""
        self.drop_spool()
        folder = self._folder / "spool" / _folder_name(round_id)
        _make_folder(folder.parent)
        _make_folder(folder)
        return SpoolWriter(folder)

    def spool(self, round_id: str, layout_digest: bytes) -> Spool | None:
        """The complete update of that round and layout; None unless every byte of it is there."""
        spool = _read_spool(self._folder / "spool" / _folder_name(round_id))
        if spool is None or (spool.note.round_id, spool.note.layout_digest) != (round_id, layout_digest):
            return None
        whole = all(_has_digest(spool.folder / _shard_name(i), d) for i, d in enumerate(spool.shards))
        return spool if whole else None

    def drop_spool(self) -> None:
        """Deletes every spooled update."""
        shutil.rmtree(self._folder / "spool", ignore_errors=True)

    def arrived_bytes(self, round_id: str) -> int:
        """Bytes of a result that lie in its inbox."""
        return sum(path.stat().st_size for path in _entries(self._inbox_folder(round_id)))

    def open_inbox(self, round_id: str) -> "Inbox":
        """The shards of a result that have arrived so far; those of other results are deleted."""
        folder = self._inbox_folder(round_id)
        parent = folder.parent
        for other in _entries(parent):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        _make_folder(parent)
        _make_folder(folder)
        return Inbox(folder)

    def _inbox_folder(self, round_id: str) -> Path:
        return self._folder / "inbox" / _folder_name(round_id)


class CertifiedSetsFile:
    """Which set of updates a client certified for each round, in a file that outlives it.

    A committee's member that certified two sets for one round would give a client away. So a file that cannot be read
    is not an empty file: `certified` and `note` fail.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def certified(self, instance: str, kind: str, round_number: int) -> bytes | None:
        """Digest of the set that was noted for a round; None if none was. Raises: CONFIGURATION_INVALID."""
        noted = self._read().get(_place(instance, kind, round_number))
        return None if noted is None else bytes.fromhex(noted)

    def note(self, instance: str, kind: str, round_number: int, set_digest: bytes) -> None:
        """Notes a set durably; it and its name in the folder are on disk when this returns.

        Raises: ROUND_SPENT: another set is noted; CONFIGURATION_INVALID; DISK_UNAVAILABLE, and nothing is noted.
        """
        noted = self._read()
        if noted.setdefault(_place(instance, kind, round_number), set_digest.hex()) != set_digest.hex():
            raise DomainError(Reason.ROUND_SPENT, f"another set is noted for round {round_number}")
        with files.failures_named(self._path.parent):
            files.replace(self._path, json.dumps({"format": _FORMAT, "sets": noted}).encode())

    def _read(self) -> dict[str, str]:
        if not self._path.exists():
            return {}
        try:
            content = json.loads(self._path.read_bytes())
            if content["format"] != _FORMAT:
                raise ValueError("another format")
            return {str(place): bytes.fromhex(digest).hex() for place, digest in content["sets"].items()}
        except (*_UNREADABLE, KeyError, AttributeError) as error:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"{self._path} cannot be read: it says what this client has certified, and without it a second set "
                "might be certified for one round; bring it back, or enrol this client anew under another name",
            ) from error


def _place(instance: str, kind: str, round_number: int) -> str:
    return f"{instance}/{kind}/{round_number}"


class Inbox:
    """Shards of one result on their way in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, index: int, digest: Digest) -> bool:
        """Whether that shard is there with all its bytes."""
        return _has_digest(self._folder / _shard_name(index), digest)

    def partial(self, index: int) -> Path:
        """File that collects the bytes of a shard; what is in it arrived before."""
        return self._folder / f"{_shard_name(index)}.part"

    def accept(self, index: int, digest: Digest) -> None:
        """Makes the collected bytes the shard.

        Raises: DomainError DIGEST_MISMATCH or TRANSFER_TRUNCATED, and forgets the bytes, if they are others.
        """
        part = self.partial(index)
        if not _has_digest(part, digest):
            size = part.stat().st_size
            part.unlink()
            reason = Reason.TRANSFER_TRUNCATED if size < digest.total_bytes else Reason.DIGEST_MISMATCH
            raise DomainError(reason, f"result shard {index} arrived with other bytes than announced")
        part.replace(self._folder / _shard_name(index))

    def read(self, index: int) -> bytes:
        """The serialized shard."""
        return (self._folder / _shard_name(index)).read_bytes()

    def clear(self) -> None:
        """Deletes the shards."""
        shutil.rmtree(self._folder, ignore_errors=True)


def newest_adapter(folder: Path, *, best: bool = False) -> Path:
    """The adapter in a state folder, whether an agent uses it or not.

    Raises: DomainError CONFIGURATION_INVALID if there is none (yet).
    """
    adapter = folder / (BEST if best else ADAPTER)
    if not adapter.is_dir():
        more = "none was evaluated on test examples yet" if best else "no round was published yet"
        raise _unusable(folder, f"there is no {adapter.name}/ in it: {more}")
    return adapter


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _entries(parent: Path) -> Iterator[Path]:
    return iter(list(parent.iterdir()) if parent.is_dir() else [])


def _folder_name(round_id: str) -> str:
    """A folder name for any round_id: it comes from a server and may hold path separators."""
    return hashlib.sha256(round_id.encode()).hexdigest()[:32]


def _shard_name(index: int) -> str:
    return f"{index:05d}.shard"


def _has_digest(path: Path, digest: Digest) -> bool:
    if not path.is_file() or path.stat().st_size != digest.total_bytes:
        return False
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            hashed.update(block)
    return hashed.digest() == digest.sha256


def _read_spool(folder: Path) -> Spool | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            return None
        note = {**manifest["note"], "layout_digest": bytes.fromhex(manifest["note"]["layout_digest"])}
        shards = tuple(Digest(bytes.fromhex(s["sha256"]), s["total_bytes"]) for s in manifest["shards"])
        return Spool(
            folder=folder,
            note=UpdateNote(**note),
            shards=shards,
            dealt=bytes.fromhex(manifest.get("dealt", "")),
        )
    except (*_UNREADABLE, KeyError, DomainError):
        return None


def _save_weights(path: Path, key: Mapping[str, str], weights: Weights) -> None:
    arrays = {f"tensor/{name}": value for name, value in weights.tensors.items()}
    for name, factors in weights.factors.items():
        arrays |= {f"A/{name}": factors.A, f"B/{name}": factors.B}
    for name, frozen in weights.frozen.items():
        arrays |= {f"frozen-A/{name}": frozen.A, f"frozen-B/{name}": frozen.B}
    for name, bounds in weights.exponents.items():
        arrays[f"exponents/{name}"] = np.array([bounds.P, bounds.N], dtype=np.float32)
    for name, last in weights.changes.items():
        arrays[f"changes/{name}"] = np.array(last, dtype=np.float32)
    if weights.moments.steps:
        arrays |= _moment_arrays(weights.moments)
    # A view that is turned around would be written in the order of its memory.
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    files.replace(path, safetensors.numpy.save(whole, metadata=dict(key)))


def _load_weights(path: Path) -> tuple[dict[str, str], Weights] | None:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            key = dict(file.metadata() or {})
            arrays: dict[str, Float32] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
        named = partial(_named, arrays)
        factors = {name: LoraFactors(B=arrays[f"B/{name}"], A=A) for name, A in named("A/")}
        frozen = {name: LoraFactors(B=arrays[f"frozen-B/{name}"], A=A) for name, A in named("frozen-A/")}
        exponents = {name: Exponents(*map(int, bounds)) for name, bounds in named("exponents/")}
        changes = {name: tuple(map(float, last)) for name, last in named("changes/")}
        moments = _moments_of(arrays)
    except (*_UNREADABLE, KeyError, OverflowError, safetensors.SafetensorError):
        return None
    return key, Weights(
        factors=factors,
        tensors=dict(named("tensor/")),
        frozen=frozen,
        exponents=exponents,
        changes=changes,
        moments=moments,
    )


def _moment_arrays(moments: Moments) -> dict[str, Float32]:
    arrays = {_STEPS: np.array([moments.steps], dtype=np.float32)}
    for which, estimates in (("mean", moments.mean), ("square", moments.square)):
        arrays |= {f"{which}-tensor/{name}": value for name, value in estimates.tensors.items()}
        for name, factors in estimates.factors.items():
            arrays |= {f"{which}-A/{name}": factors.A, f"{which}-B/{name}": factors.B}
    return arrays


def _moments_of(arrays: Mapping[str, Float32]) -> Moments:
    """Raises: KeyError for arrays that are not whole."""
    if _STEPS not in arrays:
        return NONE

    def estimates(which: str) -> Estimates:
        pairs = _named(arrays, f"{which}-A/")
        factors = {name: LoraFactors(B=arrays[f"{which}-B/{name}"], A=A) for name, A in pairs}
        return Estimates(factors=factors, tensors=dict(_named(arrays, f"{which}-tensor/")))

    return Moments(steps=int(arrays[_STEPS][0]), mean=estimates("mean"), square=estimates("square"))


def _named(arrays: Mapping[str, Float32], prefix: str) -> Iterator[tuple[str, Float32]]:
    """The arrays whose key begins so, by the rest of it."""
    return ((key.removeprefix(prefix), value) for key, value in arrays.items() if key.startswith(prefix))


def require_usable(folder: Path) -> None:
    """Refuses a folder in which no state can be kept, as far as that can be told without making it.

    Raises: CONFIGURATION_INVALID.
    """
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise _unusable(folder, f"{place} is not a folder")
    if why := unwritable(place):
        raise _unusable(folder, why)


def _unusable(folder: Path, why: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, f"state_dir: {folder} cannot be used: {why}")
