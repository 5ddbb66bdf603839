import secrets

import pytest


@pytest.fixture
def credential():
    return secrets.token_hex(32)


@pytest.fixture
def credential_file(tmp_path, credential):
    path = tmp_path / "agent.credential"
    path.touch(mode=0o600)
    path.write_text(credential + "\n")
    return path
