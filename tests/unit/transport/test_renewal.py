import asyncio
from datetime import timedelta
from types import SimpleNamespace

from shelora.transport.certificates import utc_now
from shelora.transport.enrolment import CERTIFICATE_EXPIRY, keep_renewed


class Keeper:
    """Holds a fresh identity, and tells when it was looked at."""

    def __init__(self):
        self.expires = utc_now() + timedelta(hours=24)
        self.looked = asyncio.Event()

    def read(self):
        self.looked.set()
        return SimpleNamespace(
            facts=SimpleNamespace(expires=self.expires, renewal_due=self.expires - timedelta(hours=8))
        )


async def test_a_process_that_keeps_its_certificate_renewed_says_when_it_expires():
    keeper = Keeper()
    task = asyncio.create_task(keep_renewed(keeper, obtain=None))
    await keeper.looked.wait()
    assert CERTIFICATE_EXPIRY._value.get() == keeper.expires.timestamp()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
