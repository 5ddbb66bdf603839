import asyncio
from datetime import timedelta
from types import SimpleNamespace

import pytest

from shelora.errors import DomainError, Reason
from shelora.transport.certificates import utc_now
from shelora.transport.enrolment import CERTIFICATE_EXPIRY, keep_renewed
from shelora.transport.tls import IdentityFolder


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


def test_an_identity_that_cannot_be_written_is_refused_by_a_name_so_that_renewal_goes_on(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DomainError, match="Not a directory; make room there") as refused:
        IdentityFolder(tmp_path / "file" / "identity").write(None)
    assert refused.value.reason is Reason.DISK_UNAVAILABLE
