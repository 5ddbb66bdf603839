"""What is done to a data folder while no key authority serves from it."""

import secrets
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from services.key_authority import custody, disk
from services.key_authority.sealer import KEY_BYTES, SealingKey
from services.key_authority.settings import sealing_key_beside
from shelora import files
from shelora.audit import LOG_NAME, verified
from shelora.errors import DomainError, Reason
from shelora.exits import EXIT_FAILED, exit_code
from shelora.terminal import Terminal

_PREFIX: Final = "SHELORA_KEY_AUTHORITY_"

DataDir = Annotated[
    Path, typer.Option(envvar=_PREFIX + "DATA_DIR", help="Folder of the keys.", show_default=False)
]
KeyFile = Annotated[
    Path,
    typer.Option(envvar=_PREFIX + "SEALING_KEY_FILE", help="File with the sealing key.", show_default=False),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (make_sealing_key, reseal, check_data, replace_audit_log):
        app.command()(command)


def make_sealing_key(
    path: Annotated[Path, typer.Argument(help="New file, made with mode 0600; none is overwritten.")],
) -> None:
    """Make a sealing key. Keep a copy of it apart from the backups of the data folder.

    Without it nothing in the folder or in a backup can be read; with it and the folder, everything can.
    """
    with _reported():
        key = secrets.token_bytes(KEY_BYTES)
        with disk.failures_named():
            made = files.create(path, key.hex().encode() + b"\n")
        if not made:
            raise DomainError(Reason.CONFIGURATION_INVALID, f"{path} exists; it was left as it is")
    typer.echo(f"sealing key {SealingKey(key).key_id.hex()} in {path}")


def reseal(
    data_dir: DataDir,
    old_key_file: Annotated[Path, typer.Option(help="File with the present sealing key.")],
    new_key_file: Annotated[Path, typer.Option(help="File with the sealing key to change to.")],
) -> None:
    """Change the sealing key of a data folder. If it is interrupted, run it again."""
    with _reported():
        old, new = (sealing_key_beside(data_dir, path) for path in (old_key_file, new_key_file))
        count = custody.reseal(data_dir, old, new)
    typer.echo(f"{count} files sealed anew; {data_dir} now needs the sealing key {new.key_id.hex()}")


def check_data(data_dir: DataDir, sealing_key_file: KeyFile) -> None:
    """Check a data folder or a backup of it.

    Opens every sealed file and checks the audit log. Changes nothing. May be run while a key authority serves from the
    folder.
    """
    with _reported():
        key = sealing_key_beside(data_dir, sealing_key_file)
        vault, root = custody.read_vault(data_dir, key), custody.read_root(data_dir, key)
        register = custody.read_register(data_dir, key)
        for epoch_id in vault.epochs():
            kept = vault.read(epoch_id)
            profile = f"profile {kept.parameters}" if kept.parameters else "no CKKS key"
            typer.echo(f"{epoch_id}: {profile}, key {kept.key_id.hex()}")
        with disk.failures_named(), (data_dir / LOG_NAME).open("rb") as file:
            (head,) = deque(verified(file), maxlen=1)
    typer.echo(f"certificate authority: {root.pin.hex() if root else 'none was made yet'}")
    typer.echo(f"register: {register.tokens} tokens, {register.clients} clients")
    typer.echo(f"audit log: {head.sequence + 1} records, head {head.hash}")


def replace_audit_log(data_dir: DataDir, sealing_key_file: KeyFile) -> None:
    """Set a damaged or lost audit log aside.

    A new one is started, whose first record names the SHA-256 of the old one. The old one is kept beside it.
    """
    with _reported():
        aside = custody.replace_audit_log(data_dir, sealing_key_beside(data_dir, sealing_key_file))
    typer.echo(f"the old log is now {aside}; a new one begins")


@contextmanager
def _reported() -> Iterator[None]:
    """Shows a refusal as one line and exits."""
    try:
        yield
    except DomainError as error:
        Terminal(stderr=True).say(f"key-authority: {error.message}")
        sys.exit(exit_code(error))
    except OSError as error:
        Terminal(stderr=True).say(f"key-authority: {error.filename}: {error.strerror}")
        sys.exit(EXIT_FAILED)
