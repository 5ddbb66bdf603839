import hashlib
import io
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.audit import (
    MAX_LINE_BYTES,
    AuditBrokenError,
    AuditEntry,
    AuditEvent,
    AuditRecord,
    AuditTornError,
    verified,
)
from shelora.errors import Reason

NOON = datetime(2026, 3, 1, 12, 0, 0, 5000, tzinfo=UTC)
GENESIS = AuditEntry(event=AuditEvent.LOG_STARTED, vault="5e" * 16)


def chain(count, clients=None):
    records = [AuditRecord.after(None, GENESIS, NOON)]
    for number in range(1, count):
        entry = AuditEntry(
            event=AuditEvent.SECRETS_RELEASED,
            federation_id="clinic",
            epoch=1,
            client_id=clients[number] if clients else f"ward-{number}",
        )
        records.append(AuditRecord.after(records[-1], entry, NOON))
    return records


def read(lines):
    return list(verified(io.BytesIO(b"".join(lines))))


def broken(lines):
    with pytest.raises(AuditBrokenError) as caught:
        read(lines)
    return caught.value


RECORDS = chain(5)
LINES = [record.line() for record in RECORDS]


def test_a_chain_reads_back_as_it_was_written():
    assert read(LINES) == RECORDS
    assert [record.sequence for record in RECORDS] == [0, 1, 2, 3, 4]
    assert [record.previous for record in RECORDS[1:]] == [record.hash for record in RECORDS[:-1]]


def test_a_line_is_json_that_anyone_can_check():
    fields = json.loads(LINES[1])
    assert fields == {
        "client_id": "ward-1",
        "epoch": 1,
        "event": "secrets_released",
        "federation_id": "clinic",
        "format": 1,
        "hash": RECORDS[1].hash,
        "previous": RECORDS[0].hash,
        "sequence": 1,
        "time": "2026-03-01T12:00:00.005Z",
    }
    claimed = fields.pop("hash")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == claimed
    assert RECORDS[0].hash == "6ff14f0de0c689040d017572428e8621f388c4c32d31abdebfce64544d837f6d"


@given(st.data())
def test_a_change_of_any_byte_is_noticed_at_its_record(data):
    content = bytearray(b"".join(LINES))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    assert broken([bytes(content)]).sequence == bytes(b"".join(LINES)[:position]).count(b"\n")


@pytest.mark.parametrize("number", range(5))
def test_an_edit_that_fixes_the_hash_of_its_own_record_is_noticed_at_the_next(number):
    edited = RECORDS[number].model_copy(update={"time": "2020-01-01T00:00:00.000Z"})
    edited = edited.model_copy(update={"hash": edited.computed_hash()})
    lines = [*LINES[:number], edited.line(), *LINES[number + 1 :]]
    if number == 4:
        assert read(lines)[-1].hash != RECORDS[-1].hash  # only a noted head tells
    else:
        error = broken(lines)
        assert error.sequence == number + 1
        assert f"record {number + 1} (line {number + 2})" in error.message


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=8))
def test_any_selection_or_order_other_than_a_prefix_is_noticed(lines):
    if lines == LINES[: len(lines)]:
        read(lines)
    else:
        broken(lines)


@pytest.mark.parametrize("number", range(4))
def test_a_deleted_record_is_named(number):
    error = broken(LINES[:number] + LINES[number + 1 :])
    assert error.sequence == number
    assert error.reason is Reason.AUDIT_BROKEN


def test_a_torn_last_line_is_told_apart_from_damage():
    content = b"".join(LINES)
    for length in range(1, len(content)):
        if content[:length].endswith(b"\n"):
            continue
        with pytest.raises(AuditTornError) as caught:
            read([content[:length]])
        assert caught.value.sequence == content[:length].count(b"\n")
        assert caught.value.count == length - content.rfind(b"\n", 0, length) - 1


def test_records_that_say_the_same_in_other_bytes_are_refused():
    spaced = json.dumps(json.loads(LINES[1])).encode() + b"\n"
    doubled = LINES[1].replace(b'{"client_id"', b'{"client_id":"ward-2","client_id"')
    for line in (spaced, doubled, LINES[1].replace(b"ward-1", b"w\\u0061rd-1")):
        assert broken([LINES[0], line]).sequence == 1


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"x" * 3 * MAX_LINE_BYTES, b"[" * MAX_LINE_BYTES, b"\xff\xfe\n"]
)
def test_what_is_no_log_is_refused(content):
    assert broken([content]).sequence == 0


def test_a_second_beginning_is_refused():
    again = AuditRecord.after(RECORDS[-1], GENESIS, NOON)
    assert "out of place" in broken([*LINES, again.line()]).message
    first = AuditRecord.after(None, AuditEntry(event=AuditEvent.RESEALED), NOON)
    assert "out of place" in broken([first.line()]).message


@given(st.binary(max_size=3000))
def test_arbitrary_bytes_are_refused_by_name(content):
    broken([content])
    broken([*LINES, content or b"x"])


def test_time_is_written_in_utc_whatever_the_zone_of_the_clock():
    zoned = datetime.fromisoformat("2026-03-01T13:30:00+01:30")
    assert AuditRecord.after(None, GENESIS, zoned).time == "2026-03-01T12:00:00.000Z"
