"""Sends a spooled update and commits it."""

import structlog

from client_agent.metrics import ROUNDS
from client_agent.participation import Participation, Tools
from client_agent.progress import Activity
from client_agent.state import Spool
from client_agent.uploads import upload

_log = structlog.get_logger(__name__)


class Sender:
    """Uploads go to aggregation, commits to the coordinator."""

    def __init__(self, me: Participation, tools: Tools) -> None:
        self._client_id = me.client_id
        self._tools = tools

    async def send(self, spool: Spool, activity: Activity) -> None:
        """Can be repeated: what has arrived is not sent again, a commit counts once."""
        seconds = await upload(self._tools.replicas, self._client_id, spool, activity)
        count = await self._tools.session.commit(spool, seconds)
        ROUNDS.labels(outcome="committed").inc()
        _log.info(
            "update_committed", round=spool.note.round_id, bytes_sent=spool.total_bytes, update_count=count
        )
