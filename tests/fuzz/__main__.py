"""`make fuzz`: lets coverage guide mutations of valid messages through every binary decoder, a process each."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.fuzz.decoders import DECODERS, ROOT, Decoder

BINARY = [name for name, decoder in DECODERS.items() if decoder.binary]
_DONE = re.compile(r"Done (\d+) runs")
_COVERAGE = re.compile(r"cov: (\d+)")
_TAIL_LINES = 25


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(BINARY)}; all by default.")
    ] = None,
    *,
    seconds: Annotated[int, typer.Option(min=1, help="Time for each decoder.")] = 60,
    memory: Annotated[int, typer.Option(min=256, help="Most memory of a process, MiB.")] = 2048,
    folder: Annotated[Path, typer.Option(help="Gets corpora, kept from run to run, and crashes.")] = ROOT
    / "runs/fuzz",
) -> None:
    """Fuzz the binary decoders. Exits with 1 if one crashes, or takes more time or memory than it may."""
    chosen = names or BINARY
    if unknown := set(chosen) - set(BINARY):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose of {', '.join(BINARY)}")
    console, table = Console(), Table("decoder", "runs", "coverage", "outcome")
    failed = False
    for name in chosen:
        console.print(f"{name}: {seconds} s ...", style="dim")
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.fuzz.target",
                name,
                *_flags(DECODERS[name], folder, seconds, memory),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        failed |= process.returncode != 0
        if process.returncode:
            console.print("\n".join(process.stderr.splitlines()[-_TAIL_LINES:]), markup=False)
        outcome = "found nothing" if process.returncode == 0 else f"FAILED: see {folder / 'crashes'}"
        table.add_row(name, _last(_DONE, process.stderr), _last(_COVERAGE, process.stderr), outcome)
    console.print(table)
    raise typer.Exit(int(failed))


def _flags(decoder: Decoder, folder: Path, seconds: int, memory: int) -> Iterator[str]:
    """libFuzzer's: the corpus, seeded with the valid messages, limits, and where crashes go."""
    corpus, crashes = folder / "corpus" / decoder.name, folder / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    seeds = decoder.seeds()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    yield str(corpus)
    yield f"-max_total_time={seconds}"
    yield f"-rss_limit_mb={memory}"
    yield "-timeout=10"
    yield f"-max_len={max(2 * max(map(len, seeds)), 4096)}"
    yield f"-artifact_prefix={crashes}/{decoder.name}-"


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.findall(text)
    return found[-1] if found else "-"


if __name__ == "__main__":
    typer.run(main)
