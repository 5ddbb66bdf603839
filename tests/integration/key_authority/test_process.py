import asyncio
import base64
import json
import os
import re
import signal
import sys
import urllib.request
from contextlib import asynccontextmanager

import pytest
from typer.testing import CliRunner

from services.common.server import Ready
from services.key_authority.custody import read_root
from services.key_authority.main import app
from services.key_authority.sealer import SealingKey
from shelora.obfuscation import SECRET_BYTES
from shelora.operator import create_token
from shelora.transport.certificates import key_to_pem
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import Token, enroll
from shelora.transport.identity import Role
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc
from tests.identities import LOCAL

OPEN = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters="standard")
GET = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="ward-7")


async def started(*flags, stderr=asyncio.subprocess.PIPE, **environment):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.key_authority.main",
        *map(str, flags),
        stderr=stderr,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_VERBOSITY": "ERROR", **environment},
    )


@asynccontextmanager
async def process(tmp_path, sealing_key_file, stderr=asyncio.subprocess.PIPE, **environment):
    """A running key authority. Yields it and what its ready file says; kills it if the test has not stopped it."""
    ready_file = tmp_path / "ready.json"
    running = await started(
        "--data-dir",
        tmp_path / "data",
        "--log-level=DEBUG",
        "--log-json",
        stderr=stderr,
        SHELORA_KEY_AUTHORITY_OPERATOR_TOKEN_FILE=str(tmp_path / "operator.token"),
        **({"SHELORA_KEY_AUTHORITY_SEALING_KEY_FILE": str(sealing_key_file)} if sealing_key_file else {}),
        **environment,
        SHELORA_KEY_AUTHORITY_READY_FILE=str(ready_file),
    )
    try:
        while (ready := Ready.read(ready_file)) is None:
            assert running.returncode is None, await running.stderr.read()
            await asyncio.sleep(0.02)
        yield running, ready
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def secrets_from(tmp_path, ready):
    """The secrets of an epoch, as its coordinator opens it and a client fetches it; they enrol on their first call."""
    coordinator, ward = [tmp_path / "members" / name for name in ("coordinator", "ward-7")]
    if not ward.exists():
        operator = tmp_path / "members" / "operator"
        await enroll((tmp_path / "operator.token").read_text().strip(), ready.enrolment_address, operator)
        mine = TlsCredentials(IdentityFolder(operator))
        for_server = await create_token(ready.address, mine, Role.COORDINATOR, names=LOCAL)
        await enroll(for_server.token, ready.enrolment_address, coordinator)
        for_client = await create_token(
            ready.address, mine, Role.CLIENT, federation="clinic", client="ward-7"
        )
        await enroll(for_client.token, ready.enrolment_address, ward)
    async with open_channel(ready.address, TlsCredentials(IdentityFolder(coordinator))) as channel:
        await call(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, OPEN)
    async with open_channel(ready.address, TlsCredentials(IdentityFolder(ward))) as channel:
        return await call(pb_grpc.KeyAuthorityStub(channel).GetEpochSecrets, GET)


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return response.read().decode()


