"""The layout of a round: which matrices and tensors an update holds, what of them is protected, and the shards.

Columns of a matrix travel in its *column order* (`shelora.obfuscation`): first the columns of tier 0, then those of
tier 1 and so on, then the columns that nobody encrypts. A client that encrypts `t` tiers encrypts a prefix of that
order, so a server needs only the counts in `Matrix.tier_columns`, never a column number.

Within a shard the protected columns of all its matrices fill CKKS slots tier by tier: the slots of a client that
encrypts `t` tiers are then a prefix too, and a small budget costs few ciphertexts.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property

from shelora.additive import parameters as additive
from shelora.additive.parameters import AdditiveParameters
from shelora.ckks.parameters import CkksParameters, profile
from shelora.ckks.wire import KEY_ID_BYTES
from shelora.errors import DomainError, Reason
from shelora.lora.noise import ClientNoise

FORMAT = 1
MAX_DIMENSION = 2**20
MAX_TENSOR_VALUES = 2**28
MAX_TENSOR_DIMENSIONS = 8
LARGEST_BOUND = (2 - 2.0**-23) * 2.0**127
"""Largest float32."""
MAX_RANK = 1024
MAX_ITEMS = 2**14
"""Matrices of a layout, and tensors: an expert model of the largest kind has some thousand adapted matrices."""
MAX_TIERS = 64
"""Tiers of a layout. Every tier is a run of slots of its own in every matrix."""
MAX_NAME = 256
MAX_SKETCH = 4096
"""Columns of a sketch."""
CORE_FACTOR = 2.4
"""Rows and columns of a sketch's core over k (`shelora.lora.sketches`)."""
SOFT_CLEAR_BYTES = 4 * 2**20
"""Clear bytes of the largest client at which a shard is closed once its last ciphertext chunk is well filled."""
HARD_CLEAR_BYTES = 16 * 2**20
"""Clear bytes at which a shard is closed however its last chunk is filled."""
MAX_CHUNKS = 32
"""Ciphertext chunks at which a shard is closed: 32 chunks of 32 aggregated rows are 28 MB at the standard profile."""
WELL_FILLED = 0.9
"""Share of a shard's last chunk that must be filled for closing at the soft limit."""
PRODUCTS = "products"
"""Kind of a shard of matrices: factors, selected columns of them under CKKS (`shelora.lora.products`)."""
SKETCHES = "sketches"
"""Kind of a shard of matrices: sketches of their updates, summed under additive encryption (`shelora.lora.sums`)."""
SUMS = "sums"
"""Kind of a shard of tensors: summed whole under additive encryption (`shelora.lora.sums`)."""
WHOLE = "whole"
"""Kind of a shard of tensors: averaged whole, in the clear or under CKKS (`shelora.lora.whole`)."""
FLOAT_BYTES = 4
"""Of a float32."""
CLEAR_BITS = (16, 32)
"""Bits in which clear values of factors may travel: bfloat16 or float32."""


def refuse(message: str) -> DomainError:
    """An INVALID_ARGUMENT error about a layout."""
    return DomainError(Reason.INVALID_ARGUMENT, message)


