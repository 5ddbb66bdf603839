import time

import pytest

from services.key_authority.ca import Issuer
from services.key_authority.enrolment import Enrolments
from services.key_authority.register import Register
from tests.identities import TestAuthority


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
def enrolments(tmp_path, authority, clock):
    return Enrolments(Register(tmp_path / "register.sqlite"), Issuer(authority.root), clock)
