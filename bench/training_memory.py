"""`python -m bench.training_memory`: peak memory of training steps, by numbers of the base model and checkpointing.

Each setting is a process of its own: the largest resident memory is what the kernel says at its end, libraries and the
loading of the model included. Beside it stands what `client-agent doctor` estimates before it loads anything.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from attack.assets import minilm
from examples.local import ASSETS
from examples.smollm2 import smollm2

SETTINGS: Final = (
    ("float32", "none", False),
    ("float32", "none", True),
    ("bfloat16", "none", False),
    ("bfloat16", "none", True),
    ("bfloat16", "8bit", False),
    ("bfloat16", "8bit", True),
    ("bfloat16", "4bit", False),
    ("bfloat16", "4bit", True),
)
"""`model.dtype`, `model.quantization`, `training.gradient_checkpointing`."""
MODELS: Final[dict[str, tuple[Callable[[Path], Path], dict[str, Any]]]] = {
    "smollm2": (smollm2, {"task": "causal-lm", "target_modules": "all-linear"}),
    "minilm": (minilm, {"labels": ("a", "b"), "target_modules": "all-linear"}),
}
STEPS: Final = 2
RANK: Final = 8
_MB: Final = 1e6
app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help="smollm2 (135 million weights) or minilm (23 million).")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of an example.")] = 256,
    examples: Annotated[int, typer.Option(min=1, help="Examples computed at once.")] = 4,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures every setting, each in a process of its own; those of bitsandbytes only where it is installed."""
    if one:
        sys.stdout.write(json.dumps(_measured(model, tokens, examples, *json.loads(one))))
        return
    table = Table("model.dtype", "quantization", "checkpointing", "peak", "estimated", "a step")
    for setting in SETTINGS:
        found = _apart(model, tokens, examples, setting)
        dtype, bits, again = setting
        if "refused" in found:
            table.add_row(dtype, bits, "yes" if again else "no", found["refused"], "", "")
            continue
        sizes = (f"{found[key] / _MB:,.0f} MB" for key in ("peak", "estimated"))
        table.add_row(dtype, bits, "yes" if again else "no", *sizes, f"{found['seconds']:.1f} s")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"{model}, rank {RANK}, all-linear, {examples} x {tokens} tokens, one thread")
    console.print(table)


def _apart(model: str, tokens: int, examples: int, setting: tuple[str, str, bool]) -> dict[str, Any]:
    arguments = ["--model", model, "--tokens", str(tokens), "--examples", str(examples)]
    command = [sys.executable, "-m", "bench.training_memory", *arguments, "--one", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measured(
    name: str,
    tokens: int,
    examples: int,
    dtype: str,
    bits: str,
    again: bool,  # noqa: FBT001 - from JSON
) -> dict[str, Any]:
    import torch  # noqa: PLC0415 - the parent needs none

    from client_agent.checkpoint import load_checkpoint  # noqa: PLC0415
    from client_agent.config import LoraSettings, ModelConfig, TrainingSettings  # noqa: PLC0415
    from client_agent.data import Examples  # noqa: PLC0415
    from client_agent.encoding import Encoder  # noqa: PLC0415
    from client_agent.footprint import Setting, blueprint, own_bytes  # noqa: PLC0415
    from client_agent.model import AdaptedModel  # noqa: PLC0415
    from client_agent.precision import choose_precision  # noqa: PLC0415
    from client_agent.training import TrainingRun, train  # noqa: PLC0415
    from shelora.errors import DomainError  # noqa: PLC0415
    from shelora.federation import TrainingSpec  # noqa: PLC0415
    from shelora.obfuscation import Obfuscation  # noqa: PLC0415

    torch.set_num_threads(1)
    get, fields = MODELS[name]
    path = str(get(Path(ASSETS)))
    spec = TrainingSpec.model_validate({"base_model": name, "max_tokens": tokens, **fields})
    settings = TrainingSettings(gradient_checkpointing=again)
    device = torch.device("cpu")
    try:
        chosen = ModelConfig.model_validate({"path": path, "dtype": dtype, "quantization": bits})
        precision = choose_precision(chosen, settings, device)
    except DomainError as error:
        return {"refused": error.message}
    held = own_bytes()
    setting = Setting(dtype=dtype, quantization=bits, checkpointing=again, micro_batch=examples)
    estimated = held + blueprint(path, spec, RANK).needed(setting)
    model = AdaptedModel(
        load_checkpoint(path, spec.task, spec.labels, as_stored=not precision.is_full),
        task=spec.task,
        target_modules=spec.target_modules,
        lora=LoraSettings(rank=RANK, alpha=2 * RANK),
        device=device,
        precision=precision,
    )
    model.initialise(Obfuscation(bytes(32), 1))
    encoder = Encoder(model.tokenizer, tokens, append_end=model.task.predicts_next)
    texts = tuple(f"number {n} " + "is a word of a long text " * tokens for n in range(examples))
    known = Examples(texts, tuple(n % 2 for n in range(examples)) if spec.labels else ())
    run = TrainingRun(rates=[1e-4] * STEPS, batch_size=examples, seed=1, settings=settings)
    started = time.monotonic()
    train(model, encoder, known, run, lambda _fraction: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "estimated": estimated, "seconds": (time.monotonic() - started) / STEPS}


if __name__ == "__main__":
    app()
