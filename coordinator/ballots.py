"""Votes by ballots (negotiation "ope"): the coordinator's side, on its records."""

from hashlib import sha256

from coordinator.records import FederationRecord, RankedList, RoundRecord, StoredDigest, Update
from shelora.negotiation.ballots import Ballot, Tally, ballot_bytes
from shelora.negotiation.ranking import Ranking, tier_ends, total_columns
from shelora.rounds import RoundKind


def takes_ballots(federation: FederationRecord, record: RoundRecord) -> bool:
    """Whether a round is a vote whose ballots come here, and not to aggregation."""
    return federation.ballots and record.round.kind is RoundKind.VOTE


def most_columns(federation: FederationRecord, budget: float) -> int:
    """Columns that a client of this budget may name."""
    return tier_ends([budget], total_columns(federation.matrices))[0]


def most_bytes(federation: FederationRecord) -> int:
    """Size of a ballot that names every column."""
    return ballot_bytes(total_columns(federation.matrices))


def opened_ballot(data: bytes, federation: FederationRecord, budget: float = 1.0) -> Ballot:
    """Raises BALLOT_REFUSED."""
    return Ballot.decode(data, total_columns(federation.matrices), most_columns(federation, budget))


def is_of(data: bytes, update: Update) -> bool:
    """Whether this is the ballot that was committed."""
    return [sha256(data).hexdigest()] == [digest.sha256 for digest in update.shards]


def ranked_list(
    tally: Tally, federation: FederationRecord, tiers: tuple[float, ...]
) -> tuple[RankedList | None, bytes]:
    """What is kept of the ranking, and its encoded form; None if no member affords encryption."""
    if not tiers:
        return None, b""
    matrices = federation.matrices
    length = tier_ends(tiers, total_columns(matrices))[-1]
    ranking = Ranking(tiers, tally.rank(length, federation.spec.protection.common_weight))
    encoded = ranking.encode()
    digest = StoredDigest(sha256=sha256(encoded).hexdigest(), total_bytes=len(encoded))
    columns = tuple(m.tier_columns for m in ranking.matrices_with_counts(matrices))
    return RankedList(digest=digest, tiers=tiers, tier_columns=columns), encoded
