"""The command line of the agent."""

import asyncio
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from client_agent.config import IDENTITY, AgentConfig
from client_agent.loading import check_loading, require_temporary_folder, unusable
from shelora.configuration import invalid, read_secret
from shelora.errors import DomainError
from shelora.exits import EXIT_FAILED, exit_code
from shelora.federation import FederationSpec, ProtectionSpec
from shelora.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION, TASKS
from shelora.terminal import CommandLine, Terminal
from shelora.transport.enrolment import enroll as enrolled
from shelora.version import VersionOption

ENROL_RETRY_S: Final = 10.0
"""Seconds to try to reach the authority for: a person waits."""
_HELP = """
Trains a shared model on data that stays on this machine.

The agent joins a federation, trains LoRA factors on its examples, encrypts what it sends, and applies what comes
back. Only the agents can decrypt; no server can. First exchange the operator's token for a certificate, which the
agent then renews by itself; `check` reads everything and sends nothing:

\b
    client-agent enroll --token shelora-token-... --authority keys.example.org:7099 --state-dir state
    client-agent check --config agent.yaml
    client-agent doctor --config agent.yaml
    client-agent run --config agent.yaml

A commented configuration is client_agent/sample.yaml. Single values can be set in the environment:
SHELORA_AGENT__LORA__RANK=16 sets lora.rank.
"""

app = CommandLine(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
ConfigFile = Annotated[
    Path, typer.Option("--config", help="YAML file; client_agent/sample.yaml explains every field.")
]


@app.callback(help=_HELP)
def _program(version: VersionOption = None) -> None:
    """Takes the options that come before a command."""


@app.command()
def run(
    config: ConfigFile,
    *,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a join token, to enrol with first if this client has no identity yet."),
    ] = None,
    authority: Annotated[
        str, typer.Option(help="Enrolment address of the key authority, host:port; with --token-file.")
    ] = "",
) -> None:
    """Joins the federation and takes part until it ends.

    Everything that was trained survives a restart: SIGTERM and SIGINT stop the agent within a training step, and a
    restarted agent goes on where it stopped, the upload included. After every round STATE_DIR/adapter is the newest;
    load it with peft.PeftModel.from_pretrained, or copy it out with `export`.

    Exit codes: 0 the federation finished, or a signal stopped the agent; 1 the federation failed, or something broke;
    2 configuration, data, model or identity are refused.
    """
    _exit_with(lambda: _run(_member(AgentConfig.load(config), token_file, authority)))


@app.command()
def enroll(
    *,
    token: Annotated[
        str, typer.Option(envvar="SHELORA_TOKEN", help="Join token from the operator; good for one use.")
    ],
    authority: Annotated[str, typer.Option(help="Enrolment address of the key authority, host:port.")],
    state_dir: Annotated[Path, typer.Option(help="state_dir of the agent's configuration.")],
    client: Annotated[str, typer.Option(help="Name to take, if the token leaves it open.")] = "",
) -> None:
    """Makes this client's key on this machine and exchanges the token for a certificate. Once.

    The key never leaves STATE_DIR. The authority is held against the token's pin before the token is sent.

    Exit codes: 0 enrolled; 2 the token, the name or the authority is refused; 1 the authority cannot be reached.
    """
    _exit_with(lambda: _enroll(token, authority, state_dir, client))


@app.command()
def check(
    config: ConfigFile,
    *,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no coordinator; take labels from the training file.")
    ] = False,
    task: Annotated[
        str, typer.Option(help=f"With --offline: what to train, {', '.join(TASKS)}.")
    ] = SEQUENCE_CLASSIFICATION,
    causal_lm: Annotated[bool, typer.Option("--causal-lm", help="Short for --task causal-lm.")] = False,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-module",
            help="With --offline: suffix of modules to adapt, in place of usual ones; may be repeated.",
        ),
    ] = None,
) -> None:
    """Reads the configuration, the data and the model, and shows what would be trained and sent. Sends nothing.

    It finds what `run` would find: every text is tokenized, and the gradient of the longest one is computed. Task,
    labels and adapted modules come from the federation, so its coordinator is asked for them; --offline does
    without.
    """
    targets, learnt = target_modules or [], CAUSAL_LM if causal_lm else task
    _exit_with(lambda: _check(AgentConfig.load(config), offline=offline, task=learnt, targets=targets))


@app.command()
def export(
    config: ConfigFile,
    to: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    *,
    best: Annotated[
        bool,
        typer.Option("--best", help="The adapter with the smallest loss on this client's own test examples."),
    ] = False,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Merge it into the base model: a whole model, which needs no PEFT."),
    ] = False,
) -> None:
    """Copies the newest adapter out of STATE_DIR, also while the agent runs.

    After every round the agent saves the adapter of the federation's newest result, cut to its own rank, in
    STATE_DIR/adapter, and the best one by its own test examples in STATE_DIR/adapter-best. Operators hold no key, so an
    adapter always comes from an agent. Load it with peft.PeftModel.from_pretrained; what --merged makes,
    with transformers alone.

    Exit codes: 0 copied; 2 there is no adapter yet, the folder exists, or model.path is not what it was trained on.
    """
    _exit_with(lambda: _export(AgentConfig.load(config), to, best=best, merged=merged))