def spellings(secret):
    """Ways in which a secret could get into a text."""
    return [secret.hex(), base64.b64encode(secret).decode()[:32], repr(secret)[2:-1], str(list(secret))[1:-1]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_serves_then_drains_and_leaves_no_secret_in_logs_or_metrics(
    tmp_path, sealing_key_file, number
):
    async with process(tmp_path, sealing_key_file) as (running, ready):
        assert ready.pid == running.pid
        secrets = await secrets_from(tmp_path, ready)
        metrics = await asyncio.to_thread(scraped, ready.metrics_port)
        running.send_signal(number)
        stdout, stderr = await running.communicate()
    assert running.returncode == 0
    assert stdout == b""
    records = [json.loads(line) for line in stderr.decode().splitlines()]
    events = [record["event"] for record in records]
    assert [event for event in events if event in {"serving", "key_released", "draining"}] == [
        "serving",
        "key_released",
        "draining",
    ]
    assert {record["process"] for record in records} == {"key-authority"}
    assert "shelora_key_releases_total 1.0" in metrics
    assert not (tmp_path / "ready.json").exists()
    sealing_key = bytes.fromhex(sealing_key_file.read_text())
    folder = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len(folder) == 6
    assert not any(b"PRIVATE" in content or b"CERTIFICATE" in content for content in folder)
    root = read_root(tmp_path / "data", SealingKey(sealing_key))
    pem = key_to_pem(root.key).splitlines()[2]
    assert not any(pem in content for content in [*folder, stderr]), "the root's key is in the clear"
    token = Token.parse((tmp_path / "operator.token").read_text().strip())
    assert token.encoded not in stderr.decode()
    members = [path.read_bytes() for path in (tmp_path / "members").rglob("identity.pem")]
    assert len(members) == 3
    for line in (line for content in members for line in content.splitlines() if len(line) > 40):
        assert line not in stderr
    for secret in (
        secrets.ckks_secret_key[38:],
        secrets.obfuscation_secret,
        root.key.private_numbers().private_value.to_bytes(32, "big"),
        token.secret,
        sealing_key,
    ):
        assert not any(secret[:12] in content for content in folder)
        for spelling in spellings(secret):
            assert spelling not in stderr.decode()
            assert spelling not in metrics
            assert not any(spelling.encode() in content for content in folder)


async def test_a_restarted_process_releases_the_same_secrets(tmp_path, sealing_key_file):
    released = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with process(tmp_path, sealing_key_file) as (running, ready):
            released.append(await secrets_from(tmp_path, ready))
            running.send_signal(end)
            await running.wait()
        (tmp_path / "ready.json").unlink(missing_ok=True)
    assert released[0] == released[1]


async def test_a_refused_configuration_is_one_line_with_the_remedy_and_exit_code_2(
    tmp_path, sealing_key_file
):
    sealing_key_file.chmod(0o644)
    line = await refused("--data-dir", tmp_path / "data", "--sealing-key-file", sealing_key_file)
    assert line == f"key-authority: the sealing key is open to other users; run: chmod 600 {sealing_key_file}"


@pytest.mark.parametrize("log", ["full disk", "closed pipe"])
async def test_a_log_that_cannot_be_written_breaks_no_call_and_its_records_are_counted(
    tmp_path, sealing_key_file, log
):
    if log == "full disk":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        nobody_reads, stderr = os.pipe()
        os.close(nobody_reads)
    async with process(tmp_path, sealing_key_file, stderr=stderr) as (running, ready):
        os.close(stderr)
        secrets = await secrets_from(tmp_path, ready)
        assert len(secrets.obfuscation_secret) == SECRET_BYTES
        metrics = await asyncio.to_thread(scraped, ready.metrics_port)
        running.send_signal(signal.SIGTERM)
        await running.communicate()
    assert running.returncode == 0
    (lost,) = re.findall(r"^shelora_log_records_lost_total (\S+)", metrics, re.MULTILINE)
    assert float(lost) > 0
    assert not re.findall(r'code="INTERNAL"[^}]*} [^0]', metrics)


async def test_an_operator_token_that_cannot_be_left_is_said(tmp_path, sealing_key_file):
    line = await refused(
        *("--data-dir", tmp_path / "data"),
        *("--sealing-key-file", sealing_key_file),
        *("--operator-token-file", tmp_path / "absent" / "operator.token"),
        *("--log-level", "ERROR"),
    )
    assert "operator_token_file" in line
    assert "No such file" in line


async def test_a_damaged_root_of_the_certificate_authority_is_refused_and_left(tmp_path, sealing_key_file):
    async with process(tmp_path, sealing_key_file):
        pass
    (path,) = (tmp_path / "data" / "authority").iterdir()
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    line = await refused(
        *("--data-dir", tmp_path / "data"),
        *("--sealing-key-file", sealing_key_file),
        *("--log-level", "ERROR"),
    )
    assert f"{path} is damaged" in line
    assert "restore it from a backup" in line
    assert path.read_bytes() == damaged


async def refused(*flags, **environment):
    """What a start with these flags says; it must end with exit code 2 and one line."""
    running = await started(*flags, **environment)
    stdout, stderr = await running.communicate()
    assert (running.returncode, stdout) == (2, b"")
    (line,) = stderr.decode().splitlines()
    return line


async def test_a_start_without_with_two_or_with_a_wrong_sealing_key_is_refused(tmp_path, sealing_key_file):
    async with process(tmp_path, sealing_key_file) as (_, ready):
        await secrets_from(tmp_path, ready)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    flags = ["--data-dir", tmp_path / "data"]
    assert "no sealing key is given: make one with `shelora-key-authority make-sealing-key" in await refused(
        *flags
    )
    wrong = {"SHELORA_KEY_AUTHORITY_SEALING_KEY": "ab" * 32}
    line = await refused(*flags, **wrong)
    assert "wrong sealing key" in line
    assert "ab" * 32 not in line
    file = ["--sealing-key-file", sealing_key_file]
    assert "two sealing keys are given" in await refused(*flags, *file, **wrong)
    assert "64 lower-case hexadecimal" in await refused(*flags, SHELORA_KEY_AUTHORITY_SEALING_KEY="")
    sealing_key_file.chmod(0o640)
    assert f"chmod 600 {sealing_key_file}" in await refused(*flags, *file)
    inside = tmp_path / "data" / "sealing.key"
    assert "lies in the folder it seals" in await refused(*flags, "--sealing-key-file", inside)
    assert before == {path: path.read_bytes() for path in before}


async def test_the_sealing_key_may_come_from_the_environment(tmp_path, sealing_key_file):
    async with process(tmp_path, sealing_key_file) as (_, ready):
        first = await secrets_from(tmp_path, ready)
    (tmp_path / "ready.json").unlink(missing_ok=True)
    hexadecimal = sealing_key_file.read_text().strip()
    async with process(tmp_path, None, SHELORA_KEY_AUTHORITY_SEALING_KEY=hexadecimal) as (
        _,
        ready,
    ):
        assert await secrets_from(tmp_path, ready) == first


async def test_a_second_process_on_the_same_folder_is_refused(tmp_path, sealing_key_file):
    async with process(tmp_path, sealing_key_file):
        line = await refused(
            *("--data-dir", tmp_path / "data"),
            *("--sealing-key-file", sealing_key_file),
        )
    assert f"another process uses {tmp_path / 'data'}" in line


async def test_a_damaged_audit_log_is_refused_with_the_broken_record_and_the_remedy(
    tmp_path, sealing_key_file
):
    async with process(tmp_path, sealing_key_file) as (_, ready):
        await secrets_from(tmp_path, ready)
    log = tmp_path / "data" / "audit.log"
    log.write_bytes(log.read_bytes().replace(b"ward-7", b"ward-8"))
    line = await refused(
        *("--data-dir", tmp_path / "data"),
        *("--sealing-key-file", sealing_key_file),
    )
    assert "record 2 (line 3) was changed" in line
    assert "replace-audit-log" in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "SHELORA_KEY_AUTHORITY_DATA_DIR"),
        (["--certificate-lifetime-s", "1"], "SHELORA_KEY_AUTHORITY_CERTIFICATE_LIFETIME_S"),
        (["--name", "not a name"], "neither a DNS name nor an IP address"),
        (["--listen", "nowhere"], "host:port"),
        (["--log-level", "loud"], "SHELORA_KEY_AUTHORITY_LOG_LEVEL"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said(tmp_path, sealing_key_file, flags, complaint):
    given = [
        "--data-dir",
        tmp_path / "data",
        "--sealing-key-file",
        sealing_key_file,
        "--metrics-port",
        "-1",
    ]
    arguments = [*given, *flags] if flags else ["--sealing-key-file", sealing_key_file]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_the_help_teaches_how_to_start():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for lesson in (
        "make-sealing-key",
        "--sealing-key-file",
        "--operator-token-file",
        "shelora enroll",
        "shelora token create",
        "SHELORA_KEY_AUTHORITY_DATA_DIR",
    ):
        assert lesson in result.stdout
