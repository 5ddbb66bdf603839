"""Whether the work at hand has room on disk and in memory."""

from dataclasses import replace
from typing import Final

from client_agent.downloads import Result
from client_agent.learning import weight_bytes
from client_agent.memory import MOMENT_SIZES, require_memory, result_bytes, round_bytes
from client_agent.participation import Participation, Tools
from client_agent.protection import expected_layout
from shelora.lora.kinds import largest_update_bytes
from shelora.lora.layout import Layout
from shelora.v1 import common_pb2

COPIES: Final = 5
"""Times that weights are written in a round: as applied, as before, as trained, as the adapter, perhaps as the best."""


class Resources:
    """Asks the disk and the memory before work begins."""

    def __init__(self, me: Participation, tools: Tools) -> None:
        self._me = me
        self._state = tools.state
        self._learner = tools.learner
        self._worker = tools.worker

    def require_memory(self) -> None:
        """Raises: MEMORY_UNAVAILABLE if this client's rounds need more, as far as that is known before the first."""
        model = self._learner.model
        layout = expected_layout(model, self._me.budget, self._me.protection)
        require_memory(round_bytes(model, layout, keeps_moments=self._me.keeps_moments))

    async def require(
        self, update: Layout | None, result: common_pb2.ResultRef | None = None, copies: int = 0
    ) -> None:
        """Deletes earlier updates if another one follows, and sees that the work at hand has room on disk and memory.

        Args: copies: Times that weights will be written beside those that are there.
        Raises: DISK_UNAVAILABLE, MEMORY_UNAVAILABLE.
        """
        copies *= MOMENT_SIZES if self._me.keeps_moments else 1
        needed, restoring = copies * weight_bytes(self._learner.model), 0
        if result is not None and not await self._worker.run(self._learner.holds, result.round_id):
            arrived = await self._worker.run(self._state.arrived_bytes, result.round_id)
            announced = Result.from_proto(result)
            needed += max(announced.total_bytes - arrived, 0)
            restoring = result_bytes(announced.layout, [shard.total_bytes for shard in announced.shards])
        if update is not None:
            await self._worker.run(self._state.drop_spool)
            own = replace(update, max_rank=min(update.max_rank, self._learner.model.rank))
            needed += sum(largest_update_bytes(own))
        self._state.require_room(needed)
        keeps = self._me.keeps_moments
        require_memory(round_bytes(self._learner.model, update, restoring, keeps_moments=keeps))
