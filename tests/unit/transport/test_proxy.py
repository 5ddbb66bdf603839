"""Addresses, and the way to them."""

import json
import socket
import threading
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

from client_agent.main import app as agent
from coordinator.main import app as coordinator
from shelora.cli.main import app as shelora
from shelora.errors import DomainError, Reason
from shelora.transport import sockets
from shelora.transport.address import Address, HostPort, ListenAddress
from shelora.transport.channel import open_channel
from shelora.transport.enrolment import presented_chain
from shelora.transport.proxy import EXEMPTIONS, VARIABLES, channel_options, proxy_for
from tests.proxy import ConnectProxy

WRONG = {
    "http://host:7101": "leave out http://",
    "https://host": "leave out https://",
    "grpc://host:7101": "leave out grpc://",
    " host:7101": "remove the blanks",
    "host: 7101": "remove the blanks",
    "host:7101\n": "remove the blanks",
    "host\u00a0:7101": "remove the blanks",
    "user:pass@host:7101": "remove user and password",
    "host:7101/path": "remove what follows the port",
    "host:7101?x": "remove what follows the port",
    "a:1,b:2": "write one address",
    "fd00::12:7101": "put an IPv6 address in brackets",
    "::1": "put an IPv6 address in brackets",
    "host": "add the port",
    "[::1]": "the port is 1 to 65535",
    "host:": "the port is 1 to 65535",
    "host:x": "the port is 1 to 65535",
    "host:65536": "the port is 1 to 65535",
    "host:-1": "the port is 1 to 65535",
    "host:0": "the port is 1 to 65535",
    "host:¹": "the port is 1 to 65535",
    ":7101": "write the host",
    "": "add the port",
    "[host]:7101": "in brackets belongs an IPv6 address",
    "[127.0.0.1]:7101": "in brackets belongs an IPv6 address",
    "[::1:7101": "in brackets belongs",
    "256.0.0.1:7101": "is no IPv4 address",
    "1.2.3:7101": "is no IPv4 address",
    "-host:7101": "is not a host name",
    "a..b:7101": "is not a host name",
    "ho\x1bst:7101": "is not a host name",
    "höst:7101": "in ASCII",
    "x" * 64 + ":7101": "is not a host name",
}


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch):
    for variable in (*VARIABLES, *EXEMPTIONS):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("address", WRONG)
def test_an_address_that_is_none_is_refused_with_the_remedy(address):
    with pytest.raises(DomainError) as refused:
        HostPort.parse(address)
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    assert WRONG[address] in refused.value.message
    with pytest.raises(ValidationError, match="is not host:port"):
        TypeAdapter(Address).validate_python(address)


@pytest.mark.parametrize(
    "address", ["host:1", "a.b-c.example:65535", "10.0.0.1:7101", "[fd00::12]:7101", "xn--hst-sna:7", "a_b:1"]
)
def test_addresses_are_read_and_printed_alike(address):
    assert str(HostPort.parse(address)) == TypeAdapter(Address).validate_python(address) == address


def test_port_zero_is_for_who_serves():
    assert TypeAdapter(ListenAddress).validate_python("0.0.0.0:0") == "0.0.0.0:0"
    assert str(HostPort.parse("[::]:0", listening=True)) == "[::]:0"


