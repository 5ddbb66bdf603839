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
async def process(tmp_path, credential_file, sealing_key_file):
    """A running key authority. Yields it and what its ready file says; kills it if the test has not stopped it."""
    ready_file = tmp_path / "ready.json"
    running = await started(
        "--data-dir",
        tmp_path / "data",
        "--log-level=DEBUG",
        "--log-json",
        SHELORA_KEY_AUTHORITY_AGENT_CREDENTIAL_FILE=str(credential_file),
        SHELORA_KEY_AUTHORITY_SEALING_KEY_FILE=str(sealing_key_file),
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
