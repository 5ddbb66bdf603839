"""An update that takes longer than its round's deadline, over a line that breaks again and again.

Real servers, real agents with real encryption, a real shaper. 758 MB at 1 Mbit/s take 1.7 hours, and the default
deadline is one hour; here both are divided by SCALE, and the rate is what it is. `make test-lines` prints the figures.
"""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.aggregation.uploads import BATCH_BYTES
from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Launch, Process
from shelora.federation import FederationSpec, RoundSpec
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.lines.line import SERVERS, Line, unavailable
from tests.lines.scale import FULL_BYTES, SCALE

pytestmark = pytest.mark.timeout(3600)

UP_KBIT, DOWN_KBIT = 1_000, 8_000
DEADLINE_S = int(RoundSpec().deadline_s / SCALE)
SILENCE_S = 3.0
SLEEP_S = 75.0
"""Longer than servers wait for a piece, than a member may be silent, and than calls are tried again."""
HEADERS = 1.08
"""Bytes on the line for a byte of the update: IP, TCP, TLS, HTTP/2; and all that an agent says beside it."""
POLL_S = 0.2
DEVICE = "device"
OTHERS = ("office-1", "office-2")
"""They have committed long before."""

Happens = Callable[["Scene"], Awaitable[None]]


class LineCluster(LocalCluster):
    """Agents of this cluster run on the device, or here."""

    line: Line

    def spawn(self, name: str, module: str, arguments: list[str], environment: Any) -> Process:
        command = [sys.executable, "-m", module, *arguments]
        if name == DEVICE:
            command = self.line.command(command)
        return self._processes.spawn(name, Launch(arguments=command, environment=environment))


@dataclass
class Scene:
    """What incidents befall."""

    cluster: LineCluster
    line: Line
    device: Process

    async def falls_silent(self) -> None:
        self.line.cut()
        await asyncio.sleep(SILENCE_S)
        self.line.mend()

    async def breaks(self) -> None:
        self.line.reset()

    async def moves(self) -> None:
        self.line.move()

    async def sleeps(self) -> None:
        self.device.popen.send_signal(signal.SIGSTOP)
        await asyncio.sleep(SLEEP_S)
        self.device.popen.send_signal(signal.SIGCONT)

    async def servers_restart(self) -> None:
        for name in self.cluster.servers:
            await asyncio.to_thread(self.cluster.restart, name)


CUTS: Sequence[Happens] = (
    Scene.falls_silent,
    Scene.breaks,
    Scene.moves,
    Scene.breaks,
    Scene.falls_silent,
    Scene.breaks,
    Scene.moves,
    Scene.falls_silent,
    Scene.breaks,
    Scene.falls_silent,
)
INCIDENTS: Sequence[tuple[float, Happens]] = (
    *((0.04 + 0.09 * index, cut) for index, cut in enumerate(CUTS)),
    (0.36, Scene.sleeps),
    (0.63, Scene.servers_restart),
)
"""By share of the update that has left the device."""
BROKEN = sum(what is not Scene.falls_silent for _, what in INCIDENTS) + 1
"""Transfers that an incident ends: a silence of seconds ends none; a restart of Redis and of aggregation, two."""


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    if why := unavailable():
        pytest.skip(f"no shaped network namespaces: {why}")
    with Line(up_kbit=UP_KBIT, down_kbit=DOWN_KBIT) as laid:
        yield laid


@pytest.fixture
def cluster(line: Line, tmp_path: Path) -> Iterator[LineCluster]:
    with LineCluster(
        tmp_path / "cluster", fixed_ports=False, workers=1, names=(SERVERS,), host=SERVERS
    ) as running:
        running.line = line
        yield running


def specification() -> FederationSpec:
    """Everything is a federation's default but the deadline, which is scaled as the update is."""
    return FederationSpec.model_validate(
        {
            "name": "lines",
            "training": {"base_model": "synthetic", "labels": [f"class-{index}" for index in range(8)]},
            "round": {"rounds": 1, "deadline_s": DEADLINE_S},
        }
    )


