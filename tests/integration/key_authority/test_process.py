import asyncio
import base64
import json
import os
import signal
import sys
import urllib.request
from contextlib import asynccontextmanager

import pytest
from typer.testing import CliRunner

from services.key_authority.main import app
from services.shell.server import Ready
from shelora.transport.channel import call, open_channel
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc

OPEN = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters="standard")
GET = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="ward-7")


async def started(*flags, **environment):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.key_authority.main",
        *map(str, flags),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_VERBOSITY": "ERROR", **environment},
    )


@asynccontextmanager
async def process(tmp_path, credential_file, sealing_key_file, **environment):
    """A running key authority. Yields it and what its ready file says; kills it if the test has not stopped it."""
    ready_file = tmp_path / "ready.json"
    running = await started(
        "--data-dir",
        tmp_path / "data",
        "--log-level=DEBUG",
        "--log-json",
        SHELORA_KEY_AUTHORITY_AGENT_CREDENTIAL_FILE=str(credential_file),
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


async def secrets_from(address, credential):
    async with open_channel(address) as channel:
        stub = pb_grpc.KeyAuthorityStub(channel)
        await call(stub.OpenEpoch, OPEN)
        return await call(stub.GetEpochSecrets, GET, metadata=[("authorization", f"Bearer {credential}")])


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return response.read().decode()


def spellings(secret):
    """Ways in which a secret could get into a text."""
    return [secret.hex(), base64.b64encode(secret).decode()[:32], repr(secret)[2:-1], str(list(secret))[1:-1]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_serves_then_drains_and_leaves_no_secret_in_logs_or_metrics(
    tmp_path, credential_file, sealing_key_file, credential, number
):
    async with process(tmp_path, credential_file, sealing_key_file) as (running, ready):
        assert ready.pid == running.pid
        secrets = await secrets_from(ready.address, credential)
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
    assert len(folder) == 4
    for secret in (
        secrets.ckks_secret_key[38:],
        secrets.obfuscation_secret,
        bytes.fromhex(credential),
        sealing_key,
    ):
        assert not any(secret[:12] in content for content in folder)
        for spelling in spellings(secret):
            assert spelling not in stderr.decode()
            assert spelling not in metrics
            assert not any(spelling.encode() in content for content in folder)


async def test_a_restarted_process_releases_the_same_secrets(
    tmp_path, credential_file, sealing_key_file, credential
):
    released = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with process(tmp_path, credential_file, sealing_key_file) as (running, ready):
            released.append(await secrets_from(ready.address, credential))
            running.send_signal(end)
            await running.wait()
        (tmp_path / "ready.json").unlink(missing_ok=True)
    assert released[0] == released[1]


async def test_a_refused_configuration_is_one_line_with_the_remedy_and_exit_code_2(tmp_path, credential_file):
    credential_file.chmod(0o644)
    flags = ["--data-dir", tmp_path, "--agent-credential-file", credential_file]
    running = await started(*flags)
    _, stderr = await running.communicate()
    assert running.returncode == 2
    assert stderr.decode().splitlines() == [
        f"key-authority: the agent credential is open to other users; run: chmod 600 {credential_file}"
    ]


async def refused(*flags, **environment):
    """What a start with these flags says; it must end with exit code 2 and one line."""
    running = await started(*flags, **environment)
    stdout, stderr = await running.communicate()
    assert (running.returncode, stdout) == (2, b"")
    (line,) = stderr.decode().splitlines()
    return line


async def test_a_start_without_with_two_or_with_a_wrong_sealing_key_is_refused(
    tmp_path, credential_file, sealing_key_file, credential
):
    async with process(tmp_path, credential_file, sealing_key_file) as (_, ready):
        await secrets_from(ready.address, credential)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    flags = ["--data-dir", tmp_path / "data", "--agent-credential-file", credential_file]
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


async def test_the_sealing_key_may_come_from_the_environment(
    tmp_path, credential_file, sealing_key_file, credential
):
    async with process(tmp_path, credential_file, sealing_key_file) as (_, ready):
        first = await secrets_from(ready.address, credential)
    (tmp_path / "ready.json").unlink(missing_ok=True)
    hexadecimal = sealing_key_file.read_text().strip()
    async with process(tmp_path, credential_file, None, SHELORA_KEY_AUTHORITY_SEALING_KEY=hexadecimal) as (
        _,
        ready,
    ):
        assert await secrets_from(ready.address, credential) == first


async def test_a_second_process_on_the_same_folder_is_refused(tmp_path, credential_file, sealing_key_file):
    async with process(tmp_path, credential_file, sealing_key_file):
        line = await refused(
            *("--data-dir", tmp_path / "data"),
            *("--agent-credential-file", credential_file),
            *("--sealing-key-file", sealing_key_file),
        )
    assert f"another process uses {tmp_path / 'data'}" in line


async def test_a_damaged_audit_log_is_refused_with_the_broken_record_and_the_remedy(
    tmp_path, credential_file, sealing_key_file, credential
):
    async with process(tmp_path, credential_file, sealing_key_file) as (_, ready):
        await secrets_from(ready.address, credential)
    log = tmp_path / "data" / "audit.log"
    log.write_bytes(log.read_bytes().replace(b"ward-7", b"ward-8"))
    line = await refused(
        *("--data-dir", tmp_path / "data"),
        *("--agent-credential-file", credential_file),
        *("--sealing-key-file", sealing_key_file),
    )
    assert "record 2 (line 3) was changed" in line
    assert "replace-audit-log" in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "SHELORA_KEY_AUTHORITY_DATA_DIR"),
        (["--listen", "0.0.0.0:0"], "allow_plaintext"),
        (["--listen", "nowhere"], "host:port"),
        (["--log-level", "loud"], "SHELORA_KEY_AUTHORITY_LOG_LEVEL"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said(
    tmp_path, credential_file, sealing_key_file, flags, complaint
):
    given = [
        "--data-dir",
        tmp_path / "data",
        "--agent-credential-file",
        credential_file,
        "--sealing-key-file",
        sealing_key_file,
        "--metrics-port",
        "-1",
    ]
    arguments = [*given, *flags] if flags else ["--agent-credential-file", credential_file]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_the_help_teaches_how_to_start():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for lesson in (
        "make-sealing-key",
        "openssl rand -hex 32",
        "--agent-credential-file",
        "SHELORA_KEY_AUTHORITY_DATA_DIR",
    ):
        assert lesson in result.stdout
