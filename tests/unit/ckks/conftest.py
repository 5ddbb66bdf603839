import numpy as np
import pytest

from shelora.ckks import INSECURE_TOY
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey


@pytest.fixture(scope="session")
def key():
    return SecretKey.generate(INSECURE_TOY)


@pytest.fixture(scope="session")
def encryptor(key):
    return Encryptor(key)


@pytest.fixture(scope="session")
def decryptor(key):
    return Decryptor(key)


@pytest.fixture
def rng():
    return np.random.default_rng(20251)
