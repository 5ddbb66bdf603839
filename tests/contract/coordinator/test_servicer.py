"""The RPCs over real gRPC, a real store and fakes of the other services."""

import asyncio
import math
from collections import Counter
from contextlib import asynccontextmanager
from importlib import metadata

import grpc
import pytest
from prometheus_client import REGISTRY

from coordinator import checks, render
from coordinator.metrics import TESTED, await_evaluations
from coordinator.servicer import SERVICE_NAME, CoordinatorServicer, _together, register
from services.common.server import running_server
from shelora.errors import DomainError, Reason
from shelora.operator import Operator
from shelora.transport.channel import call_with_stream, open_channel
from shelora.transport.pieces import Digest, cut
from shelora.transport.status import error_from_rpc
from shelora.v1 import committee_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.contract.coordinator.world import MATRICES, TENSORS, spec


@pytest.fixture
async def stub(fed):
    listening = asyncio.create_task(fed.changes.run())
    servicer = CoordinatorServicer(fed.handlers)
    async with (
        running_server([SERVICE_NAME], lambda server: register(servicer, server)) as address,
        open_channel(address) as channel,
    ):
        yield CoordinatorStub(channel)
        fed.changes.close()
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)


def predicted(prediction: str) -> float | None:
    labels = {"federation": "fed", "prediction": prediction}
    return REGISTRY.get_sample_value("shelora_tested_examples_total", labels)


@asynccontextmanager
async def refused(reason: Reason, words: str = ""):
    with pytest.raises((grpc.aio.AioRpcError, DomainError)) as failed:
        yield
    error = failed.value if isinstance(failed.value, DomainError) else error_from_rpc(failed.value)
    assert error.reason is reason
    assert words in error.message


def join(client="a", **fields) -> pb.JoinRequest:
    values = {
        "federation_id": "fed",
        "client_id": client,
        "rank": 4,
        "budget": 1.0,
        "example_count": 10,
        "matrices": MATRICES,
        "tensors": TENSORS,
        "protocol_version": 1,
    }
    return pb.JoinRequest(**{**values, **fields})


async def created(stub, protection="selective", **rules) -> None:
    await stub.CreateFederation(pb.CreateFederationRequest(spec=spec(protection, **rules).to_proto()))


async def test_the_end_of_a_members_certificate_is_that_of_its_last_heartbeat(fed):
    await fed.begin(spec())
    seen = checks.sighting(pb.HeartbeatRequest(stage="idle"), fed.now_ms, fed.now_ms + 86_400_000)
    await fed.handlers.members.heartbeat("fed", "a", seen)
    await fed.store.presence.touch(
        "fed", "a", fed.now_ms + 5_000
    )  # another call changes when, and nothing else
    ends = {member.client_id: member.certificate_ends_unix_ms for member in (await fed.shown()).members}
    assert ends == {"a": fed.now_ms + 86_400_000, "b": 0, "c": 0}


async def test_creating_twice_finds_the_first_and_another_specification_is_refused(stub):
    first = await stub.CreateFederation(pb.CreateFederationRequest(spec=spec().to_proto()))
    again = await stub.CreateFederation(pb.CreateFederationRequest(spec=spec().to_proto()))
    assert first == again
    assert first.phase == pb.PHASE_CREATED
    async with refused(Reason.FEDERATION_EXISTS, "choose another name"):
        await stub.CreateFederation(pb.CreateFederationRequest(spec=spec(rounds=5).to_proto()))
    listed = await stub.ListFederations(pb.ListFederationsRequest())
    assert [f.federation_id for f in listed.federations] == ["fed"]


