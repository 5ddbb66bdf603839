"""What agents measured, out of their own folders: for whoever has all of them, as a demo does."""

from collections.abc import Mapping
from pathlib import Path

from client_agent.measured import Measured
from shelora.v1 import coordinator_pb2 as pb


def with_own_figures(federation: pb.Federation, states: Mapping[str, Path]) -> pb.Federation:
    """The federation as if its agents had reported what they measured themselves, also where servers must not know it.

    Args: states: State folders by agent.
    """
    told = pb.Federation()
    told.CopyFrom(federation)
    for agent, folder in states.items():
        results = Measured(folder).results()
        for summary in told.history:
            if own := results.get(summary.round_id, {}).get("own"):
                report = _report_of(summary, agent)
                report.example_count, report.correct_count = own["count"], own["correct"]
                report.loss = own["loss"]
    return told


def _report_of(summary: pb.RoundSummary, agent: str) -> pb.EvaluationReport:
    """The agent's report on the round's result; a new one if it sent none."""
    sent = [report for report in summary.evaluations if report.client_id == agent]
    return sent[0] if sent else summary.evaluations.add(client_id=agent)
