"""The sums of an encrypted vote: downloaded, decrypted, read by column."""

from collections.abc import Mapping

from client_agent.downloads import Result, contents, download
from client_agent.keys import EpochSecrets
from client_agent.metrics import timed
from client_agent.participation import Participation, Tools
from client_agent.progress import Activity
from client_agent.protection import check_vote_layout
from client_agent.resources import Resources
from client_agent.state import Inbox
from shelora.lora.restore import Restored, restore
from shelora.lora.shards import Float64
from shelora.negotiation.votes import summed_scores
from shelora.protocol import Stage
from shelora.v1 import common_pb2


class VoteSums:
    """Reads published votes."""

    def __init__(self, me: Participation, tools: Tools, resources: Resources) -> None:
        self._me = me
        self._tools = tools
        self._resources = resources

    async def read(
        self, reference: common_pb2.ResultRef, secrets: EpochSecrets, activity: Activity
    ) -> Mapping[str, Float64]:
        """Summed scores of the columns, by matrix. Raises: as a download; LAYOUT_MISMATCH."""
        tools, result = self._tools, Result.from_proto(reference)
        await self._resources.require(None, reference)
        check_vote_layout(result.layout, tools.learner.model, self._me.protection)
        inbox = await download(tools.replicas, tools.state, result, activity)
        restored = await tools.worker.run(_summed, result, inbox, secrets, activity)
        inbox.clear()
        return summed_scores(tools.learner.model.matrices, restored.tensors)


def _summed(result: Result, inbox: Inbox, secrets: EpochSecrets, activity: Activity) -> Restored:
    """Decrypts a downloaded vote."""
    with timed(Stage.DECRYPTING):
        decryptor = secrets.decryptor_for(result.layout)
        return restore(result.layout, contents(result, inbox, activity), {}, decryptor)
