"""What must hold after a drill, whatever happened in it."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis

from shelora.v1 import coordinator_pb2 as pb
from tests.chaos.auditor import Copies, RoundAudit


@dataclass(frozen=True)
class Finding:
    """One invariant and what was found against it."""

    invariant: str
    violations: tuple[str, ...]
    seen: str
    """How much was looked at."""

    @property
    def holds(self) -> bool:
        return not self.violations


def the_federation_ended(federation: pb.Federation, hangs: Sequence[str]) -> Finding:
    violations = list(hangs)
    if federation.phase != pb.PHASE_FINISHED and not federation.failure:
        violations.append(f"it is {pb.Phase.Name(federation.phase)} without a reason")
    seen = f"{pb.Phase.Name(federation.phase).removeprefix('PHASE_').lower()} {federation.failure}".strip()
    return Finding("nobody hangs: the federation ended and every agent left", tuple(violations), seen)


def abandoned_rounds_say_why(rounds: Sequence[RoundAudit]) -> Finding:
    abandoned = [audit for audit in rounds if not audit.published]
    wrong = tuple(a.title for a in abandoned if not (a.record.round.ended and a.record.round.reason))
    reasons = Counter(str(a.record.round.reason) for a in abandoned)
    seen = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return Finding("a round is published, or abandoned with its reason", wrong, f"{seen or 'none'} abandoned")


def every_commit_counts_once(rounds: Sequence[RoundAudit]) -> Finding:
    wrong = tuple(filter(None, (audit.miscount() for audit in rounds)))
    count = sum(len(audit.commits) for audit in rounds if audit.published)
    return Finding("every committed update is counted exactly once", wrong, f"{count} updates")


def results_are_the_sums(rounds: Sequence[RoundAudit], copies: Copies) -> Finding:
    published = [audit for audit in rounds if audit.published]
    wrong = tuple(filter(None, (audit.sum_error(copies) for audit in published)))
    shards = sum(len(audit.record.results) for audit in published)
    return Finding("a result is the sum of its updates, to the bit", wrong, f"{shards} shards")


def rounds_are_in_order(rounds: Sequence[RoundAudit], federation: pb.Federation) -> Finding:
    numbers = [a.record.round.number for a in rounds if a.published and a.record.round.number]
    wanted = list(range(1, len(numbers) + 1))
    wrong = [] if numbers == wanted else [f"published: {numbers}"]
    if federation.phase == pb.PHASE_FINISHED and len(numbers) != federation.spec.round.rounds:
        wrong.append(f"finished after {len(numbers)} rounds")
    return Finding("each round is published once, in order", tuple(wrong), f"{len(numbers)} rounds")


def one_set_a_draw(rounds: Sequence[RoundAudit], noted: Mapping[str, Mapping[int, str]]) -> Finding:
    """Members certify one set of one draw: the one that was proposed. `noted`: by agent, `auditor.certified`."""
    proposed: dict[int, str] = {}
    wrong = [
        f"{audit.title}: a second set is proposed of draw {audit.record.round.draw}"
        for audit in rounds
        if audit.proposed and proposed.setdefault(audit.record.round.draw, audit.proposed) != audit.proposed
    ]
    for name, sets in noted.items():
        wrong += [
            f"{name} certified a set of draw {draw} that was not proposed"
            for draw, digest in sets.items()
            if proposed.get(draw) != digest
        ]
    count = sum(map(len, noted.values()))
    return Finding(
        "no round number is opened for two sets", tuple(wrong), f"{len(proposed)} sets, {count} signatures"
    )


def no_sum_of_too_few(rounds: Sequence[RoundAudit]) -> Finding:
    wrong, count = [], 0
    for audit in rounds:
        record, least = audit.record, audit.record.round.min_updates
        sums = [len(record.contributors)] if record.proposed else []
        sums += [record.contributor_count] if audit.published else []
        count += bool(sums)
        wrong += [f"{audit.title}: a sum of {updates} updates" for updates in sums if updates < least]
    return Finding("no sum is of fewer updates than min_updates", tuple(wrong), f"{count} sums")


def spent_rounds_train_anew(rounds: Sequence[RoundAudit], logs: Mapping[str, Path]) -> Finding:
    """A draw whose set may have been certified is over, and no update that was made for it is sent for another one."""
    wrong, spent, draws = [], 0, {}
    for audit in rounds:
        round_ = audit.record.round
        draws[round_.round_id] = round_.draw
        if round_.convenes and round_.draw <= spent:
            wrong.append(f"{audit.title}: draw {round_.draw} is asked for again")
        spent = round_.draw if round_.spent else spent
    for name, path in logs.items():
        made: dict[str, set[int]] = defaultdict(set)
        variant = ""
        for event in events(path):
            if event["event"] in {"trained", "training_reused"}:
                variant = event["variant"]
            if variant and event["event"] == "update_committed" and draws.get(event["round"]):
                made[variant].add(draws[event["round"]])
        wrong += [f"{name} sent one update for draws {sorted(d)}" for d in made.values() if len(d) > 1]
    return Finding("a round that is spent is trained anew", tuple(wrong), f"{spent} draws are spent")


def nothing_is_trained_twice(logs: Mapping[str, Path]) -> Finding:
    wrong, count = [], 0
    for name, path in logs.items():
        trained = Counter(
            (event["round_number"], event["start"], event["variant"])
            for event in events(path)
            if event["event"] == "trained"
        )
        count += trained.total()
        wrong += [f"{name} trained round {what[0]} {n} times" for what, n in trained.items() if n > 1]
    return Finding("what was trained is not trained again", tuple(wrong), f"{count} trainings")


def nothing_that_arrived_is_sent_again(agents: Mapping[str, Path], servers: Iterable[Path]) -> Finding:
    stored: dict[tuple[str, str, int], str] = {}
    for path in servers:
        for event in events(path):
            if event["event"] == "shard_stored":
                key = (event["round_id"], event["client_id"], event["shard"])
                stored[key] = min(event["timestamp"], stored.get(key, event["timestamp"]))
    wrong, sent = [], 0
    for name, path in agents.items():
        resets = defaultdict(list)
        for event in events(path):
            if event["event"] == "shard_upload":
                sent += 1
                arrived = stored.get((event["round"], name, event["shard"]))
                if arrived is not None and event["timestamp"] > arrived:
                    resets[event["round"], event["shard"]].append(event)
        wrong += [f"{name} sent shard {key[1]} of {key[0]} again, which had arrived" for key in resets]
    return Finding(
        "what has arrived is not sent again", tuple(wrong), f"{sent} uploads of {len(stored)} shards"
    )


def nobody_left_by_itself(exits: Sequence[str]) -> Finding:
    return Finding("no process ended but those that were told to", tuple(exits), "")


def nothing_broke_unseen(logs: Iterable[Path]) -> Finding:
    """No log holds a traceback: every failure had its reason."""
    wrong = []
    for path in logs:
        for event in events(path):
            if "exception" in event or event["event"] in {"rpc_failed_unexpectedly", "process_failed"}:
                last = str(event.get("exception", "")).strip().splitlines()[-1:]
                wrong.append(f"{path.stem}: {event['event']}: {' '.join(last)}")
    counted = Counter(wrong)
    return Finding(
        "every failure had a named reason", tuple(f"{what} ({n} times)" for what, n in counted.items()), ""
    )


def keys_expire(redis_url: str) -> Finding:
    with redis.Redis.from_url(redis_url) as client:
        keys = list(client.scan_iter())
        lasting = tuple(key.decode() for key in keys if client.ttl(key) == -1)
    return Finding("every key in Redis expires", lasting, f"{len(keys)} keys")


def no_orphans(groups: Sequence[int]) -> Finding:
    """`groups`: process groups of everything that was started; all must be gone."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            group = psutil.os.getpgid(process.pid)
        except ProcessLookupError:
            continue
        if group in groups and process.status() != psutil.STATUS_ZOMBIE:
            left.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])}")
    return Finding("no process is left behind", tuple(left), f"{len(groups)} were started")


def events(log: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON log; lines of libraries are left out."""
    with log.open(errors="replace") as lines:
        for line in lines:
            if line.startswith("{"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the process was killed while it wrote
