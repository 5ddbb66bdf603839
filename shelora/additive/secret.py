"""What encrypts, and what opens a sum. For client agents only; no server imports it.

Misuse that would give an update away is not representable: a `SecretKey` encrypts one update, shard after shard in
order, and then no more; so no public polynomial meets the same secret twice (docs/additive.md, "Never").

Non-guarantees:
- Summands carry no authentication; the dealing of their client signs their digests (`shelora.committee`).
- Python copies secrets and does not wipe them: a process that held one holds it until it ends.
- Nothing here is constant-time.
"""

from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from shelora.additive.codec import decode, encode
from shelora.additive.parameters import TAIL, VALUE_LIMIT, AdditiveParameters
from shelora.additive.ring import Multiplier, expand_public
from shelora.additive.sampler import Csprng, gaussian
from shelora.additive.wire import ShardShape, sum_planes, summand_header
from shelora.errors import DomainError, Reason

_BATCH: Final = 32
"""Chunks at a time: 256 KiB of each intermediate."""

FloatArray = npt.NDArray[np.float64]


class SecretKey:
    """A client's secret of one attempt: a Gaussian polynomial [N]. No `repr` of it, no pickle, no copy."""

    def __init__(self, parameters: AdditiveParameters, coefficients: npt.NDArray[np.int64]) -> None:
        """Use `draw`."""
        self.parameters = parameters
        self._coefficients = coefficients
        self._used = False

    @classmethod
    def draw(cls, parameters: AdditiveParameters, rng: Csprng) -> "SecretKey":
        """A fresh secret. Args: rng: the source, `Csprng.fresh()` outside tests."""
        sampler = gaussian(parameters.deviation)
        return cls(parameters, sampler.sample(rng, parameters.degree).astype(np.int64))

    @property
    def coefficients(self) -> npt.NDArray[np.int64]:
        """The secret itself [N], to be dealt to the committee and nothing else."""
        return self._coefficients.copy()

    def encryption(self, context: bytes, most_contributors: int, rng: Csprng) -> "Encryption":
        """The one encryption under this secret.

        Args:
            context: Digest of the round's context, which fixes the public polynomials.
            most_contributors: K_max of the round; it fixes the scale.
            rng: Source of the errors.

        Raises: DomainError: INVALID_ARGUMENT: most_contributors; SECRET_UNAVAILABLE: a second call.
        """
        scale = self.parameters.scale(most_contributors)
        if self._used:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "this secret has encrypted an update; draw another")
        self._used = True
        return Encryption(self.parameters, self._coefficients, context, scale, rng)

    def __repr__(self) -> str:
        return f"SecretKey({self.parameters.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled or copied")


class Encryption:
    """Encrypts the shards of one update, each once, in order. Made by `SecretKey.encryption`."""

    def __init__(
        self,
        parameters: AdditiveParameters,
        coefficients: npt.NDArray[np.int64],
        context: bytes,
        scale: int,
        rng: Csprng,
    ) -> None:
        self.parameters = parameters
        self.next_shard = 0
        """Index of the shard that `encrypt` makes next."""
        self._multiplier = Multiplier(parameters, coefficients)
        self._context = context
        self._scale = scale
        self._rng = rng

    def encrypt(self, values: FloatArray) -> bytes:
        """The next shard. Its index is spent even if this fails midway.

        Args: values: [n] float64, each within [-1, 1], n at least 1.
        Raises: DomainError: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE; the index is then not spent.
        """
        _check_values(values)
        shape = ShardShape(self.parameters, self.next_shard, len(values))
        self.next_shard += 1
        coefficients = np.empty((shape.chunks, self.parameters.degree), dtype=np.uint32)
        for first in range(0, shape.chunks, _BATCH):
            part = values[first * self.parameters.degree : (first + _BATCH) * self.parameters.degree]
            coefficients[first : first + _BATCH] = self._chunks(shape.shard, first, part)
        return summand_header(shape) + encode(self.parameters, coefficients.reshape(-1)[: shape.coefficients])

    def _chunks(self, shard: int, first: int, values: FloatArray) -> npt.NDArray[np.uint32]:
        """The kept bits of the chunks that hold `values`, [count, N]."""
        parameters = self.parameters
        count = parameters.chunks(len(values))
        total = self._multiplier.times(expand_public(parameters, self._context, shard, first, count))
        flat = total.reshape(-1)
        flat += gaussian(parameters.deviation).sample(self._rng, len(flat))
        flat[: len(values)] += np.rint(values * self._scale).astype(np.int64)
        flat += (1 << parameters.dropped_bits) >> 1  # so that dropping bits rounds
        kept = (flat >> np.int64(parameters.dropped_bits)) & np.int64((1 << parameters.kept_bits) - 1)
        return kept.astype(np.uint32).reshape(count, parameters.degree)

    def __repr__(self) -> str:
        return f"Encryption({self.parameters.name}, next shard {self.next_shard})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encryption is not pickled or copied")


