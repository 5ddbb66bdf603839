"""What is committed with an update, where a test does not look at it."""

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