@pytest.mark.parametrize("address", ["http://host:7101", "host:0", "fd00::12:7101", "host :7101"])
def test_yaml_environment_and_flags_refuse_alike(address, tmp_path, monkeypatch):
    remedy = WRONG.get(address, "remove the blanks")
    config = tmp_path / "agent.yaml"
    values = {"federation": "f", "client_id": "c", "aggregation": [address], "coordinator": address}
    values |= {"key_authority": address, "state_dir": "s", "model": {"path": "m"}, "data": {"train": "t.csv"}}
    config.write_text(yaml.safe_dump(values))
    refused = CliRunner().invoke(agent, ["check", "--config", str(config)])
    assert refused.exit_code == 2
    assert refused.stderr.count(remedy) == 3
    config.write_text(yaml.safe_dump({**values, "coordinator": "h:1", "key_authority": "h:1"}))
    monkeypatch.setenv("SHELORA_AGENT__AGGREGATION", json.dumps([address]))
    assert remedy in CliRunner().invoke(agent, ["check", "--config", str(config)]).stderr
    token = "shelora-token-" + "A" * 86
    for command, app in (
        (["enroll", "--authority", address, "--token", token, "--state-dir", str(tmp_path)], agent),
        (["enroll", "--authority", address, "--token", token, "--identity", str(tmp_path)], shelora),
        (["status", "--coordinator", address, "--identity", str(tmp_path)], shelora),
        (["revocations", "--key-authority", address, "--identity", str(tmp_path)], shelora),
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code in {1, 2}
        assert remedy in done.stderr
    monkeypatch.setenv("SHELORA_COORDINATOR_AGGREGATION_ADDRESSES", json.dumps([address]))
    done = CliRunner().invoke(
        coordinator,
        ["--key-authority-address", address, "--identity", str(tmp_path), "--listen", "http://x:1"],
    )
    assert done.exit_code == 2
    assert done.stderr.count(remedy) >= 2
    assert "leave out http://" in done.stderr


def target(host="fl.example.org"):
    return HostPort(host, 7101)


def test_the_first_variable_that_is_set_names_the_proxy():
    environment = {variable: f"http://{variable.lower().replace('_', '-')}:3128" for variable in VARIABLES}
    for variable in VARIABLES:
        proxy = proxy_for(target(), environment)
        assert proxy.variable == variable
        assert str(proxy) == f"the proxy {variable.lower().replace('_', '-')}:3128 (from {variable})"
        environment[variable] = " "  # as good as unset
    assert proxy_for(target(), environment) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_what_stays_on_this_machine_goes_directly(host):
    assert proxy_for(HostPort(host, 1), {"https_proxy": "http://p:1"}) is None


@pytest.mark.parametrize("variable", EXEMPTIONS)
@pytest.mark.parametrize(
    ("entry", "host", "direct"),
    [
        ("fl.example.org", "fl.example.org", True),
        ("example.org", "fl.example.org", True),
        (".example.org", "fl.example.org", True),
        ("*.example.org", "fl.example.org", True),
        ("EXAMPLE.ORG", "fl.Example.org", True),
        ("other.org, example.org ,", "fl.example.org", True),
        ("*", "fl.example.org", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("fd00::/8", "fd00::12", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "fl.example.org", False),
        ("fl.example.org.evil", "fl.example.org", False),
        ("", "fl.example.org", False),
        (",", "fl.example.org", False),
    ],
)
def test_exemptions(variable, entry, host, direct):
    environment = {"https_proxy": "http://p:1", variable: entry}
    assert (proxy_for(target(host), environment) is None) is direct


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("http://p:3128", "http://p:3128"),
        ("p:3128", "http://p:3128"),
        ("http://p:3128/", "http://p:3128"),
        ("http://p", "http://p:80"),
        ("http://me:p%40ss@p:1", "http://me:p%40ss@p:1"),
        ("http://[fd00::1]:1", "http://[fd00::1]:1"),
    ],
)
def test_a_proxy_is_told_to_grpc_as_it_is_used_here(value, url, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", value)
    assert proxy_for(target()).url == url
    assert channel_options(target()) == (("grpc.enable_http_proxy", 1), ("grpc.http_proxy", url))
    assert "p%40ss" not in f"{proxy_for(target())}{proxy_for(target())!r}"
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert channel_options(target()) == (("grpc.enable_http_proxy", 0),)


@pytest.mark.parametrize(
    "value",
    [
        "https://p:1",
        "socks5://p:1",
        "http://p:x",
        "http://",
        "http://p q:1",
        "http://p:99999",
        "http://me:hunter2/x@p:1",
        "http://me:hunter2@p\u2100:1",
        "http://me:hunter2@[::1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_by_the_name_of_its_variable(value, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", value)
    for attempt in (lambda: channel_options(target()), lambda: presented_chain("fl.example.org:1")):
        with pytest.raises(DomainError, match="HTTPS_PROXY names no usable proxy") as refused:
            attempt()
        assert refused.value.reason is Reason.CONFIGURATION_INVALID
        assert "hunter2" not in refused.value.message


def test_the_pins_fetch_says_which_proxy_refused_it_and_where_that_came_from(monkeypatch):
    with ConnectProxy("other.test", login="me:secret") as proxy:
        for url, said in ((f"http://{proxy.address}", "407"), (f"http://me:secret@{proxy.address}", "403")):
            monkeypatch.setenv("https_proxy", url)
            with pytest.raises(DomainError) as refused:
                presented_chain("fl.test:7099")
            assert refused.value.reason is Reason.STORE_UNAVAILABLE
            assert f"through the proxy {proxy.address} (from https_proxy): it answers 'HTTP/1.1 {said}" in (
                refused.value.message
            )
            assert "secret" not in refused.value.message
    with pytest.raises(DomainError, match=r"through the proxy .* \(from https_proxy\).*refused"):
        presented_chain("fl.test:7099")


def test_a_name_that_nobody_knows_is_named():
    with pytest.raises(DomainError, match=r"the name nowhere\.invalid is not known"):
        presented_chain("nowhere.invalid:7099")


def test_a_silent_name_server_holds_nobody(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(sockets, "RESOLVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait())
    with pytest.raises(DomainError, match=r"the name fl\.test was not resolved within 0\.05 s"):
        presented_chain("fl.test:7099")
    answered.set()


async def test_a_channel_to_a_malformed_address_is_refused_when_it_is_opened():
    with pytest.raises(DomainError, match="leave out http://"):
        open_channel("http://host:7101", credentials=object())  # type: ignore[arg-type]


def test_documented_variables():
    text = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    for variable in (*VARIABLES, *EXEMPTIONS):
        assert f"`{variable}`" in text
