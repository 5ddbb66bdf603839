"""`shelora audit`: reads the key authority's audit log, on any machine, without a key."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import typer

from shelora.audit import LOG_NAME, AuditRecord, verified
from shelora.cli.reporting import reported
from shelora.errors import DomainError, Reason
from shelora.terminal import Records, Terminal

SHOWN: Final = 50
SHORT: Final = 8
"""Digits of an identifier in the table; the file has all of them."""

audit_app = typer.Typer(help="Check and show the log of who was given keys.", no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="The audit log, or the key authority's data folder.")]


@audit_app.command()
def verify(
    path: PathArgument,
    head: Annotated[
        str | None, typer.Option(help="A head noted earlier; the log must still contain it.")
    ] = None,
) -> None:
    """Check that no record was changed, removed, added or moved. Exits with 1 and names the first that was.

    Anyone who can write the whole file can make a new valid chain. So note the head that this prints somewhere
    else, and give it with --head the next time: that proves that nothing up to it was rewritten or cut off.
    """
    with reported():
        last, found = _read_to_end(path, head and head.strip().lower())
        if head is not None and not found:
            raise DomainError(
                Reason.AUDIT_BROKEN,
                "the chain holds, but the noted head is not in it: the log was rewritten, cut short, or is another one",
            )
    console = Terminal()
    console.say(f"{last.sequence + 1} records, none changed; the last is of {last.time}")
    console.print(f"head {last.hash}", soft_wrap=True)
    if head is None:
        console.say("note the head elsewhere and give it with --head the next time", style="dim")


@audit_app.command()
def show(
    path: PathArgument,
    last: Annotated[int, typer.Option(min=1, max=10_000, help="Show this many of the last records.")] = SHOWN,
) -> None:
    """Show the last records of a log, after checking all of it."""
    with reported(), _log(path) as file:
        records = deque(verified(file), maxlen=last)
    Terminal().print(records_table(records))


def records_table(records: deque[AuditRecord]) -> Records:
    """One line a record."""
    headings = ("record", "time (UTC)", "event", "federation", "epoch", "client", "detail")
    table = Records(*headings, numbers=["record"], sentences=["detail"])
    for record in records:
        table.add(
            str(record.sequence),
            record.time[: len("2026-01-01T00:00:00")].replace("T", " "),
            record.event.replace("_", " "),
            record.federation_id or "",
            "" if record.epoch is None else str(record.epoch),
            record.client_id or "",
            _detail(record),
        )
    return table


def _detail(record: AuditRecord) -> str:
    """What only some events have; identifiers by their first digits."""
    identifiers = {"vault": record.vault, "key": record.key_id, "follows": record.follows}
    parts = [f"{name} {value[:SHORT]}…" for name, value in identifiers.items() if value is not None]
    method = record.method and record.method.rpartition("/")[2]
    parts += [str(value) for value in (method, record.role, record.reason, record.count) if value is not None]
    if record.until_ms is not None:
        parts.append(f"up to {datetime.fromtimestamp(record.until_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}")
    return ", ".join(parts)


def _read_to_end(path: Path, wanted: str | None) -> tuple[AuditRecord, bool]:
    """The last record, and whether one of them has the wanted hash."""
    found = False
    with _log(path) as file:
        for record in verified(file):
            found = found or record.hash == wanted
    return record, found


@contextmanager
def _log(path: Path) -> Iterator[BinaryIO]:
    try:
        with (path / LOG_NAME if path.is_dir() else path).open("rb") as file:
            yield file
    except OSError as error:
        raise DomainError(Reason.CONFIGURATION_INVALID, f"{path} cannot be read: {error.strerror}") from error