class SumOpener:
    """Opens the sums of one round, under the sum S of its contributors' secrets."""

    def __init__(
        self,
        parameters: AdditiveParameters,
        secret_sum: npt.NDArray[np.int64],
        context: bytes,
        contributors: int,
        most_contributors: int,
        largest: float | None = None,
    ) -> None:
        """Opens under S [N], as `shelora.committee.reader` gives it.

        Args:
            parameters: Of the summands.
            secret_sum: S.
            context: Digest of the round's context.
            contributors: How many updates were added.
            most_contributors: K_max of the round.
            largest: Magnitude that no honest sum of values exceeds; `contributors` if each may be up to 1.

        Raises: DomainError: SHAPE_MISMATCH; SUM_UNREADABLE: a coefficient that no honest sum of secrets has.
        """
        check_secret_sum(parameters, secret_sum, contributors)
        self.parameters = parameters
        self._context = context
        self._contributors = contributors
        self._scale = parameters.scale(most_contributors)
        self._largest = contributors if largest is None else largest
        self._multiplier = Multiplier(parameters, secret_sum)

    def open(self, data: bytes | memoryview, shape: ShardShape) -> FloatArray:
        """The sum of the values over the contributors, [shape.values].

        Raises: DomainError: as `wire.sum_planes`; SUM_UNREADABLE: a coefficient is beyond what honest contributors
            can sum to. Then a summand, a secret or the sum itself is garbage, or of another round.
        """
        planes = sum_planes(data, shape, self._contributors)
        kept = np.zeros((shape.chunks, self.parameters.degree), dtype=np.uint32)
        kept.reshape(-1)[: shape.coefficients] = decode(self.parameters, planes, shape.coefficients)
        opened = np.empty(kept.shape)
        for first in range(0, shape.chunks, _BATCH):
            opened[first : first + _BATCH] = self._plain(shape.shard, first, kept[first : first + _BATCH])
        flat = opened.reshape(-1)[: shape.coefficients]
        self._check_guard(flat)
        return flat[: shape.values] / self._scale

    def _plain(self, shard: int, first: int, kept: npt.NDArray[np.uint32]) -> FloatArray:
        """Scaled sums with their noise, [count, N], centred."""
        parameters = self.parameters
        public = expand_public(parameters, self._context, shard, first, len(kept))
        value = (kept.astype(np.int64) << np.int64(parameters.dropped_bits)) - self._multiplier.times(public)
        half = parameters.modulus // 2
        centred = (((value + half) & (parameters.modulus - 1)) - half).astype(np.float64)
        # Rounding to a half upwards adds half a unit a contributor, if there is anything to round.
        if parameters.dropped_bits:
            centred -= self._contributors / 2
        return centred

    def _check_guard(self, plain: FloatArray) -> None:
        largest = self._largest * self._scale + self.parameters.noise_bound(self._contributors)
        if float(np.abs(plain).max()) > largest:
            raise DomainError(
                Reason.SUM_UNREADABLE,
                "the sum does not open: an update, a secret or the sum itself is garbage or of another round",
            )

    def __repr__(self) -> str:
        return f"SumOpener({self.parameters.name}, {self._contributors} contributors)"


def open_sum(
    parameters: AdditiveParameters,
    secret_sum: npt.NDArray[np.int64],
    context: bytes,
    shape: ShardShape,
    data: bytes | memoryview,
    contributors: int,
    most_contributors: int,
) -> FloatArray:
    """One shard of a sum; see `SumOpener`, which opens several."""
    opener = SumOpener(parameters, secret_sum, context, contributors, most_contributors)
    return opener.open(data, shape)


def check_secret_sum(
    parameters: AdditiveParameters, secret_sum: npt.NDArray[np.int64], contributors: int
) -> None:
    """Raises: DomainError: SHAPE_MISMATCH: not [N]; SUM_UNREADABLE: beyond 12 deviations of an honest sum."""
    if secret_sum.shape != (parameters.degree,):
        raise DomainError(Reason.SHAPE_MISMATCH, f"the sum of secrets must have {parameters.degree} values")
    largest = TAIL * parameters.deviation * np.sqrt(contributors)
    if float(np.abs(secret_sum).max()) > largest:
        raise DomainError(Reason.SUM_UNREADABLE, "the sum of secrets is too large: a dealer or a member lied")


def _check_values(values: FloatArray) -> None:
    if values.ndim != 1 or values.dtype != np.float64 or not len(values):
        raise DomainError(Reason.SHAPE_MISMATCH, "expected float64 values of shape [n], n at least 1")
    if not np.isfinite(values).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, "values must be finite")
    if float(np.abs(values).max()) > VALUE_LIMIT:
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, "values must lie within [-1, 1]")
