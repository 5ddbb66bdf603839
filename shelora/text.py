"""Text of unknown origin as a terminal may show it: no character in it moves the cursor or hides another."""

import re
from typing import Final

_UNSAFE: Final = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1: escape sequences begin with one of them
    "\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, invisible, lines
    "\ud800-\udfff"  # halves of a pair, as in file names that are no UTF-8
    "\U000e0000-\U000e007f"  # tags
    "]"
)
_BESIDES_LINES: Final = re.compile(rf"(?!\n){_UNSAFE.pattern}")

_ASCII: Final = {
    **dict.fromkeys("·•–—", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "…": "~",
    "×": "x",
    "±": "~",
    "✓": "+",
}


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with control characters, and those that change the direction of writing, as escapes such as `\x1b`.

    Args:
        text: From a peer, a file, a name.
        lines: Leaves line breaks as they are: for text of our own, around what comes from elsewhere.
    """
    return (_BESIDES_LINES if lines else _UNSAFE).sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def replaced(text: str) -> str:
    """What stands for `text` where an encoding lacks its characters: ASCII, a character each for those we use."""
    return "".join(_replaced(character) for character in text)


def _replaced(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    if "\u2500" <= character <= "\u257f":  # lines of tables
        return {"─": "-", "━": "-", "│": "|", "┃": "|"}.get(character, "+")
    if "\u2580" <= character <= "\u259f" or "\u2800" <= character <= "\u28ff":  # blocks, spinners
        return "#"
    return character.encode("ascii", "backslashreplace").decode("ascii")
