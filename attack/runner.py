"""Runs cases in processes side by side. What a process finishes it leaves on disk, and nobody does it again.

A capture is kept until its scene or the product changes, findings until their capture or an attack does. So a run that
was broken off goes on where it stopped, and a change to an attack runs no federation.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from attack import assets, captures
from attack.cases import Case, all_cases
from attack.findings import Finding
from attack.public import Public
from attack.stage import Stage
from examples.smollm2 import smollm2
from shelora.errors import DomainError, Reason

_ATTACKS: Final = ("attack", "examples/reuters")
_STOP_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run, and where."""

    folder: Path
    downloads: Path
    only: str
    seed: int
    everything: bool

    def cases(self) -> list[Case]:
        """In the order of the table."""
        every = all_cases(self.downloads, self.seed, everything=self.everything)
        return [case for case in every if self.only in case.name]

    def capture(self, case: Case) -> Path:
        """Folder of a case's capture."""
        return self.folder / "captures" / case.name

    def findings(self, case: Case) -> Path:
        """File of a case's findings."""
        return self.folder / "findings" / f"{case.name}.json"

    def model(self, case: Case) -> Path:
        """Folder of the model."""
        fetch = smollm2 if case.scene.task == "causal-lm" else assets.minilm
        return fetch(self.downloads)

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        options = [
            "--folder",
            self.folder,
            "--downloads",
            self.downloads,
            "--only",
            self.only,
            "--seed",
            self.seed,
        ]
        return [*map(str, options), *(["--all"] if self.everything else [])]


def found(plan: Plan, case: Case) -> list[Finding] | None:
    """The findings of a case; None if there are none that are still true."""
    try:
        note = json.loads(plan.findings(case).read_text())
        return [Finding(**row) for row in note["findings"]] if note["key"] == _key(case) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def progress(plan: Plan) -> str:
    """How far a run has come, for people."""
    cases = plan.cases()
    return f"{_done(plan, cases)} of {len(cases)} cases are done; run it again to go on"


def _done(plan: Plan, cases: Sequence[Case]) -> int:
    return sum(found(plan, case) is not None for case in cases)


def _say(line: str) -> None:
    """A line of progress, at once: other processes write to the same place."""
    print(line, flush=True)  # noqa: T201


def _key(case: Case) -> str:
    """What findings are made by: the capture's key, the attacks and what they are tried with."""
    return hashlib.sha256(f"{captures.key_of(case.scene)}\0{captures.sources(_ATTACKS)}".encode()).hexdigest()


def run(plan: Plan, workers: int) -> list[Finding]:
    """All findings, in order of the table; runs what is missing. Raises: INTERNAL if a process fails."""
    cases = plan.cases()
    for model in {case.scene.task: case for case in cases}.values():
        plan.model(model)  # fetched here, by one process
    if done := _done(plan, cases):
        _say(f"{done} of {len(cases)} cases are done already")
    if done < len(cases):
        _work_side_by_side(plan, min(workers, len(cases)))
    findings = [found(plan, case) for case in cases]
    missing = [case.name for case, rows in zip(cases, findings, strict=True) if rows is None]
    if missing:
        raise DomainError(Reason.INTERNAL, f"no findings of {', '.join(missing)}; {progress(plan)}")
    return [row for rows in findings for row in rows or ()]


def _work_side_by_side(plan: Plan, workers: int) -> None:
    """Starts processes and waits for all of them; ends them if it is interrupted."""
    command = [sys.executable, "-m", "attack", *plan.arguments()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = [
            subprocess.Popen(  # noqa: S603 - our own program
                [*command, "--work"],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            for _ in range(workers)
        ]
        for process in processes:
            stack.callback(_end, process)
        codes = [process.wait() for process in processes]
    if any(codes):
        raise DomainError(Reason.INTERNAL, f"a process failed, see above; {progress(plan)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def work(plan: Plan) -> None:
    """What one process does: cases that nobody has done or is at, the longest first. Its cluster begins empty."""
    torch.set_num_threads(1)
    plan.folder.mkdir(parents=True, exist_ok=True)
    public, stages = dict[str, Public](), list[Stage]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="worker-", dir=plan.folder)))

        def stage() -> Stage:
            if not stages:
                stages.append(stack.enter_context(Stage(folder)))
            return stages[0]

        began, cases = time.monotonic(), plan.cases()
        for case in sorted(cases, key=lambda case: -case.cost):
            with _claimed(plan, case) as mine:
                if mine and found(plan, case) is None:
                    took = _do(plan, case, public, stage)
                    minutes, seconds = divmod(round(time.monotonic() - began), 60)
                    _say(f"{_done(plan, cases)} of {len(cases)} after {minutes}:{seconds:02}: {took}")


def _do(plan: Plan, case: Case, public: dict[str, Public], stage: Callable[[], Stage]) -> str:
    """Runs and attacks a case, and says how long each took."""
    started = time.monotonic()
    model = plan.model(case)
    performance = captures.load(case.scene, plan.capture(case))
    if performance is None:
        performance = stage().perform(case.scene, model)
        captures.save(performance, plan.capture(case))
    ran = time.monotonic()
    if case.scene.task not in public:
        public[case.scene.task] = Public(case.scene, model)
    known = public[case.scene.task]
    known.scene = case.scene
    _write(plan, case, list(case.attacks(performance, known)))
    return f"{case.name}, federation {ran - started:.0f} s, attacks {time.monotonic() - ran:.0f} s"


def _write(plan: Plan, case: Case, findings: Sequence[Finding]) -> None:
    path = plan.findings(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"key": _key(case), "findings": [asdict(finding) for finding in findings]}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(note, indent=1))
    draft.replace(path)


@contextmanager
def _claimed(plan: Plan, case: Case) -> Iterator[bool]:
    """Whether a case is this process' to do; no other does it meanwhile."""
    path = plan.folder / "claims" / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def end_with_parent() -> None:
    """Stops this process once standard input ends: when the process that holds the other end has ended."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
