"""What an agent and its coordinator must agree on beyond the messages themselves."""

from enum import StrEnum
from typing import Final

PROTOCOL_VERSION: Final = 1
"""Of the protocol between agents and the coordinator; joining says it."""


class Stage(StrEnum):
    """What an agent is doing, as heartbeats name it."""

    IDLE = "idle"
    SCORING = "scoring"
    TRAINING = "training"
    ENCRYPTING = "encrypting"
    UPLOADING = "uploading"
    DOWNLOADING = "downloading"
    DECRYPTING = "decrypting"
    EVALUATING = "evaluating"
    PAUSED = "paused"
    """The device is needed otherwise or not plugged in, or work that failed waits to be tried again."""
