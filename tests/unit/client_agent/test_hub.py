"""A model path that is not a folder: the hub is asked once, and what it says is told at once."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from transformers import BertForSequenceClassification

from client_agent import hub
from client_agent.checkpoint import load_checkpoint, usual_targets
from shelora.errors import DomainError, Reason
from tests.unit.client_agent.tiny import LABELS, bert_config, save_model


class Hub(ThreadingHTTPServer):
    """Answers every request with one status, and counts them."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code, self.asked = status, code, 0
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    hub.absence_on_hub.cache_clear()
    yield
    hub.absence_on_hub.cache_clear()


@pytest.fixture
def endpoint(monkeypatch):
    """Has the hub be at that port."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def place(port: int) -> None:
        monkeypatch.setattr(hub, "hf_hub_url", lambda name, file: f"http://127.0.0.1:{port}/{name}/{file}")

    return place


def refused(path: str) -> str:
    for ask in (lambda: load_checkpoint(path, "causal-lm", ()), lambda: usual_targets(path)):
        with pytest.raises(DomainError) as error:
            ask()
        assert error.value.reason is Reason.MODEL_INVALID
        assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "has no model of that name"),
        (404, "EntryNotFound", "without a config.json"),
        (403, "GatedRepo", "accepted its terms"),
        (503, "", "does not answer: "),
    ],
)
def test_what_the_hub_says_of_a_name_is_told_after_one_request(endpoint, status, code, said):
    with Hub(status, code) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(server.server_port)
        message = refused("mistyped/model")
        server.shutdown()
    assert "there is no folder mistyped/model beside the configuration file" in message
    assert said in message
    assert server.asked == 1


def test_a_hub_that_is_not_there_is_not_waited_for(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    endpoint(port)
    assert "the Hugging Face hub does not answer" in refused("mistyped/model")


def test_offline_the_hub_is_not_asked(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Hub(404, "RepoNotFound") as server:
        endpoint(server.server_port)
        assert "HF_HUB_OFFLINE is set" in refused("mistyped/model")
    assert not server.asked


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "a b/c", "ü/ß"])
def test_a_name_that_neither_a_folder_nor_the_hub_can_have(path, endpoint):
    endpoint(1)
    assert "model.path" in refused(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """Every word would be unknown, and nobody would notice."""
    save_model(BertForSequenceClassification(bert_config()), tmp_path)
    load_checkpoint(str(tmp_path), "sequence-classification", LABELS)
    for file in tmp_path.glob("token*"):
        file.unlink()
    with pytest.raises(DomainError, match="knows no word: add the model"):
        load_checkpoint(str(tmp_path), "sequence-classification", LABELS)
