import pytest

from services.aggregation.watermark import RETRY_AFTER_S, Watermark
from shelora.errors import Reason, RetryLaterError


@pytest.mark.parametrize(("used", "limit", "size"), [(0, 0, 10**12), (70, 100, 10), (0, 100, 80)])
def test_an_upload_that_leaves_room_for_its_result_is_accepted(used, limit, size):
    watermark = Watermark()
    watermark.tell(used, limit)
    watermark.require(size)


@pytest.mark.parametrize(("used", "size"), [(70, 11), (100, 0), (0, 81)])
def test_an_upload_that_would_fill_redis_is_refused_with_the_time_to_wait(used, size):
    watermark = Watermark()
    watermark.tell(used, 100)
    with pytest.raises(RetryLaterError, match="maxmemory") as refused:
        watermark.require(size)
    assert (refused.value.reason, refused.value.retry_after_s) == (Reason.STORE_FULL, RETRY_AFTER_S)
