import json
import logging
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import structlog

from shelora.telemetry.logs import MASK, MAX_TEXT, configure_logs, guarded
from shelora.v1 import key_authority_pb2 as pb

SECRET = b"\x01\x02 the obfuscation secret \x03"


def logged(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


@pytest.mark.parametrize("payload", [SECRET, bytearray(SECRET), memoryview(SECRET)])
def test_bytes_are_refused_at_any_depth(payload):
    for value in (payload, [payload], {"a": ({"b": payload},)}, {payload and "x": payload}):
        shown = json.dumps(guarded("data", value))
        assert f"<{len(SECRET)} bytes refused>" in shown
        assert "obfuscation" not in shown


@pytest.mark.parametrize(
    "name",
    [
        "secret",
        "obfuscation_secret",
        "ckks_secret_key",
        "Authorization",
        "agent_credential",
        "password",
        "key",
        "plan_key",
        "private_key",
        "bearer",
        "token",
        "seed",
    ],
)
def test_fields_named_like_secrets_are_masked(name):
    assert guarded(name, "ab" * 32) == MASK
    assert guarded("outer", {"inner": [{name: "ab"}]}) == {"inner": [{name: MASK}]}


@pytest.mark.parametrize(
    "name",
    ["key_id", "agent_credential_file", "token_count", "federation_id", "tokens_s", "keyword", "secret_path"],
)
def test_fields_that_only_sound_like_secrets_are_shown(name):
    assert guarded(name, "value") == "value"


@pytest.mark.parametrize(
    "value", [np.arange(4.0), np.float32(1), pb.OpenEpochResponse(key_id=b"x"), object()]
)
def test_arrays_messages_and_other_objects_are_refused_by_type(value):
    assert guarded("field", value) == f"<{type(value).__name__} refused>"


def test_plain_values_are_shown_as_they_are():
    class Colour(Enum):
        RED = "red"

    values = [1, 2.5, True, None, "text", Colour.RED, Path("/a"), ValueError("why")]
    assert guarded("field", values) == [1, 2.5, True, None, "text", "red", "/a", "why"]


def test_a_text_as_long_as_a_payload_is_cut():
    shown = guarded("field", "x" * (MAX_TEXT + 1))
    assert shown == "x" * MAX_TEXT + f"... <{MAX_TEXT + 1} characters>"


def test_a_record_is_one_json_object_with_its_process_and_context(capsys):
    configure_logs("tester", "info", json=True)
    with structlog.contextvars.bound_contextvars(federation_id="f"):
        structlog.get_logger("some.module").info("round_closed", round_id="r", data=SECRET)
    (record,) = logged(capsys)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "round_closed",
        "level": "info",
        "logger": "some.module",
        "process": "tester",
        "federation_id": "f",
        "round_id": "r",
        "data": f"<{len(SECRET)} bytes refused>",
    }


def test_records_of_libraries_take_the_same_way_and_their_bytes_are_refused(capsys):
    configure_logs("tester", json=True)
    logging.getLogger("grpc._cython").warning("got %s from %s", SECRET, "peer")
    logging.getLogger("grpc._cython").warning("got %(data)s from %(who)s", {"data": SECRET, "who": "peer"})
    for record in logged(capsys):
        assert record["event"] == f"got <{len(SECRET)} bytes refused> from peer"
        assert record["logger"] == "grpc._cython"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_shows_no_local_variables(capsys, as_json):
    configure_logs("tester", json=as_json)
    local = "the plan in the clear"
    try:
        int(local[:3])
    except ValueError:
        structlog.get_logger("x").exception("failed")
    shown = capsys.readouterr().err
    assert "ValueError: invalid literal" in shown
    assert shown.count("the plan in the clear") == 0


def test_records_below_the_level_are_dropped(capsys):
    configure_logs("tester", "WARNING", json=True)
    structlog.get_logger("x").info("quiet")
    logging.getLogger("y").info("quiet")
    assert logged(capsys) == []


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="LOUD"):
        configure_logs("tester", "loud")


def test_a_record_for_people_is_one_line_and_moves_no_cursor(capsys):
    configure_logs("test")
    structlog.get_logger("x").warning("plan_rejected", why="fine\x1b[2J\nforged_record client_id=alice")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "\x1b" not in shown
    logging.getLogger("library").warning("two\nlines\x1b[2J")
    assert "two\nlines\\x1b[2J" in capsys.readouterr().err
