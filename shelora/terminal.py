"""What people see on a terminal, in a pipe or in a file, wherever it comes from: one console for all commands.

Square brackets are text, never markup. Control characters are shown, not obeyed. What an encoding lacks is replaced.
A table that is too wide becomes a list. Progress into a pipe is a line a stage.
"""

import codecs
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import IO, Any, Final

import typer
from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from shelora.errors import DomainError
from shelora.exits import EXIT_FAILED
from shelora.text import printable, replaced

READABLE_COLUMN: Final = 20
"""Characters below which a column of sentences is not narrowed: a word a line is no column."""
_ERRORS: Final = "shelora.replaced"
_UNBOUNDED: Final = 10_000
_UNWRITABLE: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EBADF, errno.EMFILE, errno.ENFILE}
)
"""What a write fails with that is the machine's fault, not the program's."""


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return replaced(error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _replacement)


class Terminal(Console):
    """A console that shows text as it is.

    Args:
        stderr: Writes to standard error.
        width: Characters a line; None for those of the terminal, or COLUMNS.
        file: Where to write instead.
    """

    def __init__(
        self, *, stderr: bool = False, width: int | None = None, file: IO[str] | None = None
    ) -> None:
        super().__init__(stderr=stderr, width=width, file=file, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Lines of segments, of which those that are text hold no control character."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, lines=True)
            yield segment if text == segment.text else Segment(text, segment.style)

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - as rich's
        """As rich's. What standard error does not take is lost: nobody is left to tell, and exit codes stay."""
        try:
            super().print(*objects, **options)
        except OSError:
            if not self.stderr:
                raise
            _abandon(sys.stderr)

    def say(self, text: str, style: str = "") -> None:
        """A sentence; into a pipe, a line."""
        self.print(Text(text, style=style), soft_wrap=not self.is_terminal)

    def refuse(self, error: DomainError, what: str = "") -> None:
        """A refusal: its reason, and what to do."""
        self.print(Text.assemble((f"{what}{error.reason}", "red"), f" {error.message}"), soft_wrap=True)

    @contextmanager
    def stages(self, first: str) -> Iterator[Callable[[str], None]]:
        """Shows what is going on: on a terminal in one place while it lasts, else a line for every stage.

        Yields: Takes the name of the next stage.
        """
        if not self.is_terminal:
            self.say(first)
            yield self._lines(first)
            return
        spinner = "line" if self.options.ascii_only else "dots"
        with self.status(Text(first), spinner=spinner) as status:
            yield lambda stage: status.update(Text(stage))

    def _lines(self, told: str) -> Callable[[str], None]:
        def tell(stage: str) -> None:
            nonlocal told
            if stage != told:
                self.say(stage)
            told = stage

        return tell


class Records(ConsoleRenderable):
    """Rows under headings: a table; where it is too wide, `heading value` lines for every row.

    Args:
        headings: Of the columns; of a table without headings, as many empty texts.
        title: Above it.
        numbers: Headings of the columns that are aligned to the right.
        sentences: Headings of the columns that may be wrapped.
        lines: With lines around and between columns.
    """

    def __init__(
        self,
        *headings: str,
        title: str = "",
        numbers: Iterable[str] = (),
        sentences: Iterable[str] = (),
        lines: bool = False,
    ) -> None:
        self._headings = headings
        self._title = title
        self._numbers = frozenset(numbers)
        self._sentences = frozenset(sentences)
        self._lines = lines
        self._rows: list[tuple[RenderableType, ...]] = []

    def add(self, *cells: RenderableType) -> None:
        """One row."""
        self._rows.append(tuple(map(_cell, cells)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = self._width(console, options) <= options.max_width
        if self._title:
            yield Text(self._title, style="italic")
        yield self._table() if fits else self._list()

    def _width(self, console: Console, options: ConsoleOptions) -> int:
        """Least characters a line of the table."""
        around = 3 * len(self._headings) + 1 if self._lines else len(self._headings)
        return around + sum(
            self._column_width(console, options, place) for place in range(len(self._headings))
        )

    def _column_width(self, console: Console, options: ConsoleOptions, place: int) -> int:
        heading = self._headings[place]
        cells = [Text(heading), *(row[place] for row in self._rows)]
        found = [Measurement.get(console, options.update(width=_UNBOUNDED), cell) for cell in cells]
        whole = max(measurement.maximum for measurement in found)
        if heading not in self._sentences:
            return whole
        return min(whole, max(READABLE_COLUMN, *(measurement.minimum for measurement in found)))

    def _table(self) -> Table:
        plain: Mapping[str, Any] = {"box": None, "padding": (0, 1, 0, 0)}
        table = Table(
            header_style="bold",
            show_header=any(self._headings),
            **({"box": box.SQUARE} if self._lines else plain),
        )
        for heading in self._headings:
            table.add_column(
                Text(heading),
                justify="right" if heading in self._numbers else "left",
                no_wrap=heading not in self._sentences,
                overflow="fold",
            )
        for row in self._rows:
            table.add_row(*row)
        return table

    def _list(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(no_wrap=any(self._headings), overflow="fold")
        table.add_column(overflow="fold")
        for number, row in enumerate(self._rows):
            if number and any(self._headings):
                table.add_row()
            if not any(self._headings):
                table.add_row(*row)
                continue
            for heading, cell in zip(self._headings, row, strict=True):
                table.add_row(Text(heading, style="bold"), cell)
        return table


def _cell(cell: RenderableType) -> RenderableType:
    """Text by the width that it will have."""
    return Text(printable(cell, lines=True)) if isinstance(cell, str) else cell


class CommandLine(typer.Typer):
    """A command line whose output and help appear on any terminal."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as typer's
        """Runs it with the arguments of this process."""
        for stream in (sys.stdout, sys.stderr):
            make_forgiving(stream, os.environ)
        try:
            return super().__call__(*args, **kwargs)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            _abandon(sys.stdout)
            what = error.filename or "the output, or a file,"
            Terminal(stderr=True).say(f"{what} cannot be written: {error.strerror}")
            sys.exit(EXIT_FAILED)


def _abandon(stream: object) -> None:
    """Lets a stream that cannot be written end nowhere, or Python would try again when it exits, with a traceback."""
    if isinstance(stream, TextIOWrapper):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def make_forgiving(stream: object, environment: Mapping[str, str]) -> None:
    """Makes a standard stream replace what its encoding lacks; the encoding is ASCII where the locale is C.

    Python itself takes UTF-8 for that locale, which such a terminal shows as rubbish.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="ascii" if _asks_for_ascii(environment) else None, errors=_ERRORS)


def _asks_for_ascii(environment: Mapping[str, str]) -> bool:
    if environment.get("PYTHONIOENCODING") or environment.get("PYTHONUTF8"):
        return False  # someone knows better
    return (environment.get("LC_ALL") or environment.get("LANG")) in {"C", "POSIX"}