@dataclass(frozen=True, slots=True)
class Matrix:
    """An adapted matrix W [out_features, in_features] whose update is s B A."""

    name: str
    out_features: int
    in_features: int
    _: KW_ONLY
    tier_columns: tuple[int, ...] = ()
    """Protected columns of each tier."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME:
            raise refuse(f"a matrix name must have 1 to {MAX_NAME} characters")
        if not self.name.isprintable():
            raise refuse("a matrix name must have no control characters")
        if not (1 <= self.out_features <= MAX_DIMENSION and 1 <= self.in_features <= MAX_DIMENSION):
            raise refuse(f"matrix {self.name}: features must be 1 to {MAX_DIMENSION}")
        if min(self.tier_columns, default=0) < 0 or sum(self.tier_columns) > self.in_features:
            raise refuse(f"matrix {self.name}: tier_columns must be at most its {self.in_features} columns")

    def protected(self, tiers: int | None = None) -> int:
        """Columns in the first `tiers` tiers; in all of them by default."""
        return sum(self.tier_columns[:tiers])

    @property
    def clear(self) -> int:
        """Columns that no client encrypts."""
        return self.in_features - self.protected()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor averaged whole; values are at most `bound` in magnitude."""

    name: str
    shape: tuple[int, ...]
    bound: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", float(self.bound))  # 1 and 1.0 make one digest
        if not 1 <= len(self.name) <= MAX_NAME:
            raise refuse(f"a tensor name must have 1 to {MAX_NAME} characters")
        if not self.name.isprintable():
            raise refuse("a tensor name must have no control characters")
        if min(self.shape, default=1) < 1 or self.size > MAX_TENSOR_VALUES:
            raise refuse(f"tensor {self.name}: it must hold 1 to {MAX_TENSOR_VALUES} values")
        if len(self.shape) > MAX_TENSOR_DIMENSIONS:
            raise refuse(f"tensor {self.name}: it must have at most {MAX_TENSOR_DIMENSIONS} dimensions")
        if not 0 < self.bound <= LARGEST_BOUND:
            raise refuse(f"tensor {self.name}: the bound must be greater than 0 and a float32")

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of matrices or a run of tensors, by index into the layout, and the kind that says how it travels."""

    matrices: tuple[int, ...] = ()
    tensors: tuple[int, ...] = ()
    kind: str = ""
    """Name of a kind (`shelora.lora.kinds`); by default that of its items under CKKS, PRODUCTS or WHOLE."""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", self.usual_kind)
        if not 1 <= len(self.kind) <= MAX_NAME:
            raise refuse(f"the kind of a shard must have 1 to {MAX_NAME} characters")

    @property
    def usual_kind(self) -> str:
        """The kind that a shard has if none is named."""
        return WHOLE if self.tensors else PRODUCTS

    @property
    def items(self) -> tuple[int, ...]:
        """Its matrices or its tensors."""
        return self.matrices or self.tensors

    def form(self) -> dict[str, object]:
        """Its part of a layout's canonical form. A kind is named only where it is not the usual one."""
        form: dict[str, object] = {"matrices": self.matrices, "tensors": self.tensors}
        return form if self.kind == self.usual_kind else {**form, "kind": self.kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class SumTerms:
    """What shards under additive encryption have in common (docs/protocol.md, "Complete mode")."""

    profile: str
    """Additive parameters by name (`shelora.additive`)."""
    sketch_columns: int
    """k: columns of a matrix's sketch P, 1 to 4096; a small matrix has fewer."""
    sketch_rows: int
    """l: rows of its sketch N, k to 2 k."""
    noise: ClientNoise | None = None
    """How the sums hide a client; None: they do not."""
    figures: bool = False
    """Whether the last shard ends with what clients tell of their examples (`shelora.lora.figures`)."""

    def __post_init__(self) -> None:
        additive.profile(self.profile)
        if self.figures and self.noise is not None:
            raise refuse("sums that hide clients hold no figures of theirs")
        if not 1 <= self.sketch_columns <= MAX_SKETCH:
            raise refuse(f"sketch_columns must be 1 to {MAX_SKETCH}")
        if not self.sketch_columns <= self.sketch_rows <= 2 * self.sketch_columns:
            raise refuse("sketch_rows must be one to two times sketch_columns")

    @property
    def additive(self) -> AdditiveParameters:
        """The additive parameters named by `profile`."""
        return additive.profile(self.profile)

    @property
    def core(self) -> int:
        """s: rows of Φ and columns of Χ of every matrix, CORE_FACTOR times k, rounded up."""
        return math.ceil(CORE_FACTOR * self.sketch_columns)

    def columns(self, matrix: Matrix) -> int:
        """Columns of the sketch P of a matrix: more than its rank could be say nothing."""
        return min(self.sketch_columns, matrix.out_features, matrix.in_features)

    def rows(self, matrix: Matrix) -> int:
        """Rows of the sketch N of a matrix."""
        return min(self.sketch_rows, matrix.out_features, matrix.in_features)

    def corner(self, matrix: Matrix) -> tuple[int, int]:
        """Rows and columns of the sketch Z of a matrix: what of Φ ΔW Χ does not follow from P and N."""
        return self.core - self.rows(matrix), self.core - self.columns(matrix)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an update of a round looks like. Immutable; equal layouts have equal digests."""

    parameters: str
    key_id: bytes
    matrices: tuple[Matrix, ...]
    tensors: tuple[Tensor, ...]
    tiers: tuple[float, ...]
    encrypt_tensors: bool
    max_rank: int
    max_directions: int
    shards: tuple[Shard, ...]
    sums: SumTerms | None = None
    """Of shards under additive encryption; None if there are none."""
    clear_bits: int = 32
    """Bits in which clear values of factors travel, one of CLEAR_BITS."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(map(float, self.tiers)))  # 1 and 1.0 make one digest
        profile(self.parameters)
        if not 1 <= self.max_rank <= MAX_RANK:
            raise refuse(f"max_rank must be 1 to {MAX_RANK}")
        if self.max_directions < 1:
            raise refuse("max_directions must be at least 1")
        self._check_counts()
        if any(not 0 < b <= 1 for b in self.tiers) or list(self.tiers) != sorted(set(self.tiers)):
            raise refuse("tiers must be strictly increasing budgets in (0, 1]")
        if any(len(m.tier_columns) != len(self.tiers) for m in self.matrices):
            raise refuse("every matrix needs one entry of tier_columns a tier")
        for kind, items in (("matrix", self.matrices), ("tensor", self.tensors)):
            if len({item.name for item in items}) != len(items):
                raise refuse(f"two entries of the layout have the same {kind} name")
        if [i for s in self.shards for i in s.matrices] != list(range(len(self.matrices))) or [
            i for s in self.shards for i in s.tensors
        ] != list(range(len(self.tensors))):
            raise refuse("the shards must hold every matrix and tensor once, in order")
        if any(bool(s.matrices) == bool(s.tensors) for s in self.shards):
            raise refuse("a shard holds matrices or tensors, not both")
        if (self.encrypts or self.key_id) and len(self.key_id) != KEY_ID_BYTES:
            raise refuse(f"a layout that encrypts needs a key_id of {KEY_ID_BYTES} bytes")

    def _check_counts(self) -> None:
        if max(len(self.matrices), len(self.tensors)) > MAX_ITEMS or len(self.tiers) > MAX_TIERS:
            raise refuse(f"a layout has at most {MAX_ITEMS} matrices, as many tensors and {MAX_TIERS} tiers")
        if self.clear_bits not in CLEAR_BITS:
            raise refuse(f"clear_bits must be one of {CLEAR_BITS}")

    @property
    def encrypts(self) -> bool:
        """Whether anything in this layout is encrypted."""
        return bool(self.tiers) or (self.encrypt_tensors and bool(self.tensors))

    @property
    def ckks(self) -> CkksParameters:
        """The CKKS parameters named by `parameters`."""
        return profile(self.parameters)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: JSON with sorted keys, no spaces, bytes in hex."""
        form = {
            "format": FORMAT,
            **asdict(self),
            "key_id": self.key_id.hex(),
            "shards": [shard.form() for shard in self.shards],
        }
        if self.sums is None:
            del form["sums"]
        else:  # layouts without them were there before
            form["sums"] = {name: value for name, value in form["sums"].items() if value not in (None, False)}
        if self.clear_bits == CLEAR_BITS[-1]:  # layouts had no other before there was a choice
            del form["clear_bits"]
        return hashlib.sha256(json.dumps(form, sort_keys=True, separators=(",", ":")).encode()).digest()

    def shard(self, index: int) -> Shard:
        """The shard of that index; raises SHARD_UNKNOWN."""
        if not 0 <= index < len(self.shards):
            raise DomainError(
                Reason.SHARD_UNKNOWN, f"the layout has {len(self.shards)} shards, not a shard {index}"
            )
        return self.shards[index]


def even(length: int) -> int:
    """The length, made even."""
    return length + length % 2


def tiers_reaching(tiers: Sequence[float], budget: float) -> int:
    """How many of a round's tiers a client encrypts, so that they are at least its budget of the columns.

    Args:
        tiers: Budgets of the tiers, increasing.
        budget: Least share of columns that the client encrypts, 0 to 1.

    Raises: PROTECTION_REFUSED if all tiers together are less.
    """
    if not budget:
        return 0
    count = next((number for number, tier in enumerate(tiers, 1) if tier >= budget), None)
    if count is None:
        raise DomainError(
            Reason.PROTECTION_REFUSED,
            f"the round has {max(tiers, default=0.0):.3g} of the columns encrypted at most, and this client's budget "
            f"is {budget:g}: nothing was sent. Ask the federation's operator; lower budget if that is meant",
        )
    return count


def build_layout(
    *,
    parameters: str,
    key_id: bytes,
    matrices: Sequence[Matrix],
    tensors: Sequence[Tensor],
    tiers: Sequence[float],
    encrypt_tensors: bool,
    max_rank: int,
    max_directions: int,
    clear_bits: int = 32,
) -> Layout:
    """Lays matrices and tensors out in shards.

    A shard of matrices grows until its clear bytes pass SOFT_CLEAR_BYTES with its last ciphertext chunk well filled,
    and never past HARD_CLEAR_BYTES or MAX_CHUNKS unless one matrix alone does.
    """
    slots = profile(parameters).slots
    shards = [Shard(matrices=run) for run in _matrix_runs(matrices, slots, max_rank)]
    shards += [Shard(tensors=run) for run in _tensor_runs(tensors, slots)]
    return Layout(
        parameters=parameters,
        key_id=key_id,
        matrices=tuple(matrices),
        tensors=tuple(tensors),
        tiers=tuple(tiers),
        encrypt_tensors=encrypt_tensors,
        max_rank=max_rank,
        max_directions=max_directions,
        shards=tuple(shards),
        clear_bits=clear_bits,
    )


def _matrix_runs(matrices: Sequence[Matrix], slots: int, max_rank: int) -> Iterator[tuple[int, ...]]:
    run: list[int] = []
    clear_bytes = slot_count = 0
    for index, matrix in enumerate(matrices):
        matrix_bytes = FLOAT_BYTES * max_rank * (matrix.out_features + matrix.clear)
        too_large = clear_bytes + matrix_bytes > HARD_CLEAR_BYTES
        matrix_slots = sum(map(even, matrix.tier_columns))
        too_many = slot_count + matrix_slots > MAX_CHUNKS * slots
        if run and (
            too_large or too_many or (clear_bytes >= SOFT_CLEAR_BYTES and _well_filled(slot_count, slots))
        ):
            yield tuple(run)
            run, clear_bytes, slot_count = [], 0, 0
        run.append(index)
        clear_bytes += matrix_bytes
        slot_count += matrix_slots
    if run:
        yield tuple(run)


def _tensor_runs(tensors: Sequence[Tensor], slots: int) -> Iterator[tuple[int, ...]]:
    run: list[int] = []
    values = 0
    for index, tensor in enumerate(tensors):
        if run and values + even(tensor.size) > MAX_CHUNKS * slots:
            yield tuple(run)
            run, values = [], 0
        run.append(index)
        values += even(tensor.size)
    if run:
        yield tuple(run)


def _well_filled(slot_count: int, slots: int) -> bool:
    return slot_count % slots == 0 or (slot_count % slots) / slots >= WELL_FILLED