async def test_a_large_update_survives_a_bad_line_and_nothing_is_sent_twice(
    cluster: LineCluster, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async with federation(cluster) as connection:
        processes = [await started(cluster, name, tmp_path) for name in (*OTHERS, DEVICE)]
        log = processes[-1].log
        await until(lambda: said(log, "shard_upload"))
        before = line.up_bytes
        scene = Scene(cluster, line, processes[-1])
        for share, happens in sorted(INCIDENTS, key=lambda incident: incident[0]):
            await until(lambda share=share: line.up_bytes - before >= share * FULL_BYTES / SCALE)
            await happens(scene)
        await until(lambda: said(log, "update_committed"))
        up, down_before = line.up_bytes - before, line.down_bytes
        await until(lambda: all(process.popen.poll() is not None for process in processes))
        shown = await connection.get("lines")
    size = said(log, "update_committed")[0]["bytes_sent"]
    figures(capsys, size=size, up=up, down=line.down_bytes - down_before, shown=shown)

    assert [process.popen.returncode for process in processes] == [0, 0, 0]
    assert shown.phase == pb.PHASE_FINISHED, shown.failure
    (round_,) = training_rounds(shown)
    assert (round_.attempt, round_.update_count) == (1, 3), "nothing is lost, and no attempt is spent"
    assert len([event for event in said(log, "stage") if event["stage"] == "training"]) == 1
    stored = [event["shard"] for event in aggregated(cluster) if event["client_id"] == DEVICE]
    assert sorted(stored) == list(range(len(stored))), "no shard arrives whole twice"
    assert up <= HEADERS * size + BROKEN * BATCH_BYTES
    assert size == pytest.approx(FULL_BYTES / SCALE, rel=0.05)


@asynccontextmanager
async def federation(cluster: LineCluster) -> AsyncIterator[Any]:
    """Created and started; its agents end with it."""
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(specification().to_proto())
        await connection.start("lines")
        yield connection


async def started(cluster: LineCluster, name: str, folder: Path) -> Process:
    """An agent, enrolled."""
    home = folder / name
    await cluster.enrol_client("lines", name, home / "state")
    addresses = cluster.addresses
    config = {
        "federation": "lines",
        "client_id": name,
        "coordinator": addresses.coordinator,
        "aggregation": list(addresses.aggregation),
        "key_authority": addresses.key_authority,
        "state_dir": "state",
        "model": {"path": "synthetic"},
        "data": {"train": "synthetic.jsonl"},
        "lora": {"rank": 8},
    }
    path = home / "agent.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {"SHELORA_AGENT__LOG__JSON_LINES": "true", "SHELORA_AGENT__LOG__LEVEL": "DEBUG"}
    return cluster.spawn(name, "tests.lines.agents", [str(path)], environment)


def figures(
    capsys: pytest.CaptureFixture[str], *, size: int, up: int, down: int, shown: pb.Federation
) -> None:
    """What people want to know of such a line."""
    (round_,) = training_rounds(shown) or [pb.RoundSummary()]
    took_s = max((update.upload_s for update in round_.updates), default=0.0)
    rows = {
        "update": f"{size / 1e6:.1f} MB, 758 MB / {FULL_BYTES / size:.0f}",
        "deadline": f"{DEADLINE_S} s, the default / {SCALE}",
        "incidents": f"{len(CUTS)} cuts, a sleep of {SLEEP_S:.0f} s, a restart of every server",
        "sent in": f"{took_s:.0f} s; {UP_KBIT / 1000:g} Mbit/s need {8 * size / UP_KBIT / 1000:.0f} s",
        "on the line": f"{up / 1e6:.1f} MB up, {up / size - 1:.1%} beyond the update; {down / 1e6:.1f} MB down",
        "round": f"attempt {round_.attempt}, {round_.update_count} updates",
    }
    with capsys.disabled():
        print("", *(f"{name}: {value}" for name, value in rows.items()), sep="\n")  # noqa: T201 - the figures


def aggregated(cluster: LineCluster) -> list[dict[str, Any]]:
    """Shards that have arrived completely, also before a restart."""
    return said(cluster.servers["aggregation"].log, "shard_stored")


def said(log: Path, event: str) -> list[dict[str, Any]]:
    """Records of a log; a line that is just being written is left out."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.endswith("}")]
    return [json.loads(line) for line in lines if f'"event": "{event}"' in line]


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - other processes change it
        await asyncio.sleep(POLL_S)