async def test_an_unknown_federation_is_named(stub):
    for call, request in (
        (stub.GetFederation, pb.GetFederationRequest(federation_id="nope")),
        (stub.StartFederation, pb.StartFederationRequest(federation_id="nope")),
        (stub.Join, join(federation_id="nope")),
        (stub.Heartbeat, pb.HeartbeatRequest(federation_id="nope", client_id="a", stage="idle")),
    ):
        async with refused(Reason.FEDERATION_UNKNOWN, "'nope'"):
            await call(request)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank must be 1 to 1024"),
        ({"rank": 1025}, "rank must be 1 to 1024"),
        ({"budget": float("nan")}, "budget must be 0 to 1"),
        ({"budget": -0.1}, "budget must be 0 to 1"),
        ({"example_count": 0}, "example_count must be"),
        ({"client_id": "no spaces"}, "client_id must have"),
        ({"client_id": ""}, "client_id must have"),
        ({"matrices": []}, "at least one adapted matrix"),
        ({"matrices": [MATRICES[0], MATRICES[0]]}, "same matrix name"),
        ({"matrices": [common_pb2.Matrix(name="m", out_features=0, in_features=1)]}, "features must be"),
    ],
)
async def test_a_join_out_of_range_is_refused_in_words(stub, fields, words):
    await created(stub)
    async with refused(Reason.INVALID_ARGUMENT, words):
        await stub.Join(join(**fields))


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (2, "a newer")])
async def test_an_agent_of_another_protocol_is_told_which_version_to_install(stub, version, age):
    await created(stub)
    words = f"speaks {age} protocol ({version}) than this federation (1): install shelora {metadata.version('shelora')}"
    async with refused(Reason.VERSION_REFUSED, words):
        await stub.Join(join(protocol_version=version))


async def test_a_join_with_another_model_is_refused_naming_the_matrix(stub, fed):
    await fed.begin(spec())
    await fed.settle()
    wider = common_pb2.Matrix(name="layer.0.query", out_features=8, in_features=13)
    async with refused(Reason.MODEL_MISMATCH, "layer.0.query [8, 13]"):
        await stub.Join(join("d", matrices=[wider, MATRICES[1]]))


async def test_joining_again_updates_the_member(stub):
    await created(stub)
    await stub.Join(join())
    await stub.Join(join(rank=8))
    shown = await stub.GetFederation(pb.GetFederationRequest(federation_id="fed"))
    assert [(m.client_id, m.rank, m.idle_ms) for m in shown.members] == [("a", 8, 0)]


async def test_a_heartbeat_is_shown_and_ages(stub, fed):
    await created(stub)
    async with refused(Reason.CLIENT_UNKNOWN, "join first"):
        await stub.Heartbeat(pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="idle"))
    await stub.Join(join())
    answer = await stub.Heartbeat(
        pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="training", progress=0.25)
    )
    assert answer.next_ms == 5000
    fed.now_ms += 1500
    (member,) = (await stub.GetFederation(pb.GetFederationRequest(federation_id="fed"))).members
    assert (member.stage, member.progress, member.idle_ms) == ("training", 0.25, 1500)
    async with refused(Reason.INVALID_ARGUMENT, "stage must be one of"):
        await stub.Heartbeat(pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="sleeping"))


async def test_a_watching_client_is_told_every_change_of_its_work_and_the_stream_ends_with_the_federation(
    stub, fed
):
    await created(stub, "none", rounds=1)
    for client in "abc":
        await stub.Join(join(client))
    stream = stub.Watch(pb.WatchRequest(federation_id="fed", client_id="a"))
    works = [(await stream.read()).WhichOneof("work")]
    await stub.StartFederation(pb.StartFederationRequest(federation_id="fed"))
    playing = asyncio.create_task(fed.play())
    async with asyncio.timeout(20):
        while (assignment := await stream.read()) is not grpc.aio.EOF:
            works.append(assignment.WhichOneof("work"))
    await playing
    assert works[0] == "wait"
    assert works[-1] == "finish"
    assert works.count("finish") == 1


async def test_a_watch_ends_when_the_server_drains(stub, fed):
    await created(stub)
    await stub.Join(join())
    stream = stub.Watch(pb.WatchRequest(federation_id="fed", client_id="a"))
    assert (await stream.read()).WhichOneof("work") == "wait"
    fed.changes.close()
    assert await stream.read() is grpc.aio.EOF


