"""Errors survive what libraries do to them."""

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from services.key_authority.sealer import SealBrokenError, WrongSealingKeyError
from shelora.audit import AuditBrokenError, AuditTornError
from shelora.errors import DomainError, Reason, RetryLaterError
from shelora.federation import FederationSpec
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import RevokedError

ERRORS = [
    DomainError(Reason.DATA_INVALID, "row 3"),
    RetryLaterError(Reason.STORE_UNAVAILABLE, "full", 5.0),
    RevokedError(Identity(Role.CLIENT, "films", "a")),
    AuditBrokenError(3, "is not a record"),
    AuditTornError(4, 17),
    WrongSealingKeyError(b"\1", b"\2"),
    SealBrokenError("damaged"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_copy_of_an_error_says_what_the_error_says(error: DomainError) -> None:
    for other in (copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), vars(other), other.args) == (str(error), vars(error), error.args)


def test_an_error_of_a_worker_process_reaches_who_waits_for_it() -> None:
    """A pool that cannot hand one on waits for ever: a bench hung so."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(FederationSpec.from_yaml, Path("/nowhere.yaml")).exception(timeout=120)
    assert isinstance(error, DomainError)
    assert error.reason is Reason.CONFIGURATION_INVALID
    assert "/nowhere.yaml" in error.message
