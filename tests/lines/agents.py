"""`python -m tests.lines.agents agent.yaml`: a real agent with a large update; only its learner is a stand-in."""

import sys
from pathlib import Path

from client_agent.agent import Outcome
from client_agent.config import AgentConfig
from client_agent.daemon import run
from client_agent.state import AgentState
from load.learner import SyntheticLearner, SyntheticModel
from shelora.federation import TrainingSpec
from shelora.lora.layout import Matrix
from tests.lines.scale import FULL_BYTES, SCALE

WIDTH = 2048
MATRIX_BYTES = 124_600
"""Of one matrix at rank 8 in an update of `complete`."""
MATRICES = tuple(
    Matrix(f"layer.{index}.projection", WIDTH, WIDTH)
    for index in range(round(FULL_BYTES / SCALE / MATRIX_BYTES))
)


class LargeLearner(SyntheticLearner):
    """Draws updates of many matrices."""

    def __init__(self, config: AgentConfig, spec: TrainingSpec, state: AgentState, rounds: int) -> None:
        super().__init__(config, spec, state, rounds)
        self.model = SyntheticModel(rank=config.lora.rank, scaling=config.lora.scaling, matrices=MATRICES)


if __name__ == "__main__":
    sys.exit(run(AgentConfig.load(Path(sys.argv[1])), lambda: LargeLearner) is not Outcome.FINISHED)