async def test_a_stranger_cannot_watch(stub):
    await created(stub)
    async with refused(Reason.CLIENT_UNKNOWN):
        await stub.Watch(pb.WatchRequest(federation_id="fed", client_id="x")).read()


async def collecting(fed) -> pb.RoundRef:
    await fed.begin(spec("none"))
    await fed.settle()
    return (await fed.assignment("a")).train.round


def commit_request(fed, round_, client="a", **fields) -> pb.CommitUpdateRequest:
    digests = fed.aggregation.put(round_.round_id, client, len(round_.layout.shards))
    update = fed.update(client, round_, digests)
    values = {
        "federation_id": "fed",
        "round_id": round_.round_id,
        "client_id": client,
        "layout_digest": bytes.fromhex(update.layout_digest),
        "shards": digests,
        "rank": 4,
        "scaling": 2.0,
        "report": pb.UpdateReport(example_count=10, train_loss=0.5),
    }
    return pb.CommitUpdateRequest(**{**values, **fields})


async def test_a_commit_is_counted_once_and_shown_with_its_report(stub, fed):
    request = commit_request(fed, await collecting(fed))
    assert (await stub.CommitUpdate(request)).update_count == 1
    assert (await stub.CommitUpdate(request)).update_count == 1
    assert fed.aggregation.sealed == {(request.round_id, "a")}
    request.rank = 3
    async with refused(Reason.UPDATE_REWRITTEN):
        await stub.CommitUpdate(request)
    shown = await stub.GetFederation(pb.GetFederationRequest(federation_id="fed"))
    assert shown.current.update_count == 1
    assert [(u.client_id, u.example_count, u.train_loss) for u in shown.current.updates] == [("a", 10, 0.5)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"scaling": 0.0}, Reason.INVALID_ARGUMENT),
        ({"scaling": float("inf")}, Reason.INVALID_ARGUMENT),
        ({"scaling": 1.1e4}, Reason.INVALID_ARGUMENT),
        ({"rank": 5}, Reason.INVALID_ARGUMENT),
        ({"rank": 0}, Reason.INVALID_ARGUMENT),
        ({"report": pb.UpdateReport(example_count=0)}, Reason.INVALID_ARGUMENT),
        ({"report": pb.UpdateReport(example_count=10**9 + 1)}, Reason.INVALID_ARGUMENT),
        ({"report": pb.UpdateReport(example_count=1, train_s=float("nan"))}, Reason.INVALID_ARGUMENT),
        ({"shards": []}, Reason.INVALID_ARGUMENT),
        ({"layout_digest": b"short"}, Reason.INVALID_ARGUMENT),
        ({"layout_digest": b"x" * 32}, Reason.LAYOUT_MISMATCH),
        ({"round_id": "fed.00000001.9"}, Reason.ROUND_UNKNOWN),
        ({"client_id": "d", "report": pb.UpdateReport(example_count=1)}, Reason.NOT_IN_COHORT),
    ],
)
async def test_a_commit_that_does_not_fit_its_round_is_refused(stub, fed, fields, reason):
    request = commit_request(fed, await collecting(fed), **fields)
    async with refused(reason):
        await stub.CommitUpdate(request)
    assert (await fed.shown()).current.update_count == 0


async def test_a_commit_of_shards_that_have_not_arrived_is_refused(stub, fed):
    request = commit_request(fed, await collecting(fed))
    fed.aggregation.updates.clear()
    async with refused(Reason.SHARD_MISSING, "send them first"):
        await stub.CommitUpdate(request)


async def test_a_round_is_opened_for_its_cohort_up_to_the_rank_of_each(fed):
    await fed.begin(spec("none"), clients="ac")
    await fed.join("b", rank=2)
    await fed.settle()
    round_ = (await fed.assignment("a")).train.round
    assert fed.aggregation.ranks[round_.round_id] == {"a": 4, "b": 2, "c": 4}


