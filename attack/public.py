"""What everyone knows of a federation: the base model, the specification, and what follows from both."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attack.stage import Scene
from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.keys import EpochSecrets
from client_agent.model import AdaptedModel, choose_device
from client_agent.targets import Narrowed
from shelora.lora.shards import Float64
from shelora.tasks import CAUSAL_LM


class Public:
    """The attacker's own copy of the base model, adapted as the specification says, with B = 0."""

    def __init__(self, scene: Scene, model: Path) -> None:
        """Loads the model."""
        self.scene = scene
        self.model = AdaptedModel(
            load_checkpoint(str(model), scene.task, scene.classes),
            task=scene.task,
            target_modules=scene.modules,
            lora=LoraSettings(rank=4, alpha=4),
            device=choose_device("cpu"),
            narrowed=Narrowed(scene.layers),
        )
        self.encoder = Encoder(self.model.tokenizer, scene.max_tokens, append_end=scene.task == CAUSAL_LM)
        self.model.initialise(self.unprotected.obfuscation)
        self.names = [matrix.name for matrix in self.model.matrices]

    @property
    def unprotected(self) -> EpochSecrets:
        """The values that stand in for secrets under protection `none`: they follow from the federation's name."""
        return EpochSecrets.unprotected(self.scene.name, 1)

    @property
    def base(self) -> Any:  # noqa: ANN401 - transformers' classes, by the names of their parts
        """The base model; its adapted layers are PEFT's, with B = 0."""
        module: Any = self.model.module
        return module.base_model.model

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, the end token included."""
        return self.encoder.ids([text])[0]

    def loss(self, text: str, label: int = 0) -> torch.Tensor:
        """The training loss of one example."""
        logits, targets = self.model.predict(self.encoder.batch(Examples((text,), (label,))))
        return nn.functional.cross_entropy(logits.float(), targets)

    @cached_property
    def first_inputs(self) -> Float64:
        """Inputs of the first adapted layer for every token of the vocabulary [V, n]; of Llama-like models."""
        layers = self.base.model
        with torch.no_grad():
            inputs = layers.layers[0].input_layernorm(layers.embed_tokens.weight)
        return np.asarray(inputs.double().numpy())
