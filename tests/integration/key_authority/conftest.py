import secrets
import time
from functools import partial

import pytest

from services.common.revocations import Revocations
from services.key_authority.authority import Authority
from services.key_authority.ca import Issuer
from services.key_authority.custody import open_custody
from services.key_authority.enrolment import Enrolments
from services.key_authority.register import Register
from services.key_authority.revoking import Revoker
from services.key_authority.sealer import SealingKey
from services.key_authority.servicer import register
from tests.identities import SEALER, VAULT, TestAuthority


@pytest.fixture
def authority(tmp_path):
    return TestAuthority(tmp_path / "authority")


class Clock:
    """Unix milliseconds that a test can move."""

    def __init__(self):
        self.ahead_ms = 0

    def __call__(self):
        return time.time_ns() // 1_000_000 + self.ahead_ms


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def members(tmp_path):
    return Register(tmp_path / "register.sealed", SEALER, VAULT)


@pytest.fixture
def enrolments(members, authority, clock):
    return Enrolments(members, Issuer(authority.root), clock)


@pytest.fixture
def revocations():
    return Revocations(known=True)


@pytest.fixture
def revoker(members, custody, revocations, clock):
    return Revoker(members, custody.audit, revocations, clock)


@pytest.fixture
def key_authority(custody, revocations):
    return Authority(custody.vault, custody.audit, revocations)


@pytest.fixture
def add(key_authority, enrolments, revoker):
    """Adds the key authority's services to a server."""
    return partial(register, key_authority, enrolments, revoker)


@pytest.fixture
def sealing_key_file(tmp_path):
    path = tmp_path / "sealing.key"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32) + "\n")
    return path


@pytest.fixture
def sealing_key(sealing_key_file):
    return SealingKey.from_file(sealing_key_file)


@pytest.fixture
def custody(tmp_path, sealing_key):
    with open_custody(tmp_path / "data", sealing_key) as custody:
        yield custody