async def test_a_commit_whose_shards_are_replaced_meanwhile_is_refused(stub, fed):
    round_ = await collecting(fed)
    request = commit_request(fed, round_)
    others = len(round_.layout.shards)
    fed.aggregation.after_query = lambda: fed.aggregation.put(round_.round_id, "a", others, "other")
    async with refused(Reason.SHARD_MISSING, "not these"):
        await stub.CommitUpdate(request)
    assert (await fed.shown()).current.update_count == 0


async def test_a_late_commit_is_refused_but_a_repeated_one_still_has_its_receipt(stub, fed):
    round_ = await collecting(fed)
    requests = [commit_request(fed, round_, client) for client in "abc"]
    for request in requests[:2]:
        await stub.CommitUpdate(request)
    fed.now_ms += 60_000
    await fed.settle()
    assert (await stub.CommitUpdate(requests[1])).update_count == 2
    async with refused(Reason.ROUND_NOT_COLLECTING):
        await stub.CommitUpdate(requests[2])


def messages(client, number, sealed, matrices):
    digest = Digest.of(sealed)
    header = pb.PublishPlanHeader(
        federation_id="fed",
        client_id=client,
        plan_number=number,
        digest=common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes),
        matrices=matrices,
    )
    return [pb.PublishPlanRequest(header=header), *(pb.PublishPlanRequest(piece=p) for p in cut(sealed))]


async def test_a_plan_goes_through_in_pieces_and_only_from_the_leader(stub, fed):
    await fed.begin(spec())
    await fed.settle()
    await fed.act()
    await fed.settle()
    work = (await fed.assignment("a")).make_plan
    for matrix in work.matrices:
        matrix.tier_columns.append(3)
    sealed = bytes(range(256)) * 4096
    async with refused(Reason.NOT_LEADER):
        await call_with_stream(stub.PublishPlan, lambda: iter(messages("b", 1, sealed, work.matrices)))
    truncated = messages("a", 1, sealed, work.matrices)[:-1]
    async with refused(Reason.TRANSFER_TRUNCATED):
        await call_with_stream(stub.PublishPlan, lambda: iter(truncated))
    async with refused(Reason.PLAN_UNKNOWN):
        await stub.GetPlan(pb.GetPlanRequest(federation_id="fed", plan_number=1)).read()
    for _ in range(2):
        await stub.PublishPlan(iter(messages("a", 1, sealed, work.matrices)))
    stream = stub.GetPlan(pb.GetPlanRequest(federation_id="fed", plan_number=1))
    assert b"".join([r.piece async for r in stream]) == sealed
    reject = pb.RejectPlanRequest(
        federation_id="fed", client_id="c", plan_number=1, sha256=Digest.of(sealed).sha256, why="no"
    )
    await fed.settle()
    await stub.RejectPlan(reject)
    reject.client_id = "b"
    await stub.RejectPlan(reject)
    await fed.settle()
    await stub.RejectPlan(reject)
    async with refused(Reason.PLAN_UNKNOWN):
        await stub.GetPlan(pb.GetPlanRequest(federation_id="fed", plan_number=1)).read()


async def test_evaluations_are_shown_with_their_round(stub, fed):
    await fed.begin(spec("none", rounds=1))
    record = await fed.play()
    report = pb.EvaluationReport(
        client_id="a", example_count=10, correct_count=9, loss=0.25, download_bytes=7
    )
    request = pb.ReportEvaluationRequest(federation_id="fed", round_id=record.round_id(1), report=report)
    await_evaluations("fed")
    right, wrong = predicted("right"), predicted("wrong")
    for _ in range(2):
        await stub.ReportEvaluation(request)
    assert (predicted("right"), predicted("wrong")) == (right + 18, wrong + 2)
    (ended,) = (await stub.GetFederation(pb.GetFederationRequest(federation_id="fed"))).history
    assert list(ended.evaluations) == [report]
    assert (ended.aggregate_cpu_s, ended.shards_done, ended.shard_count) == (0.5, 2, 2)
    request.report.correct_count = 11
    async with refused(Reason.INVALID_ARGUMENT, "correct_count"):
        await stub.ReportEvaluation(request)
    request.report.example_count = 10**9 + 1
    async with refused(Reason.INVALID_ARGUMENT, "example_count"):
        await stub.ReportEvaluation(request)