def _export(config: AgentConfig, to: Path, *, best: bool, merged: bool) -> int:
    from client_agent.adapters import ORIGIN  # noqa: PLC0415 - as in `_run`
    from client_agent.state import newest_adapter  # noqa: PLC0415 - as above

    adapter = newest_adapter(config.state_dir, best=best)
    if to.exists():
        raise invalid(f"--to {to}: it exists; name a folder to make")
    try:
        if merged:
            from client_agent.merging import export_merged  # noqa: PLC0415 - loads torch

            export_merged(config.model.path, adapter, to)
            Terminal().say(f"merged {adapter} into {config.model.path}: {to}")
            return 0
        shutil.copytree(adapter, to, ignore=shutil.ignore_patterns(ORIGIN))
    except OSError as error:  # shutil.Error too
        raise invalid(f"--to {to}: the adapter cannot be copied there: {error.strerror or error}") from error
    Terminal().say(f"copied {adapter} to {to}")
    return 0


def _member(config: AgentConfig, token_file: Path | None, authority: str) -> AgentConfig:
    """The same configuration, of a client that has an identity: its own, or the one its token is good for."""
    if token_file is None or config.identity.exists():
        return config
    if not authority:
        raise invalid("--token-file needs --authority host:port")
    _enroll(read_secret(token_file, "the token file"), authority, config.state_dir, config.client_id)
    return config


@app.command()
def doctor(config: ConfigFile) -> None:
    """Checks packages, certificate, network, clock, TenSEAL, data, model, memory, disk, and says what to mend.

    Sends nothing. It trains one step as a round of the federation would, so it tells what this very device needs.

    Exit codes: 0 nothing must be mended; 1 something must; 2 the configuration is refused.
    """
    _exit_with(lambda: _doctor(AgentConfig.load(config)))


def _enroll(token: str, authority: str, state_dir: Path, client: str) -> int:
    held = asyncio.run(
        enrolled(token, authority, state_dir / IDENTITY, client_id=client, retry_s=ENROL_RETRY_S)
    )
    facts = held.facts
    Terminal().say(
        f"enrolled as {facts.identity}; the certificate in {state_dir / IDENTITY} is valid until "
        f"{facts.expires:%Y-%m-%d %H:%M} UTC, and the running agent renews it"
    )
    return 0


def _run(config: AgentConfig) -> int:
    from client_agent.agent import Outcome  # noqa: PLC0415 - enrolling must not wait for torch
    from client_agent.daemon import run as followed  # noqa: PLC0415 - as above
    from client_agent.learners import learner_of  # noqa: PLC0415 - as above

    return EXIT_FAILED if followed(config, lambda: learner_of(config.learner)) is Outcome.HALTED else 0


def _check(config: AgentConfig, *, offline: bool, task: str, targets: list[str]) -> int:
    require_temporary_folder()
    from client_agent.inspection import guessed_training, inspect, report  # noqa: PLC0415 - as above

    if not offline:
        config.credentials()
    if offline:
        training, protection = guessed_training(config, targets, task), ProtectionSpec()
        found = inspect(config, training, protection)
    else:
        spec = asyncio.run(_asked(config))
        training = spec.training
        found = inspect(config, training, spec.protection, spec.round.rounds)
    Terminal().print(report(training, found))
    return 0


def _doctor(config: AgentConfig) -> int:
    require_temporary_folder()
    console = Terminal()
    with console.stages("loading packages"):
        check_loading()
    from client_agent.doctor import examine, failed, report  # noqa: PLC0415 - as above

    with console.stages("examining this device") as tell:
        findings = asyncio.run(examine(config, lambda check: tell(f"examining: {check}")))
    console.print(report(findings))
    return EXIT_FAILED if failed(findings) else 0


async def _asked(config: AgentConfig) -> FederationSpec:
    from client_agent.session import Session  # noqa: PLC0415 - as above

    session = Session(config, config.credentials())
    try:
        spec = await session.specification()
    except DomainError as error:
        raise DomainError(
            error.reason, f"{error.message} (--offline checks without a coordinator)"
        ) from error
    finally:
        await session.close()
    return spec


def _loaded(action: Callable[[], int]) -> int:
    """What it returns. Raises: DomainError; PACKAGE_UNUSABLE for a package that does not load."""
    try:
        return action()
    except ImportError as error:
        raise unusable(error.name or "a package", str(error).strip()) from error


def _exit_with(action: Callable[[], int]) -> None:
    """Ends the process with the action's exit code; refusals are one message, without a traceback."""
    try:
        code = _loaded(action)
    except DomainError as error:
        Terminal(stderr=True).refuse(error, "client-agent: ")
        code = exit_code(error)
    sys.exit(code)


if __name__ == "__main__":
    app()
