"""How strongly a federation protects updates, as one ordered scale: what agents are promised, and hold servers to."""

from enum import StrEnum
from typing import Final


class Level(StrEnum):
    """Levels of protection, the weakest first."""

    NONE = "none"
    """Everything travels in the clear."""
    SELECTIVE_OPE = "selective-ope"
    """Columns of A and whole tensors are encrypted; the coordinator sees the order of scores (`negotiation: ope`, or
    `ope-refined`)."""
    SELECTIVE = "selective"
    """Columns of A and whole tensors are encrypted, and so are the votes that choose the columns."""
    COMPLETE = "complete"
    """Nothing travels in the clear."""

    @classmethod
    def of(cls, mode: str, negotiation: str) -> "Level":
        """The level of a federation whose protection has that mode and negotiation.

        A strategy without a place on the scale counts as `none`: agents take part if their owners write that.
        """
        if (mode, negotiation) in {(cls.SELECTIVE, "ope"), (cls.SELECTIVE, "ope-refined")}:
            return cls.SELECTIVE_OPE
        return cls(mode) if mode in set(cls) else cls.NONE

    @property
    def strength(self) -> int:
        """Place on the scale, from 0."""
        return list(Level).index(self)


WEAKEST_PROTECTED: Final = Level.SELECTIVE_OPE
"""What an agent asks for at least if nobody told it anything."""