async def test_means_are_shown_as_they_were_told_and_refused_if_they_cannot_be(stub, fed):
    await fed.begin(spec("none", rounds=1))
    record = await fed.play()
    means = pb.MeanFigures(accuracy=0.0, loss=-0.5)
    report = pb.EvaluationReport(client_id="a", decrypt_s=1.0, means=means)
    request = pb.ReportEvaluationRequest(federation_id="fed", round_id=record.round_id(1), report=report)
    await stub.ReportEvaluation(request)
    (ended,) = (await stub.GetFederation(pb.GetFederationRequest(federation_id="fed"))).history
    assert list(ended.evaluations) == [report], "a zero that was told is one, and what was not told is absent"
    for name, value in (("accuracy", 1.5), ("accuracy", -0.1), ("loss", math.nan), ("train_loss", math.inf)):
        impossible = pb.ReportEvaluationRequest()
        impossible.CopyFrom(request)
        setattr(impossible.report.means, name, value)
        async with refused(Reason.INVALID_ARGUMENT, "means"):
            await stub.ReportEvaluation(impossible)


async def test_the_first_evaluation_is_seen_to_increase_its_counter(stub, fed):
    await fed.begin(spec("none"))
    TESTED.remove_by_labels({"federation": "fed"})
    watching = stub.Watch(pb.WatchRequest(federation_id="fed", client_id="a"))
    await watching.read()
    watching.cancel()
    assert (predicted("right"), predicted("wrong")) == (0, 0)


async def test_history_comes_page_by_page_and_complete(stub, fed, monkeypatch):
    monkeypatch.setattr(render, "HISTORY_BYTES", 1)
    await fed.begin(spec("none", rounds=3))
    await fed.play()
    request = pb.GetFederationRequest(federation_id="fed")
    page = await stub.GetFederation(request)
    assert len(page.members) == 3
    pages = [page]
    while page.more_history:
        request.view = pb.FEDERATION_VIEW_HISTORY
        request.history_after = page.history[-1].sequence
        page = await stub.GetFederation(request)
        assert not page.members
        pages.append(page)
    assert [[summary.number for summary in page.history] for page in pages] == [[1], [2], [3]]
    whole = await Operator(stub).get("fed")
    assert [summary.number for summary in whole.history] == [1, 2, 3]
    assert not whole.more_history


async def test_what_an_agent_asks_for_and_a_list_do_not_grow_with_the_cohort(stub, fed):
    await fed.begin(spec("none", rounds=2))
    await fed.play()
    request = pb.GetFederationRequest(federation_id="fed", view=pb.FEDERATION_VIEW_SPECIFICATION)
    (listed,) = (await stub.ListFederations(pb.ListFederationsRequest())).federations
    for found in (await stub.GetFederation(request), listed):
        assert (len(found.members), len(found.history)) == (0, 0)
        assert (found.member_count, found.trained_rounds) == (3, 2)
        assert found.phase == pb.PHASE_FINISHED


async def test_an_ended_federation_takes_no_more_clients(stub, fed):
    await fed.begin(spec("none", rounds=1))
    await fed.play()
    async with refused(Reason.FEDERATION_CLOSED):
        await stub.Join(join("late"))
    async with refused(Reason.FEDERATION_CLOSED):
        await stub.StartFederation(pb.StartFederationRequest(federation_id="fed"))


async def test_a_ballot_is_cast_over_the_wire_and_a_stream_without_header_is_refused(stub, fed):
    await stub.CreateFederation(pb.CreateFederationRequest(spec=spec(negotiation="ope").to_proto()))
    for client in "abc":
        await stub.Join(join(client))
    await stub.StartFederation(pb.StartFederationRequest(federation_id="fed"))
    await fed.settle()
    data, round_id = fed.ballot("a"), (await fed.assignment("a")).vote.round.round_id

    def parts(with_header=True):
        digest = Digest.of(data)
        announced = common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes)
        if with_header:
            header = pb.CastBallotHeader(
                federation_id="fed",
                round_id=round_id,
                client_id="a",
                digest=announced,
                report=pb.UpdateReport(example_count=1),
            )
            yield pb.CastBallotRequest(header=header)
        for piece in cut(data):
            yield pb.CastBallotRequest(piece=piece)

    assert (await stub.CastBallot(parts())).ballot_count == 1
    async with refused(Reason.INVALID_ARGUMENT, "the first message must be the header"):
        await call_with_stream(stub.CastBallot, lambda: parts(with_header=False))


