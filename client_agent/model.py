"""The adapted model: a frozen base, LoRA factors on some matrices, a head trained whole."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from client_agent.checkpoint import Checkpoint, invalid, is_norm, quiet, under
from client_agent.config import LoraSettings
from client_agent.encoding import ModelBatch
from client_agent.fingerprint import base_digest
from client_agent.frozen import Frozen, joined, require_shapes, widen
from client_agent.layers import as_matrix, matrix_shape
from client_agent.learning import Weights
from client_agent.moments import NONE, Estimates, Moments
from client_agent.precision import FULL, Precision, compute_in_float32, lower, plain_weight
from client_agent.starting import PREFIX, Start, require_fit
from client_agent.tables import first_line, listed
from client_agent.targets import WHOLE, Narrowed, Targets, adaptable_layers, resolve
from client_agent.tasks.registry import task_of
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import Float32, Float64, LoraFactors
from shelora.lora.sketches import Exponents

PIXELS: Final = "pixel_values"
"""What transformers calls images."""
_ADAPTER = "default"
_COPY = f".modules_to_save.{_ADAPTER}"
"""What PEFT puts between a module trained whole and its parameter."""


NOTHING: Final = Start()


class InitialValues(Protocol):
    """Where initial values come from; `shelora.obfuscation.Obfuscation` gives the same to all agents."""

    def initial_A(self, matrix: str, rank: int, columns: int) -> NDArray[np.float32]:
        """A [rank, columns]; a smaller rank gives the first rows of a larger one."""

    def initial_tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Values of that shape."""


