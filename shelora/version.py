"""The version of this program, and the option that prints it. pyproject.toml is its one source."""

from importlib.metadata import version
from typing import Annotated

import typer

VERSION = version("shelora")


def show_version(asked: bool | None) -> None:  # noqa: FBT001 - typer's signature
    """Prints the version and ends the program, if asked to."""
    if asked:
        print(VERSION)  # noqa: T201 - the answer to a command
        raise typer.Exit


VersionOption = Annotated[
    bool | None,
    typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
]
"""Type of a command's parameter `version`, None by default."""
