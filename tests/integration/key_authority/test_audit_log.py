import concurrent.futures
import errno
import itertools
import os
from datetime import UTC, datetime

import pytest

from services.key_authority.audit import AuditLog
from services.key_authority.audit_file import start_log, succeed_log
from services.key_authority.audit_listing import REFUSALS_PER_MINUTE, REPEATS_S
from services.key_authority.epochs import EpochId
from shelora.audit import AuditEvent, verified
from shelora.errors import DomainError, Reason
from tests.identities import OPERATOR, client

IDENTITY = "5e" * 16
EPOCH = EpochId("clinic", 1)
KEY_ID = bytes(range(16))


class Time:
    """A clock that tests turn."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "audit.log"
    start_log(path, IDENTITY)
    return path


def opened(path, **options):
    return AuditLog(path, IDENTITY, **options)


def records(path):
    with path.open("rb") as file:
        return list(verified(file))


def events(path):
    return [record.event for record in records(path)]


def refusal(path):
    with pytest.raises(DomainError) as caught:
        opened(path)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert "replace-audit-log" in caught.value.message
    return caught.value.message


def test_a_release_is_on_disk_when_the_call_returns(path):
    with opened(path, clock=lambda: datetime(2026, 3, 1, tzinfo=UTC)) as log:
        log.epoch_opened(EPOCH, KEY_ID)
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
        *_, last = records(path)
        assert log.head == last.hash
    assert (last.event, last.federation_id, last.epoch) == (AuditEvent.SECRETS_RELEASED, "clinic", 1)
    assert (last.client_id, last.key_id, last.time) == ("ward-7", KEY_ID.hex(), "2026-03-01T00:00:00.000Z")


def test_a_restart_continues_the_chain_and_lists_an_opened_epoch_once(path):
    for _ in range(3):
        with opened(path) as log:
            log.epoch_opened(EPOCH, KEY_ID)
            log.secrets_released(EPOCH, "ward-7", KEY_ID)
    assert events(path) == [
        AuditEvent.LOG_STARTED,
        AuditEvent.EPOCH_OPENED,
        *[AuditEvent.SECRETS_RELEASED] * 3,
    ]


def test_an_epoch_whose_opening_a_crash_left_unwritten_is_listed_before_its_release(path):
    with opened(path) as log:
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    assert events(path)[1:] == [AuditEvent.EPOCH_OPENED, AuditEvent.SECRETS_RELEASED]


def test_concurrent_releases_form_one_chain(path):
    names = [f"ward-{number}" for number in range(64)]
    with opened(path) as log, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: log.secrets_released(EPOCH, name, KEY_ID), names))
    released = [r.client_id for r in records(path) if r.event is AuditEvent.SECRETS_RELEASED]
    assert sorted(released) == sorted(names)
    assert events(path).count(AuditEvent.EPOCH_OPENED) == 1


def test_a_tail_torn_at_any_byte_is_repaired_and_the_repair_is_written_down(path):
    with opened(path) as log:
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        with opened(path) as log:
            log.secrets_released(EPOCH, "ward-8", KEY_ID)
        repaired, released = records(path)[-2:]
        assert (repaired.event, repaired.count) == (AuditEvent.TAIL_REPAIRED, end - start)
        assert released.client_id == "ward-8"


def test_a_repair_that_a_crash_interrupts_anywhere_is_repaired_in_turn(path, monkeypatch):
    class Crash(BaseException):
        pass

    with opened(path) as log:
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    torn = path.read_bytes() + b'{"client_id":"' + b"w" * 900  # longer than the record that takes its place
    write, cut = os.pwrite, os.ftruncate

    def crash_after(steps):
        left = iter(range(steps))

        def step(action):
            def stepped(*arguments):
                if next(left, None) is None:
                    raise Crash
                return action(*arguments)

            return stepped

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", step(lambda fd, data, at: write(fd, data[:50], at)))
            patched.setattr(os, "ftruncate", step(cut))
            with opened(path):
                pass

    for steps in itertools.count():
        path.write_bytes(torn)
        try:
            crash_after(steps)
        except Crash:
            with opened(path):
                pass
        else:
            break
        assert AuditEvent.TAIL_REPAIRED in events(path)
    assert steps > 5


@pytest.mark.parametrize("failing", ["pwrite", "ftruncate", "fsync"])
def test_nothing_is_released_when_the_log_cannot_be_written_and_the_log_recovers(path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(path) as log:
        log.secrets_released(EPOCH, "before", KEY_ID)
        head = log.head
        with monkeypatch.context() as patched:
            patched.setattr(os, failing, full)
            with pytest.raises(DomainError, match="No space left") as caught:
                log.secrets_released(EPOCH, "unwritten-and-longer-than-the-next", KEY_ID)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert log.head == head
        log.secrets_released(EPOCH, "after", KEY_ID)
    assert [r.client_id for r in records(path)][-2:] == ["before", "after"]


def test_a_write_that_stops_half_way_is_finished(path, monkeypatch):
    write = os.pwrite
    with opened(path) as log:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    assert records(path)[-1].client_id == "ward-7"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"clinic", b"clinik"), *lines[2:]], "record 1 (line 2)"),
        (lambda lines: [lines[0], *lines[2:]], "record 1 (line 2)"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "record 1 (line 2)"),
        (lambda lines: [*lines[:3], lines[3].replace(b"ward", b"word")], "record 3 (line 4)"),
        (lambda lines: lines[1:], "record 0 (line 1)"),
        (lambda lines: [lines[0][:-9]], "record 0 (line 1)"),
        (lambda _: [], "empty"),
    ],
)
def test_a_damaged_log_is_refused_with_the_first_broken_record_and_left_as_it_is(path, damage, named):
    with opened(path) as log:
        for name in ("ward-1", "ward-2"):
            log.secrets_released(EPOCH, name, KEY_ID)
    damaged = b"".join(damage(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(damaged)
    assert named in refusal(path)
    assert path.read_bytes() == damaged


def test_a_missing_log_is_refused(path):
    path.unlink()
    assert "No such file" in refusal(path)
    assert not path.exists()


def test_the_log_of_another_vault_is_refused(path):
    start_log(path, "6f" * 16)
    assert "is of another vault" in refusal(path)


def test_a_log_that_takes_the_place_of_a_damaged_one_names_it(path):
    path.write_bytes(b"damaged\n")
    aside = succeed_log(path, IDENTITY)
    assert aside.read_bytes() == b"damaged\n"
    (first,) = records(path)
    assert first.follows.startswith(aside.suffix[1:])
    with opened(path) as log:
        assert log.head == first.hash


def test_refusals_beyond_the_limit_are_counted_not_listed(path):
    now = Time()
    with opened(path, monotonic=now) as log:
        for number in range(REFUSALS_PER_MINUTE + 5):
            log.release_refused(EPOCH, f"stranger-{number}", Reason.UNAUTHENTICATED)
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
        for number in range(3):
            log.release_refused(EpochId("clinic", number + 2), None, Reason.UNAUTHENTICATED)
        now.seconds = 60.0
        log.release_refused(EPOCH, "stranger", Reason.INVALID_ARGUMENT)
    seen = records(path)
    assert [r.event for r in seen].count(AuditEvent.RELEASE_REFUSED) == REFUSALS_PER_MINUTE + 1
    assert [r.count for r in seen if r.event is AuditEvent.REFUSALS_NOT_LISTED] == [5, 3]
    assert (seen[-1].client_id, seen[-1].reason) == ("stranger", "INVALID_ARGUMENT")


def test_a_denied_call_is_listed_with_whom_the_certificate_names_and_leaves_releases_their_own_limit(path):
    method = "/shelora.v1.KeyAuthority/GetEpochSecrets"
    with opened(path, monotonic=Time()) as log:
        log.call_denied(method, OPERATOR, Reason.PERMISSION_DENIED)
        log.call_denied(method, client(), Reason.CERTIFICATE_EXPIRED)
        for number in range(REFUSALS_PER_MINUTE + 2):
            log.call_denied(method, client(f"ward-{number}"), Reason.PERMISSION_DENIED)
        log.release_refused(EPOCH, "ward-7", Reason.FEDERATION_UNKNOWN)
    denied = [r for r in records(path) if r.event is AuditEvent.CALL_DENIED]
    assert len(denied) == REFUSALS_PER_MINUTE
    named = [(r.role, r.federation_id, r.client_id, r.reason) for r in denied[:2]]
    assert named == [
        ("operator", None, None, "PERMISSION_DENIED"),
        ("client", "clinic", "ward-7", "CERTIFICATE_EXPIRED"),
    ]
    assert {r.method for r in denied} == {method}
    assert [(r.event, r.count) for r in records(path)][-2:] == [
        (AuditEvent.REFUSALS_NOT_LISTED, 4),
        (AuditEvent.RELEASE_REFUSED, None),
    ]


def test_what_was_only_counted_is_written_down_at_the_end(path):
    log = opened(path, monotonic=Time())
    for number in range(REFUSALS_PER_MINUTE + 2):
        log.release_refused(EPOCH, f"stranger-{number}", Reason.UNAUTHENTICATED)
    log.close()
    log.close()
    assert records(path)[-1].count == 2
    with pytest.raises(DomainError, match="stopping"):
        log.secrets_released(EPOCH, "ward-7", KEY_ID)


def test_no_other_user_can_read_or_change_the_log(path):
    with opened(path) as log:
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_asked_again_and_again_is_one_record_and_a_count(path):
    """A member that asked for its secrets as often as it may wrote 3 GB a day."""
    now = Time()
    with opened(path, monotonic=now) as log:
        for _ in range(1000):
            log.secrets_released(EPOCH, "ward-7", KEY_ID)
        log.secrets_released(EPOCH, "ward-8", KEY_ID)
        for _ in range(3):
            log.call_denied("/x/y", client(), Reason.PERMISSION_DENIED)
        assert len(records(path)) == 5
        now.seconds = REPEATS_S
        log.list_repeats()
        log.secrets_released(EPOCH, "ward-7", KEY_ID)  # an hour later it is listed again
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    told = [(r.event, r.client_id, r.count) for r in records(path)][5:]
    assert told == [
        (AuditEvent.SECRETS_RELEASED, "ward-7", 999),
        (AuditEvent.CALL_DENIED, "ward-7", 2),
        (AuditEvent.SECRETS_RELEASED, "ward-7", None),
        (AuditEvent.SECRETS_RELEASED, "ward-7", 1),
    ]


def test_a_release_that_could_not_be_written_down_is_no_repeat_of_itself(path, monkeypatch):
    with opened(path) as log:
        log.epoch_opened(EPOCH, KEY_ID)
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing_disk)
            with pytest.raises(DomainError):
                log.secrets_released(EPOCH, "ward-7", KEY_ID)
        log.secrets_released(EPOCH, "ward-7", KEY_ID)
    assert events(path)[-1] is AuditEvent.SECRETS_RELEASED


def failing_disk(_descriptor):
    raise OSError(28, "No space left on device")
