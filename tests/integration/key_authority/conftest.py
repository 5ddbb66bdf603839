import secrets

import pytest

from services.key_authority.sealer import SealingKey


@pytest.fixture
def credential():
    return secrets.token_hex(32)


@pytest.fixture
def credential_file(tmp_path, credential):
    path = tmp_path / "agent.credential"
    path.touch(mode=0o600)
    path.write_text(credential + "\n")
    return path


@pytest.fixture
def sealing_key_file(tmp_path):
    path = tmp_path / "sealing.key"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32) + "\n")
    return path


@pytest.fixture
def sealing_key(sealing_key_file):
    return SealingKey.from_file(sealing_key_file)
