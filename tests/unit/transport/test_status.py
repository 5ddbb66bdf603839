import asyncio

import grpc
import pytest
import structlog

from shelora.errors import DomainError, Reason, RetryLaterError
from shelora.transport.channel import is_transient
from shelora.transport.status import (
    REASON_METADATA,
    RETRY_AFTER_METADATA,
    STATUS_BY_REASON,
    error_from_rpc,
    retry_after_s,
    translated,
)


class RecordingContext:
    """Stands in for a servicer context: remembers what it was aborted with."""

    def __init__(self):
        self.aborted = None

    async def abort(self, code, details="", trailing_metadata=()):
        self.aborted = (code, details, dict(trailing_metadata))
        raise grpc.aio.AbortError


async def abort_of(error):
    context = RecordingContext()
    with pytest.raises(grpc.aio.AbortError):
        async with translated(context):
            raise error
    return context.aborted


def rpc_error(code, details="", reason=None):
    trailing = grpc.aio.Metadata(*([(REASON_METADATA, reason)] if reason else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def test_every_reason_has_a_status_and_none_of_them_is_ok():
    assert set(STATUS_BY_REASON) == set(Reason)
    assert grpc.StatusCode.OK not in STATUS_BY_REASON.values()


def test_only_reasons_that_pass_by_themselves_are_tried_again():
    transient = {reason for reason in Reason if is_transient(DomainError(reason, ""))}
    assert transient == {
        Reason.STORE_UNAVAILABLE,
        Reason.STORE_FULL,
        Reason.MEMORY_UNAVAILABLE,
        Reason.WORKER_FAILED,
        Reason.RATE_LIMITED,
        Reason.RECORD_UNREADABLE,
    }


@pytest.mark.parametrize("reason", Reason)
async def test_a_domain_error_survives_the_wire(reason):
    code, details, metadata = await abort_of(DomainError(reason, "why, in words"))
    received = error_from_rpc(rpc_error(code, details, metadata[REASON_METADATA]))
    assert (received.reason, received.message) == (reason, "why, in words")


async def test_when_to_come_again_survives_the_wire():
    code, details, metadata = await abort_of(RetryLaterError(Reason.RATE_LIMITED, "too many", 1.2341))
    assert metadata == {REASON_METADATA: "RATE_LIMITED", RETRY_AFTER_METADATA: "1235"}
    trailing = grpc.aio.Metadata(*metadata.items())
    assert retry_after_s(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)) == 1.235
    assert retry_after_s(rpc_error(code)) == retry_after_s(ValueError()) == retry_after_s(None) == 0


async def test_an_unexpected_error_is_logged_and_leaks_nothing():
    with structlog.testing.capture_logs() as logs:
        code, details, metadata = await abort_of(ValueError("the key is 0xdeadbeef"))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "internal error")
    assert metadata == {REASON_METADATA: "INTERNAL"}
    assert [(record["event"], record["log_level"]) for record in logs] == [
        ("rpc_failed_unexpectedly", "error")
    ]
    assert logs[0]["exc_info"]


async def test_cancellation_and_an_abort_of_the_servicer_pass():
    for error in (asyncio.CancelledError(), grpc.aio.AbortError()):
        context = RecordingContext()
        with pytest.raises(type(error)):
            async with translated(context):
                raise error
        assert context.aborted is None


async def test_nothing_happens_to_a_call_that_succeeds():
    context = RecordingContext()
    async with translated(context):
        pass
    assert context.aborted is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.STORE_UNAVAILABLE),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.UNAUTHENTICATED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL),
    ],
)
def test_a_failure_of_grpc_itself_gets_the_nearest_reason_and_names_its_status(code, reason):
    error = error_from_rpc(rpc_error(code, "details"))
    assert (error.reason, error.message) == (reason, f"{code.name}: details")


@pytest.mark.parametrize(
    ("code", "details", "said"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "last error: ipv4:1.2.3.4:7101: Connection refused",
            "nothing listens there",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "address lookup failed for h:7101: Domain name not found",
            "no such host",
        ),
        (grpc.StatusCode.UNAVAILABLE, "Tls handshake failed: WRONG_VERSION_NUMBER", "does not speak TLS"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "see that the server runs"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", "of another kind or version"),
    ],
)
def test_who_cannot_be_called_is_named_with_what_to_do(code, details, said):
    message = error_from_rpc(rpc_error(code, details), "h:7101").message
    assert message.startswith(f"{code.name} at h:7101: {details}; ")
    assert said in message


def test_a_reason_of_a_newer_version_falls_back_to_the_status():
    error = error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "gone", "NOT_INVENTED_YET"))
    assert error.reason is Reason.INTERNAL


def test_an_rpc_error_without_a_status_becomes_internal():
    assert error_from_rpc(grpc.RpcError()).reason is Reason.INTERNAL


def test_what_a_server_says_cannot_move_the_cursor():
    error = error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "gone\x1b[2J\nfine", "ROUND_UNKNOWN"))
    assert error.message == "gone\\x1b[2J\\nfine"
    assert "\\x9b" in error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "\x9b2J")).message


async def test_a_caller_that_is_gone_is_no_fault_of_the_server():
    """As in an outage of Redis, where callers give up before they are told."""

    class Gone:
        tries = 0

        async def abort(self, *_):
            self.tries += 1
            raise grpc.aio.InternalError

    context = Gone()
    with structlog.testing.capture_logs() as logs, pytest.raises(grpc.aio.AbortError):
        async with translated(context):
            raise DomainError(Reason.STORE_UNAVAILABLE, "Redis does not answer")
    assert (context.tries, logs) == (1, [])