class AdaptedModel:
    """A base model with one LoRA adapter. Not thread-safe: one thread at a time uses it.

    Args:
        checkpoint: The base model.
        task: What it learns.
        target_modules: What is adapted, as in a specification.
        lora: This client's adapter.
        device: Where to compute.
        narrowed: What else the specification says of modules.
        precision: Numbers of the base model; what is trained is float32.
        start: What training starts from beside the base model.

    Raises: DomainError MODEL_INVALID if a target matches no module, or one that cannot be adapted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        task: str,
        target_modules: Sequence[str],
        lora: LoraSettings,
        device: torch.device,
        narrowed: Narrowed = WHOLE,
        precision: Precision = FULL,
        start: Start = NOTHING,
    ) -> None:
        self.task = task_of(task)
        self.device = device
        self.rank = lora.rank
        self.scaling = lora.scaling
        self.tokenizer = checkpoint.tokenizer
        self.start = start
        self.base = replace(base_digest(checkpoint), start=start.digest)
        self.notes = tuple(_notes(checkpoint, start))
        self.most_positions = _most_positions(checkpoint.model)
        """Tokens that the model can take, as far as it says so."""
        self.vocabulary = _vocabulary(checkpoint.model)
        """Token ids that the model knows: those below."""
        self._norms = frozenset(_norm_weights(checkpoint.model))
        self.adaptable = adaptable_layers(checkpoint)
        """How many layers can be adapted by each name that `target_modules` can have."""
        targets = resolve(checkpoint, target_modules, narrowed)
        self._saved = targets.saved
        self.precision = precision
        if not precision.is_full:
            lower(checkpoint, [*checkpoint.head, *targets.saved], precision, device)
        config = _peft_config(checkpoint.head, self.task.peft, targets, lora)
        self._peft = _adapt(checkpoint, config).to(device)
        self._peft.eval()
        self._compute_whole_in_float32(checkpoint.head)
        self._layers = dict(_lora_layers(self._peft))
        if tuple(self._layers) != targets.adapted:
            other = sorted(set(self._layers) ^ set(targets.adapted))
            raise invalid(f"PEFT does not adapt what the federation's target_modules name: {listed(other)}")
        self._parameters = dict(_whole_parameters(self._peft))
        self.matrices = tuple(
            Matrix(name, *matrix_shape(layer.get_base_layer())) for name, layer in self._layers.items()
        )
        self.tensors = tuple(Tensor(name, tuple(value.shape)) for name, value in self._parameters.items())
        require_fit(
            start,
            {matrix.name: (matrix.out_features, matrix.in_features) for matrix in self.matrices},
            {tensor.name: tensor.shape for tensor in self.tensors},
        )
        for name, pair in start.factors.items():
            Frozen(self._layers[name]).hold(pair, device)
        self._beside = {name: Frozen(layer) for name, layer in self._layers.items()}
        self._exponents: Mapping[str, Exponents] = {}
        self._changes: Mapping[str, tuple[float, ...]] = {}
        self.moments: Moments = NONE
        """What an optimizer goes on from."""

    def _compute_whole_in_float32(self, head: Sequence[str]) -> None:
        if self.precision.dtype == torch.float32:
            return
        base = self._peft.get_base_model()
        for name in (*head, *self._saved):
            copy = base.get_submodule(name).modules_to_save[_ADAPTER]
            compute_in_float32(copy, None if name in head else self.precision.dtype)

    @property
    def module(self) -> nn.Module:
        """The network, for training and evaluation modes."""
        network: nn.Module = self._peft
        return network

    @property
    def configuration(self) -> PreTrainedConfig:
        """Of the base model."""
        return self._peft.get_base_model().config

    @property
    def checkpoints(self) -> bool:
        """Whether its activations can be computed twice, to save memory."""
        return bool(self._peft.get_base_model().supports_gradient_checkpointing)

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """Adapted modules by matrix name."""
        return self._layers

    def base_layer(self, matrix: str) -> nn.Module:
        """The layer of the base model that is adapted."""
        layer: nn.Module = self._layers[matrix].get_base_layer()
        return layer

    def trainable(self) -> list[nn.Parameter]:
        """The parameters an optimizer updates."""
        return [p for p in self._peft.parameters() if p.requires_grad]

    @property
    def trainable_count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.trainable())

    def base_weight_sums(self) -> dict[str, Float64]:
        """sum_k |W_kj| of every adapted matrix W [out, in], [in_features] by name."""
        return {name: _column_sums(layer) for name, layer in self._layers.items()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of token ids [examples, tokens] without padding."""
        ids = ids.to(self.device)
        logits: torch.Tensor = self._peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.float()

    def predict(self, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [k, classes] and targets [k], as the task has them: of examples, or of tokens."""
        batch = batch.to(self.device)
        logits = self._logits(batch)
        return self.task.predictions(logits, batch)

    def _logits(self, batch: ModelBatch) -> torch.Tensor:
        inputs = dict(batch.inputs)
        if PIXELS in inputs:  # not every model makes them what its first convolution takes
            inputs[PIXELS] = inputs[PIXELS].to(self.precision.dtype)
        logits: torch.Tensor = self._peft(**inputs).logits
        return logits

    def target_count(self, batch: ModelBatch) -> int:
        """Number of targets that `predict` returns for the batch."""
        return self.task.target_count(batch)

    def losses(self, batch: ModelBatch) -> torch.Tensor:
        """Cross-entropy of each example, the mean over its own targets, [examples]; 0 of one without targets."""
        batch = batch.to(self.device)
        logits = self._logits(batch)
        chosen, targets = self.task.predictions(logits, batch)
        values = functional.cross_entropy(chosen.float(), targets, reduction="none")
        count = len(batch)
        # Whose a target is: what the task picks if every logit is the number of its example.
        numbers = torch.arange(count, device=self.device).view(count, *[1] * (logits.ndim - 1))
        owners = self.task.predictions(numbers.expand(*logits.shape[:-1], 1), batch)[0][..., 0]
        per_example = torch.bincount(owners, minlength=count).clamp(min=1)
        return values.new_zeros(count).index_add(0, owners, values) / per_example

    def weights(self) -> Weights:
        """A copy of everything trainable, with what is frozen beside it."""
        values = self.gathered(lambda parameter: parameter)
        return Weights(
            factors=values.factors,
            tensors=values.tensors,
            frozen={name: frozen.factors for name, frozen in self._beside.items() if frozen.factors},
            exponents=self._exponents,
            changes=self._changes,
            moments=self.moments,
        )

    def gathered(self, of: Callable[[nn.Parameter], torch.Tensor]) -> Estimates:
        """A copy of something that every trainable parameter has, such as itself: tensors of its shape, by name."""
        factors = {
            name: LoraFactors(
                B=_numpy(as_matrix(of(layer.lora_B[_ADAPTER].weight))),
                A=_numpy(as_matrix(of(layer.lora_A[_ADAPTER].weight))),
            )
            for name, layer in self._layers.items()
        }
        return Estimates(
            factors=factors, tensors={name: _numpy(of(value)) for name, value in self._parameters.items()}
        )

    def load(self, weights: Weights) -> None:
        """Replaces everything trainable, and what is frozen beside it.

        Raises: DomainError MODEL_INVALID if a name or shape does not fit; nothing is replaced then.
        """
        pairs = list(self.paired(weights))
        for matrix in self.matrices:
            require_shapes(matrix, weights.frozen.get(matrix.name))
        with torch.no_grad():
            for parameter, value in pairs:
                parameter.copy_(torch.from_numpy(np.array(value, dtype=np.float32)).view(parameter.shape))
        for name, frozen in self._beside.items():
            frozen.hold(weights.frozen.get(name), self.device)
        self._exponents, self._changes, self.moments = weights.exponents, weights.changes, weights.moments

    def initialise(self, values: InitialValues) -> None:
        """The state in which every agent starts: B = 0; A and the head from `values`, but the head's norms scale by 1;
        modules_to_save as they are in the base model.
        """
        factors = {
            m.name: LoraFactors(
                B=np.zeros((m.out_features, self.rank), dtype=np.float32),
                A=values.initial_A(m.name, self.rank, m.in_features),
            )
            for m in self.matrices
        }
        self.load(
            Weights(factors=factors, tensors={t.name: self._initial_tensor(t, values) for t in self.tensors})
        )

    def _initial_tensor(self, tensor: Tensor, values: InitialValues) -> Float32:
        if tensor.name in self.start.tensors:
            return self.start.tensors[tensor.name]
        module = next((name for name in self._saved if under(tensor.name, [name])), None)
        if module is not None:
            original = self._peft.get_base_model().get_submodule(module).original_module
            return _numpy(original.get_parameter(tensor.name.removeprefix(f"{module}.")))
        if tensor.name in self._norms:
            return np.ones(tensor.shape, dtype=np.float32)
        return values.initial_tensor(tensor.name, tensor.shape)

    def save_adapter(self, folder: Path) -> None:
        """Writes what `PeftModel.from_pretrained(base, folder)` loads, the tokenizer, and the labels.

        The adapter holds all that the model adds to its base: where a part is frozen beside the trained one, its rank
        is that of both together, and its scaling alpha / rank is this client's.
        """
        with quiet():
            self._peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
            self.tokenizer.save_pretrained(str(folder))
            self._peft.get_base_model().config.save_pretrained(str(folder))
        own = self.start.factors
        widen(folder, {n: joined(own.get(n), f.factors) for n, f in self._beside.items()}, self.scaling)

    def paired(self, weights: Weights | Estimates) -> Iterator[tuple[nn.Parameter, Float32]]:
        """Every trainable parameter with its values, factors as matrices. Raises: MODEL_INVALID as `load`."""
        if weights.factors.keys() != self._layers.keys() or weights.tensors.keys() != self._parameters.keys():
            raise invalid("the weights are of another model: their names differ")
        for name, layer in self._layers.items():
            pair = weights.factors[name]
            for parameter, value in ((layer.lora_A, pair.A), (layer.lora_B, pair.B)):
                weight = parameter[_ADAPTER].weight
                _require_shape(name, as_matrix(weight).shape, value)
                yield weight, value
        for name, parameter in self._parameters.items():
            _require_shape(name, parameter.shape, weights.tensors[name])
            yield parameter, weights.tensors[name]


def _notes(checkpoint: Checkpoint, start: Start) -> Iterator[str]:
    """What the user should know about where training starts."""
    for name in checkpoint.trained_head:
        if not any(under(tensor, [name]) for tensor in start.tensors):
            yield (
                f"the checkpoint is a classifier already; the federation starts its {name} anew, from values that no "
                "server knows (model.head: base starts from what it is)"
            )
    if start.factors:
        yield f"training goes on from an adapter of {len(start.factors)} matrices"
    if start.tensors:
        yield f"training goes on from trained values of {listed(sorted(start.tensors))}"


def choose_device(name: str) -> torch.device:
    """The device of that configuration value. Raises: DomainError MODEL_INVALID if there is no such device."""
    cuda = torch.cuda.is_available()
    there = {"auto": True, "cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise invalid(f"model.device is {name}, but there is no such device; set it to auto or cpu")
    return torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)


def _peft_config(
    head: Sequence[str], task: TaskType | None, targets: Targets, lora: LoraSettings
) -> LoraConfig:
    # A head is trained whole, also where the name of a module inside of it ends like a target.
    inside_head = rf"({'|'.join(map(re.escape, head))})(\..*)?" if head else None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(targets.peft),
        exclude_modules=inside_head,
        modules_to_save=[*head, *targets.saved] or None,
        task_type=task,
    )


def _adapt(checkpoint: Checkpoint, config: LoraConfig) -> PeftModel:
    try:
        with quiet():
            return get_peft_model(checkpoint.model, config)
    except Exception as error:  # PEFT raises many kinds, by the module that it meets
        raise invalid(f"the federation's target_modules do not fit the model: {first_line(error)}") from error


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Adapted modules in the model's order, by their name in the base model."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        yield name.removeprefix(PREFIX), module


def _most_positions(model: PreTrainedModel) -> int:
    """Positions by the configuration and by tables of learned ones; where it says nothing, more than any text has."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position_embeddings" in name.rpartition(".")[2]:
            padding = module.padding_idx  # as in RoBERTa, whose positions begin behind it
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))
    return min(limits, default=2**31)


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of images
        return 2**31
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 2**31


def _norm_weights(model: nn.Module) -> Iterator[str]:
    return (f"{name}.weight" for name, module in model.named_modules() if is_norm(module))


def _whole_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters that are no LoRA factors, in the model's order, by their name in the base model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            yield name.removeprefix(PREFIX).replace(_COPY, ""), parameter


def _column_sums(layer: Any) -> Float64:  # noqa: ANN401 - PEFT's layers are untyped
    base = layer.get_base_layer()
    weight = as_matrix(plain_weight(base))
    magnitudes = weight.abs().double().sum(dim=1 if isinstance(base, Conv1D) else 0)
    return np.asarray(magnitudes.cpu().numpy(), dtype=np.float64)


def _numpy(value: torch.Tensor) -> Float32:
    return np.array(value.detach().cpu().numpy(), dtype=np.float32)


def _require_shape(name: str, needed: torch.Size, value: Float32) -> None:
    if tuple(needed) != value.shape:
        raise invalid(
            f"the weights are of another model: {name} has shape {value.shape}, not {tuple(needed)}"
        )
