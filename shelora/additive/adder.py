"""Sums of encrypted shards: all that aggregation does. It needs no secret and imports nothing that holds one."""

from shelora.additive.codec import PlaneSum, encode
from shelora.additive.parameters import MAX_CONTRIBUTORS
from shelora.additive.wire import ShardShape, partial_planes, sum_header, summand_planes
from shelora.errors import DomainError, Reason


def validate_shard(data: bytes | memoryview, expected: ShardShape) -> None:
    """Checks all that can be wrong with one client's shard, and keeps nothing. Raises: as `wire.summand_planes`."""
    summand_planes(data, expected)


class Adder:
    """Adds the shards of one index over clients, in 5 bytes a value whatever their number."""

    def __init__(self, shape: ShardShape) -> None:
        self.shape = shape
        self.contributors = 0
        self._sum = PlaneSum(shape.parameters, shape.coefficients)

    def add(self, data: bytes | memoryview) -> None:
        """Adds one client's shard; a refused one leaves the sum as it was.

        Raises: DomainError: as `wire.summand_planes`; LIMIT_REACHED: more than MAX_CONTRIBUTORS.
        """
        planes = summand_planes(data, self.shape)
        if self.contributors >= MAX_CONTRIBUTORS:
            raise DomainError(Reason.LIMIT_REACHED, f"a sum has at most {MAX_CONTRIBUTORS} contributors")
        self._sum.add(planes)
        self.contributors += 1

    def merge(self, data: bytes | memoryview) -> None:
        """Adds another adder's sum; a refused one leaves the sum as it was.

        Raises: DomainError: as `wire.partial_planes`; LIMIT_REACHED: more than MAX_CONTRIBUTORS.
        """
        planes, contributors = partial_planes(data, self.shape)
        if self.contributors + contributors > MAX_CONTRIBUTORS:
            raise DomainError(Reason.LIMIT_REACHED, f"a sum has at most {MAX_CONTRIBUTORS} contributors")
        self._sum.add(planes)
        self.contributors += contributors

    def finish(self) -> bytes:
        """The sum so far: the same bytes in whatever order the shards came.

        Raises: DomainError(TOO_FEW_CONTRIBUTORS): fewer than two; the sum of one is that one.
        """
        if self.contributors < 2:
            raise DomainError(Reason.TOO_FEW_CONTRIBUTORS, "a sum needs the shards of at least two clients")
        return sum_header(self.shape, self.contributors) + encode(
            self.shape.parameters, self._sum.coefficients()
        )
