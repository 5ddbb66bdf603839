"""The instruments of `bench.peers`: what they say of processes, of connections, and of times."""

import json
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from bench.peers.ours import trained
from bench.peers.outcome import SERVERS, Outcome, Span, Times, evaluated, noted, table
from bench.peers.peer import certified
from bench.peers.usage import Usage
from bench.peers.wire import counted
from shelora.v1 import coordinator_pb2 as pb

MEGABYTE = 10**6
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "x = bytearray(40_000_000); print(len(x), flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
sys.stdin.readline()
child.communicate(b"\\n")
print("reaped", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def parent():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.communicate("\n")


def test_a_role_has_the_memory_and_the_time_of_all_that_it_started(parent):
    usage = Usage()
    usage.add(SERVERS, parent.pid)
    usage.sample()
    alive = usage.spent(SERVERS)
    assert alive.peak_bytes > 40 * MEGABYTE, "the child's memory counts"
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "reaped\n"
    usage.sample()
    after = usage.spent(SERVERS)
    assert after.peak_bytes == alive.peak_bytes, "the most counts"
    assert after.cpu_s >= alive.cpu_s, "and the time of a child that has ended stays"


def test_who_is_not_of_a_role_does_not_count(parent):
    usage = Usage()
    usage.add(SERVERS, parent.pid)
    usage.add("nobody", 2**22 + 1)
    usage.sample()
    assert usage.spent("nobody").peak_bytes == 0


def test_relays_count_both_directions_and_pass_on_the_end_of_one():
    with socket.create_server(("127.0.0.1", 0)) as server, counted() as wire:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                received = b"".join(iter(lambda: connection.recv(65536), b""))
                connection.sendall(received[:1000])

        thread = threading.Thread(target=serve)
        thread.start()
        host, _, port = wire.front(f"127.0.0.1:{server.getsockname()[1]}").rpartition(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(bytes(300_000))
            caller.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: caller.recv(65536), b""))
        thread.join()
        assert len(answer) == 1000
        assert (wire.up, wire.down) == (300_000, 1000)


TIMES = Times(
    began=100.0,
    ended=190.0,
    trained={
        1: [Span(120.0, 130.0), Span(121.0, 134.0)],
        2: [Span(140.0, 150.0), Span(139.0, 152.0)],
        3: [Span(155.0, 166.0), Span(160.0, 170.0)],
    },
)


def test_a_rounds_overhead_is_what_lies_between_trainings():
    assert TIMES.start_s == 20
    assert TIMES.training_s == pytest.approx((13 + 13 + 11) / 3)
    assert TIMES.overhead_s == pytest.approx(((152 - 134 - 13) + (170 - 152 - 11)) / 2)
    assert replace(TIMES, trained={1: TIMES.trained[1]}).overhead_s == 0, "a single round says nothing"


def test_our_agents_train_from_when_they_say_for_as_long_as_they_say():
    stages = [
        ("training", 1.0),
        ("encrypting", 4.0),
        ("uploading", 5.0),
        ("training", 9.0),
        ("encrypting", 11.0),
    ]
    rounds = [
        pb.RoundSummary(number=number, updates=[pb.UpdateReport(client_id="a", train_s=seconds)])
        for number, seconds in ((1, 2.5), (2, 1.5))
    ]
    assert trained(rounds, {"a": stages}) == {1: [Span(1.0, 3.5)], 2: [Span(9.0, 10.5)]}


def test_what_peers_clients_noted_is_read(tmp_path):
    for name, right in (("a", 8), ("b", 4)):
        notes = [
            {"training": 1, "began": 1.0, "ended": 2.0},
            {"evaluating": 1, "began": 2.0, "ended": 3.0, "count": 5, "right": 0},
            {"training": 2, "began": 4.0, "ended": 5.0},
            {"evaluating": 2, "began": 5.0, "ended": 6.0, "count": 10, "right": right},
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, notes)))
    trainings, accuracy = noted(tmp_path, ("a", "b"))
    assert trainings == {1: [Span(1.0, 2.0)] * 2, 2: [Span(4.0, 5.0)] * 2}
    assert accuracy == 0.6
    assert evaluated(tmp_path, ("a", "b"), 2)
    assert not evaluated(tmp_path, ("a", "b"), 3)
    assert not evaluated(tmp_path, ("a", "c"), 2), "who noted nothing has not"


def test_an_outcome_is_kept_and_becomes_a_row(tmp_path):
    outcome = Outcome.of(
        system="shelora",
        version="0.1.0",
        protection="complete, TLS",
        times=TIMES,
        usage=Usage(),
        clients=("a", "b"),
        bytes_up=6_000_000,
        bytes_down=3_000_000,
        accuracy=0.925,
    )
    assert Outcome.read(outcome.write(tmp_path)) == outcome
    assert (outcome.up, outcome.down) == (1_000_000, 500_000), "a client and round"
    heading, _, row = table([outcome]).splitlines()
    assert len(heading.split("|")) == len(row.split("|"))
    assert "| 90 s | 20 s | 12.3 s | 6.0 s | 1,000 kB | 500 kB |" in row
    assert row.endswith("| 92.5% |")


def test_the_servers_certificate_is_of_its_authority(tmp_path):
    made = certified(tmp_path)
    context = ssl.create_default_context(cafile=made.authority)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.certificate, made.key)
    incoming, outgoing, there, back = (ssl.MemoryBIO() for _ in range(4))
    client = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    server = serving.wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for side, sent, received in ((client, outgoing, there), (server, back, incoming)):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            received.write(sent.read())
    assert client.getpeercert()["notAfter"]
