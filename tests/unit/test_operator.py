"""Reading a federation again reads what can have changed, and notices that another one has its name."""

from shelora.operator import REREAD_ROUNDS, Operator
from shelora.v1 import coordinator_pb2 as pb

PAGE = 5


class Stub:
    """Serves a history page by page, as the coordinator does."""

    def __init__(self, rounds):
        self.federation = federation(rounds)
        self.sent = 0

    async def GetFederation(self, request, **_):
        later = [r for r in self.federation.history if r.sequence > request.history_after]
        answer = pb.Federation(federation_id="f", history=later[:PAGE], more_history=len(later) > PAGE)
        self.sent += len(answer.history)
        return answer


def federation(rounds, name="a"):
    history = [pb.RoundSummary(sequence=n, round_id=f"{name}{n}") for n in range(1, rounds + 1)]
    return pb.Federation(federation_id="f", history=history)


async def test_only_the_newest_rounds_are_read_again_and_their_late_reports_with_them():
    stub = Stub(100)
    operator = Operator(stub)
    known = (await operator.get("f")).history
    assert (len(known), stub.sent) == (100, 100)
    stub.federation.history[-1].evaluations.add(client_id="late")
    stub.federation.history.append(pb.RoundSummary(sequence=101, round_id="a101"))
    stub.sent = 0
    found = await operator.get("f", known)
    assert found.history == stub.federation.history
    assert stub.sent == REREAD_ROUNDS + 1


async def test_a_federation_that_was_deleted_and_made_anew_is_read_whole():
    stub = Stub(100)
    operator = Operator(stub)
    known = (await operator.get("f")).history
    for rounds in (3, 100, 120):
        stub.federation = federation(rounds, "b")
        assert (await operator.get("f", known)).history == stub.federation.history


async def test_a_history_shorter_than_what_is_read_again_is_read_whole():
    stub = Stub(REREAD_ROUNDS - 1)
    operator = Operator(stub)
    known = (await operator.get("f")).history
    stub.federation.history.append(pb.RoundSummary(sequence=REREAD_ROUNDS, round_id="x"))
    assert (await operator.get("f", known)).history == stub.federation.history
