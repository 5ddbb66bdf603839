import asyncio
import base64
import json
import os
import signal
import sys
import urllib.request
from contextlib import asynccontextmanager
from functools import partial

import pytest
from typer.testing import CliRunner

from services.key_authority.ca import RootFile
from services.key_authority.main import app
from services.shell.server import Ready
from shelora.cli.operator import create_token
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import enroll
from shelora.transport.identity import Role
from shelora.transport.tls import IdentityFolder, TlsCredentials
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
async def process(tmp_path):
    """A running key authority. Yields it and what its ready file says; kills it if the test has not stopped it."""
    ready_file = tmp_path / "ready.json"
    running = await started(
        "--data-dir",
        tmp_path / "data",
        "--log-level=DEBUG",
        "--log-json",
        SHELORA_KEY_AUTHORITY_OPERATOR_TOKEN_FILE=str(tmp_path / "operator.token"),
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


async def enrolled(ready, tmp_path):
    """The operator by the token that the process left, then a coordinator and a client by the operator's tokens."""
    text = (tmp_path / "operator.token").read_text()
    folders = {name: tmp_path / "identities" / name for name in ("operator", "coordinator", "ward")}
    await enroll(text, ready.enrolment_address, folders["operator"])
    operator = TlsCredentials(IdentityFolder(folders["operator"]))
    makes = partial(create_token, ready.address, operator)
    tokens = [text]
    for name, wanted in (
        ("coordinator", makes(Role.COORDINATOR, names=("localhost",))),
        ("ward", makes(Role.CLIENT, federation="clinic", client="ward-7")),
    ):
        tokens.append((await wanted).token)
        await enroll(tokens[-1], ready.enrolment_address, folders[name])
    return {name: TlsCredentials(IdentityFolder(folder)) for name, folder in folders.items()}, tokens


async def secrets_from(address, identities):
    async with (
        open_channel(address, identities["coordinator"]) as coordinator,
        open_channel(address, identities["ward"]) as ward,
    ):
        await call(pb_grpc.KeyAuthorityStub(coordinator).OpenEpoch, OPEN)
        return await call(pb_grpc.KeyAuthorityStub(ward).GetEpochSecrets, GET)


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return response.read().decode()


def spellings(secret):
    """Ways in which a secret could get into a text."""
    return [secret.hex(), base64.b64encode(secret).decode()[:32], repr(secret)[2:-1], str(list(secret))[1:-1]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_serves_then_drains_and_leaves_no_secret_in_logs_or_metrics(tmp_path, number):
    async with process(tmp_path) as (running, ready):
        assert ready.pid == running.pid
        identities, tokens = await enrolled(ready, tmp_path)
        secrets = await secrets_from(ready.address, identities)
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
    for secret in (secrets.ckks_secret_key[38:], secrets.obfuscation_secret):
        for spelling in spellings(secret):
            assert spelling not in stderr.decode()
            assert spelling not in metrics
    private = [(tmp_path / "identities" / name / "identity.pem").read_text() for name in identities]
    for hidden in (*tokens, *(line for text in private for line in text.splitlines() if len(line) > 40)):
        assert hidden.strip() not in stderr.decode()


async def test_a_restarted_process_releases_the_same_secrets(tmp_path):
    released, identities = [], None
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with process(tmp_path) as (running, ready):
            if identities is None:
                identities, _ = await enrolled(ready, tmp_path)
            released.append(await secrets_from(ready.address, identities))
            running.send_signal(end)
            await running.wait()
        (tmp_path / "ready.json").unlink(missing_ok=True)
    assert released[0] == released[1]


async def test_a_refused_configuration_is_one_line_with_the_remedy_and_exit_code_2(tmp_path):
    RootFile(tmp_path / "authority").load_or_create()
    path = tmp_path / "authority" / "authority.pem"
    path.chmod(0o644)
    running = await started("--data-dir", tmp_path)
    _, stderr = await running.communicate()
    assert running.returncode == 2
    assert stderr.decode().splitlines() == [f"key-authority: others can read {path}; run: chmod 600 {path}"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "SHELORA_KEY_AUTHORITY_DATA_DIR"),
        (["--name", "not a name"], "neither a DNS name nor an IP address"),
        (["--listen", "nowhere"], "host:port"),
        (["--log-level", "loud"], "SHELORA_KEY_AUTHORITY_LOG_LEVEL"),
        (["--operator-token-file", "/nowhere/token"], "operator_token_file"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said(tmp_path, capfd, flags, complaint):
    given = ["--data-dir", tmp_path / "data", "--metrics-port", "-1"]
    result = CliRunner().invoke(app, list(map(str, [*given, *flags] if flags else [])))
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_the_help_teaches_how_to_start():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for lesson in ("shelora enroll", "--operator-token-file", "SHELORA_KEY_AUTHORITY_DATA_DIR"):
        assert lesson in result.stdout