@pytest.fixture
def converted(monkeypatch):
    """How many digests and matrices were made of what arrived."""
    made = Counter()

    def counting(name):
        original = getattr(checks, name)

        def counted(*arguments):
            made[name] += 1
            return original(*arguments)

        monkeypatch.setattr(checks, name, counted)

    for name in ("digest_from_proto", "matrix_from_proto", "tensor_shape"):
        counting(name)
    return made


async def test_a_flood_of_repeated_fields_is_refused_before_it_is_converted(stub, fed, converted):
    """200 000 matrices in a header and 100 000 digests in a commit stopped everyone for seconds."""
    round_ = await collecting(fed)
    converted.clear()
    many = [common_pb2.Matrix(name=str(i), out_features=1, in_features=1) for i in range(16_000)]
    async with refused(Reason.MODEL_MISMATCH):
        await stub.Join(join(matrices=many))
    assert converted["matrix_from_proto"] <= len(MATRICES) + 1
    converted.clear()
    tensors = [common_pb2.Tensor(name=str(i), shape=[1]) for i in range(16_000)]
    async with refused(Reason.MODEL_MISMATCH):
        await stub.Join(join(tensors=tensors))
    assert converted["tensor_shape"] <= len(TENSORS) + 1

    digests = [common_pb2.ShardDigest(sha256=bytes(32), total_bytes=1)] * 50_000
    flood, commit = commit_request(fed, round_, shards=digests), commit_request(fed, round_)
    converted.clear()
    async with refused(Reason.INVALID_ARGUMENT):
        await stub.CommitUpdate(flood)
    async with refused(Reason.NOT_LEADER):
        await call_with_stream(stub.PublishPlan, lambda: iter(messages("a", 1, b"x", many)))
    assert not converted
    await stub.CommitUpdate(commit)  # the control: as many as there are shards are converted
    assert converted == {"digest_from_proto": len(round_.layout.shards)}


async def test_nobody_makes_the_others_pay_for_a_rank(stub, fed):
    """Rank 1024 for small matrices cost the others fourteen times the traffic."""
    await fed.begin(spec("none"))
    async with refused(Reason.INVALID_ARGUMENT, "at most 8, the most that a matrix of the model holds"):
        await stub.Join(join(rank=9))
    async with refused(Reason.INVALID_ARGUMENT, "at most 64 in this federation (training.max_rank)"):
        await stub.Join(join(rank=65))
    await stub.Join(join("b", rank=8))
    await fed.settle()
    round_ = (await fed.assignment("a")).train.round
    assert round_.layout.max_rank == 8
    async with refused(Reason.INVALID_ARGUMENT, "at most 4, the rank that this client joined with"):
        await stub.CommitUpdate(commit_request(fed, round_, rank=5))
    await stub.CommitUpdate(commit_request(fed, round_, rank=4))


@pytest.mark.parametrize(("most", "messages"), [(0, 70), (1, 70), (2, 35), (64, 2), (70, 2), (2**32 - 1, 2)])
async def test_shares_come_as_many_in_a_message_as_were_asked_for(most, messages):
    sent = [committee_pb2.DealtShare(path=[bytes([i])]) for i in range(70)]

    async def dealt():
        for share in sent:
            yield committee_pb2.DealtShare.FromString(share.SerializeToString())

    shown = [message async for message in _together(dealt(), most)]
    assert len(shown) == messages
    every = [committee_pb2.DealtShare(path=each.path) for first in shown for each in (first, *first.further)]
    assert every == sent
