"""What an agent and its coordinator must agree on beyond the messages themselves."""

from enum import StrEnum
from typing import Final

from shelora.text import printable

PROTOCOL_VERSION: Final = 1
"""Of the protocol between agents and the coordinator; joining says it."""


MAX_WHY: Final = 500
"""Characters of what one party tells another in words."""


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
    FINISHED = "finished"
    """It has the final adapter; nothing follows."""
    PAUSED = "paused"
    """The device is needed otherwise or not plugged in, or work that failed waits to be tried again."""


def plain(words: str) -> str:
    """Words as they may travel: printable, in one line, at most MAX_WHY characters."""
    return printable(" ".join(words.split()))[:MAX_WHY]
