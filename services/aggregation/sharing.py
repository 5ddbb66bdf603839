"""How workers share one shard: each takes parts that nobody has taken, until there are none.

One worker leads, whose request the coordinator waits for: it keeps its parts' sum and adds what the others have stored.
The others help, on any replica. There is no lease and no help that is needed: a part that nobody has stored by the time
everything else is in is made by the leader, whatever became of its taker. What is stored in between expires by itself.
"""

import time
from collections.abc import Iterable
from typing import Final

from services.aggregation.records import AggregationRequest
from services.aggregation.store import WorkerStore
from shelora.lora.aggregate import Aggregation
from shelora.lora.kind import ShardSum

PATIENCE: Final = 1.0
"""How long the leader waits for those in the middle of a part: times its own slowest part. It would make it itself
in that time, and has nothing else to do."""
POLL_S: Final = 0.02


def led(store: WorkerStore, request: AggregationRequest, work: Aggregation) -> tuple[bytes, float]:
    """The result, and the CPU seconds that helpers spent on it."""
    total, left, slowest_s = work.sum(_common(store, request, work)), [], 0.0
    for part in range(work.parts):
        if store.take(request, part):
            start_s = time.monotonic()
            work.add(total, part)
            slowest_s = max(slowest_s, time.monotonic() - start_s)
        else:
            left.append(part)
    left, helped_s = _with_others(store, request, total, left, PATIENCE * slowest_s)
    for part in left:
        work.add(total, part)
    return work.finished(total), helped_s


def helped(store: WorkerStore, request: AggregationRequest, work: Aggregation) -> int:
    """Makes parts until none is left that nobody has taken. Returns how many."""
    made, common = 0, None
    for part in range(work.parts):
        if not store.is_wanted(request):
            break
        if store.take(request, part):
            start_s = time.process_time()
            if common is None:
                common = _common(store, request, work)
            total = work.sum(common)
            work.add(total, part)
            store.put_partial(request, part, total.partial(), time.process_time() - start_s)
            made += 1
    return made


def _common(store: WorkerStore, request: AggregationRequest, work: Aggregation) -> bytes:
    """What all parts share: the first one stored, as another machine's may differ in its last bits."""
    found = store.common(request)
    return store.keep_common(request, work.common()) if found is None else found


def _with_others(
    store: WorkerStore, request: AggregationRequest, total: ShardSum, left: Iterable[int], patience_s: float
) -> tuple[list[int], float]:
    """Adds the parts that others have stored, or store soon. Returns those that they have not, and CPU seconds."""
    end_s, helped_s, missing = time.monotonic() + patience_s, 0.0, list(left)
    while missing:
        left, missing = missing, []
        for part in left:
            found = store.partial(request, part)
            if found is None:
                missing.append(part)
                continue
            total.merge(found.data)
            helped_s += found.cpu_s
        if time.monotonic() >= end_s:
            break
        time.sleep(POLL_S)
    return missing, helped_s
