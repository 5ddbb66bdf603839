"""Uploads are refused before Redis is full, so that results and commits of what is stored still find room."""

from typing import Final

from shelora.errors import Reason, RetryLaterError

UPLOAD_SHARE: Final = 0.8
"""Share of Redis' memory that uploads may fill."""
POLL_S: Final = 2.0
"""Seconds between two looks at Redis' memory."""
RETRY_AFTER_S: Final = 15.0
"""Seconds after which a refused upload may be tried again: about what a round takes to be aggregated and deleted."""


class Watermark:
    """What Redis said last of its memory. Without a `maxmemory`, or before it is known, there is room."""

    def __init__(self) -> None:
        self._used = self._limit = 0

    def tell(self, used: int, limit: int) -> None:
        """Takes the bytes used and allowed; 0 allowed for any number."""
        self._used, self._limit = used, limit

    def require(self, size: int) -> None:
        """Raises STORE_FULL unless `size` more bytes of an upload leave room for what follows from it."""
        if self._limit and self._used + size > UPLOAD_SHARE * self._limit:
            raise store_full()


def store_full() -> RetryLaterError:
    """STORE_FULL, with the time to wait."""
    why = "the shard store is full; rounds that end make room. The operator can raise Redis' maxmemory"
    return RetryLaterError(Reason.STORE_FULL, why, RETRY_AFTER_S)
