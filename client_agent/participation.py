"""Who this client is in a federation, and what it works with: handed to every part of its work."""

from dataclasses import dataclass

from client_agent.learning import LocalLearner
from client_agent.session import Session
from client_agent.state import AgentState
from client_agent.worker import Worker
from shelora.federation import ProtectionSpec
from shelora.transport.replicas import Replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Participation:
    """Who this client is and what it committed to."""

    federation_id: str
    client_id: str
    budget: float
    """Share of columns it encrypts, 0 to 1."""
    protection: ProtectionSpec
    reports_drift: bool = False
    """Whether the federation asks how far top columns have moved from the plan."""
    largest_move: float = 0.0
    """How far local training can move one value at most: learning rate times local steps."""
    evaluation_every: int = 1
    """Rounds from one evaluation of a result to the next."""
    examples_a_round: int = 0
    """Different examples that training takes in a round, at most."""
    keeps_moments: bool = False
    """Whether its optimizer goes on from round to round, so that what is kept of weights is three times as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What this client works with."""

    session: Session
    """Calls to the coordinator and the key authority."""
    replicas: Replicas
    """Aggregation."""
    state: AgentState
    """On disk."""
    learner: LocalLearner
    worker: Worker
    """The one thread for blocking work."""
