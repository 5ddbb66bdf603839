"""What is noted of updates and of adapters, where a test does not look at it."""

from client_agent.adapters import Ranked
from client_agent.state import UpdateNote

NOTE = UpdateNote(
    round_id="films/1",
    layout_digest=b"d" * 32,
    rank=4,
    scaling=2.0,
    example_count=20,
    train_loss=0.5,
    train_s=1.5,
    encrypt_s=0.1,
)


def ranked(federation: str, number: int, loss: float, *, settled: bool = False) -> Ranked:
    """What is noted of an adapter; the digest of its result follows from the number.

    Args: federation: Name and instance.
    """
    return Ranked(
        round_id=f"{federation}.{number}",
        number=number,
        digest=f"{number:064x}",
        loss=loss,
        settled=settled,
    )
