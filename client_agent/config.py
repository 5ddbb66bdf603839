"""Configuration of an agent: one YAML file, single values overridden from the environment.

`SHELORA_AGENT__DATA__TRAIN=/data/train.jsonl` overrides `data.train`. Unknown fields are refused.
"""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shelora.configuration import StrictModel, explain, invalid, parse_yaml, read_yaml
from shelora.levels import Level
from shelora.transport.address import Address
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import IdentityFolder, TlsCredentials

ENV_PREFIX: Final = "SHELORA_AGENT__"
IDENTITY: Final = "identity"
"""Folder in `state_dir` for key and certificate."""
SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""How the names of data files end: what they hold."""
PACKED: Final = (".gz", ".bz2", ".xz", ".zst")
"""What may follow, of a compressed file."""
_ARCHIVES: Final = (".zip", ".tar", ".7z", ".rar", ".tgz")
OWN_LEARNER: Final = "transformers"
"""The learner that the agent brings."""
_FOLDER: Final = "folder"
"""Key of the validation context: the folder that relative paths start from."""


def unsupported_name(path: Path) -> str:
    """Why data in a file of that name is not read; "" if it is. Suffixes may be in capitals."""
    suffix, packed = suffix_of(path)
    if suffix in SUFFIXES and not (packed and suffix == ".parquet"):
        return ""
    if suffix in _ARCHIVES or path.suffix.lower() in _ARCHIVES:
        return "it is an archive: unpack it first"
    return f"the file name must end in one of {', '.join(SUFFIXES)}, after which .gz, .bz2, .xz or .zst may follow"


def suffix_of(path: Path) -> tuple[str, str]:
    """What says the format, and what says how it is compressed: `.jsonl` and `.gz` of `a.jsonl.gz`."""
    last = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), last) if last in PACKED else (last, "")


def is_pattern(path: Path) -> bool:
    """Whether a path has `*`, `?` or `[` in it."""
    return any(mark in str(path) for mark in "*?[")


def _nameable(path: str) -> str:
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"no file can have this name: {error}") from error
    if "\0" in path:
        raise ValueError("no file can have this name: it holds a NUL")
    return path


def _absolute(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get(_FOLDER, Path())
    _nameable(str(path))
    try:
        whole = (folder / path.expanduser()).absolute()
    except RuntimeError as error:  # of a home folder that nobody has
        raise ValueError(f"no file can have this name: {error}") from error
    try:
        whole.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("no file can have this name: it is too long") from error
    return whole


def _data_file(path: Path) -> Path:
    """A file's name is looked at here; one without a suffix may be a folder, which is looked at when it is read."""
    if path.suffix and not is_pattern(path) and not _is_folder(path) and (why := unsupported_name(path)):
        raise ValueError(why)
    return path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no name that a file can have
        return False


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
DataPath = Annotated[Path, AfterValidator(_absolute), AfterValidator(_data_file)]
Name = Annotated[str, StringConstraints(min_length=1)]


Tracker = Literal["tensorboard", "mlflow", "wandb"]
Quantization = Literal["none", "8bit", "4bit"]


class ModelConfig(StrictModel):
    path: Annotated[Name, AfterValidator(_nameable)]
    """Base model: a folder, a `.gguf` file, or a name on the Hugging Face hub. It must hold the same weights at every
    agent of the federation."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes CUDA if there is any, mps must be named."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers that the base model is held in and that activations are; what is trained stays float32. float16 needs
    CUDA."""
    adapter: AbsolutePath | None = None
    """Folder of a LoRA adapter that training goes on from, as PEFT or `client-agent export` writes it. It stays as it
    is, and what the federation trains comes on top. The same at every agent. None: from the base model alone."""
    head: Literal["new", "base"] = "new"
    """Where a classifier starts: `new`, from values that no server knows, or `base`, from that of the base model, which
    must know the federation's labels. The same at every agent."""
    quantization: Quantization = "none"
    """Bits of the base model's linear layers, 8 or 4 (NF4), by bitsandbytes; the rest is of `dtype`."""


class DataConfig(StrictModel):
    train: DataPath
    """Training examples: a file whose suffix gives the format (.jsonl, .json, .csv, .tsv, .parquet; also compressed,
    as .jsonl.gz), a folder of such files, a pattern (shards/*.parquet), or a saved dataset. Relative to the
    configuration file."""
    test: DataPath | None = None
    """Test examples, for the evaluation reported after each round. None: nothing is reported."""
    text_field: Name = "text"
    """Field (column) that holds the text; not read for chat, whose records have fields of their own (docs/chat.md)."""
    label_field: Name = "label"
    """Field (column) that holds the class name; read for classification of texts and images alone."""
    image_field: Name = "image"
    """Field (column) that holds an image, or its path; read for image-classification, but not for images in folders."""
    pair_field: Name | None = None
    """Field (column) that holds a second text, for classifications of pairs. None: there is one text."""
    cache_dir: AbsolutePath | None = None
    """Where examples of more than 64 MB are kept, in a nameless file, while the agent runs. None: in state_dir."""


class LoraSettings(StrictModel):
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank r of this client's factors. Larger costs memory and upload in proportion."""
    alpha: Annotated[float, Field(gt=0, le=10_000)] = 16.0
    """LoRA alpha; an update is scaled by alpha / rank, or as `rslora` says."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the inputs of the adapters while training, 0 to below 1."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones (arXiv 2312.03732)."""

    @property
    def scaling(self) -> float:
        """The s of ΔW = s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class TrainingSettings(StrictModel):
    """How this client trains, as far as each decides for itself (docs/training.md)."""

    optimizer: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd"
    ] = "adamw_torch"
    """By the name that transformers gives it; those of 8 bits need bitsandbytes. Only optimizers that move a value by
    about a learning rate a step at most: the bounds that protect sums and results are made of it."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of all that is trained."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether each round's optimizer begins anew, or goes on from what the last one estimated of gradients
    (docs/training.md). keep goes with adamw_torch and adamw_torch_fused."""
    max_gradient_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Gradients are scaled down to this norm, so that one odd batch does not wreck a round. At most 1 with sgd."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes or tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Another seed draws other batches and other dropout."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    packing: bool = False
    """Lay the texts of a batch end to end instead of padding them to the longest: less to compute where their lengths
    differ. For language models whose attention keeps such texts apart; it is tried before the first round."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that receive losses and rates, step by step: tensorboard (in state_dir/tensorboard), mlflow, wandb. They
    run on this client's side; wandb sends to the account that it is set up with."""

    @model_validator(mode="after")
    def _sgd_is_bounded(self) -> Self:
        if self.optimizer == "sgd" and self.max_gradient_norm > 1:
            raise PydanticCustomError(
                "max_gradient_norm", "max_gradient_norm must be at most 1 with sgd, whose steps are as long"
            )
        return self

    @model_validator(mode="after")
    def _state_can_be_kept(self) -> Self:
        if self.keeps_moments and self.optimizer not in {"adamw_torch", "adamw_torch_fused"}:
            raise PydanticCustomError(
                "optimizer_state",
                "optimizer_state keep goes with adamw_torch and adamw_torch_fused: sgd has nothing to keep, and what "
                "optimizers of 8 bits keep cannot follow a result",
            )
        return self

    @property
    def keeps_moments(self) -> bool:
        """Whether a round's optimizer goes on from the last one's."""
        return self.optimizer_state == "keep"


class SampleSettings(StrictModel):
    """What a language model writes after each round, to see how it changes. It stays on this machine."""

    prompts: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=8192)], ...], Field(max_length=32)
    ] = ()
    """What the model goes on from: a text (causal-lm), or what a user says (chat). Empty: nothing is written."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens after which a sample is cut off."""


class HiddenClient(StrictModel):
    """Client privacy of a federation's sums (docs/privacy.md, "Clients in sums"): the least that a client accepts, or
    what it took part under.
    """

    epsilon: Annotated[float, Field(gt=0)]
    """Largest epsilon of all sums together."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Largest delta."""
    tolerated: Annotated[int, Field(ge=1)] = 1
    """Least number of a sum's clients whose noise is not counted on."""


class ProtectionConfig(StrictModel):
    accept: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    """Levels of protection under which this client takes part: none, selective-ope, selective, complete. None: at least
    what the operator promised at enrolment, and what it first took part under; never `none`, which must be written."""
    client_privacy: HiddenClient | None = None
    """Least client privacy of the federation's sums. None: what this client first took part under, or none."""


class PrivacyConfig(StrictModel):
    """Differential privacy of each training example (docs/privacy.md). Exactly one of epsilon and noise_multiplier."""

    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """What all rounds together may reveal of one example, above 0. The noise follows from it, and training ends when it
    is spent."""
    noise_multiplier: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    """Standard deviation of the noise over `max_gradient_norm`. The epsilon that it costs has no limit."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Probability that the promise does not hold, far below 1 / number of examples."""
    max_gradient_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Norm that each example's gradient is scaled down to."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PydanticCustomError(
                "privacy", "give exactly one of epsilon (the budget) and noise_multiplier (the noise)"
            )
        return self


class ResourcesConfig(StrictModel):
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for training; 0 takes all cores."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """How far to step back for other processes, 0 (not) to 19 (most)."""
    micro_batch: Annotated[int, Field(ge=0, le=4096)] = 0
    """Examples computed at once; a training step adds up the gradients of its batch in parts of this size, which takes
    less memory. 0 computes the whole batch at once."""
    only_charging: bool = False
    """Compute only while this device is plugged in. Devices without a battery always are."""
    max_other_cpu: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Compute only while other processes use at most this share of the CPU, above 0 to 1. 1: always."""


class LogConfig(StrictModel):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe records that are shown."""
    json_lines: bool = False
    """One JSON object a line in place of lines for people."""


class AgentConfig(StrictModel):
    """All settings of an agent. What all agents share comes from the federation instead."""

    federation: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
    """Name of the federation to join: 1 to 64 characters of a-z, 0-9 and '-'."""
    client_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Name of this client, unique in the federation: 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'."""
    coordinator: Address
    """Address of the coordinator, host:port."""
    aggregation: Annotated[tuple[Address, ...], Field(min_length=1)]
    """Addresses of aggregation replicas, host:port. Any of them serves any call; the next is tried if one fails."""
    key_authority: Address
    """Address of the key authority, host:port."""
    state_dir: AbsolutePath
    """Folder for this client's key and certificate (`client-agent enroll` puts them there), for state that survives a
    restart, and for the trained adapter. Mode 0700. One agent a folder."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The examples, which never leave this machine."""
    lora: LoraSettings = LoraSettings()
    """This client's adapter."""
    learner: Name = OWN_LEARNER
    """What trains: `transformers`, the agent's own loop; the name of an entry point of the group client_agent.learners;
    or module:attribute (docs/own-trainer.md). It is code that runs here with this client's data."""
    training: TrainingSettings = TrainingSettings()
    """How this client trains; what all must share is the federation's."""
    metrics: tuple[Name, ...] = ()
    """Functions of your own that say how good the model is on test examples, module:attribute each (docs/training.md).
    They are code that runs here with this client's data."""
    samples: SampleSettings = SampleSettings()
    """Prompts that the model answers after each round, in state_dir/samples; for causal-lm and chat alone."""
    budget: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Least share of the columns of A to encrypt, 0 to 1, in a selective federation; complete ones encrypt everything.
    1 is the safe choice; less is for uplinks that cannot carry it. The client leaves a federation that would have it
    encrypt less."""
    protection: ProtectionConfig = ProtectionConfig()
    """The least protection this client accepts."""
    privacy: PrivacyConfig | None = None
    """What this client's updates may reveal of one training example. None: no limit."""
    resources: ResourcesConfig = ResourcesConfig()
    """What of this machine to use."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """TCP port of the Prometheus endpoint; 0 picks a free one. None: no endpoint."""
    metrics_host: str = "127.0.0.1"
    """Address it listens on. It speaks plain HTTP to anyone who reaches it: use 0.0.0.0 only in a private network."""
    log: LogConfig = LogConfig()
    """Logs."""

    @model_validator(mode="after")
    def _privacy_has_its_own_loop(self) -> Self:
        training, model = self.training, self.model
        own = (
            training.label_smoothing,
            training.gradient_checkpointing,
            training.packing,
            training.optimizer.endswith("8bit"),
            training.report_to,
            training.keeps_moments,
            model.dtype != "float32",
            model.quantization != "none",
        )
        if self.privacy is not None and any(own):
            raise PydanticCustomError(
                "privacy",
                "privacy computes each example's gradient by itself: it goes with optimizer adamw_torch, "
                "adamw_torch_fused or sgd, optimizer_state reset, model.dtype float32 and model.quantization none, and "
                "without label_smoothing, gradient_checkpointing, packing and report_to",
            )
        return self

    @classmethod
    def load(
        cls,
        path: Path,
        environment: Mapping[str, str] = os.environ,
        absent: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Reads a YAML file, then the overrides.

        Relative paths start from the file's folder; `model.path` does so where such a folder or file exists.

        Args: absent: Sections for a file that leaves them out.
        Raises: DomainError CONFIGURATION_INVALID naming each field, its value and what is allowed.
        """
        values = {**absent, **read_yaml(path)}
        _override(values, environment)
        folder = path.absolute().parent
        try:
            config = cls.model_validate(values, context={_FOLDER: folder})
        except ValidationError as error:
            raise invalid(f"{path} is not a valid configuration:\n{explain(error, cls)}") from None
        return config.with_local_model(folder)

    @property
    def cache_dir(self) -> Path:
        """Where many examples are kept while the agent runs."""
        return self.data.cache_dir or self.state_dir

    @property
    def identity(self) -> IdentityFolder:
        """Where this client's key and certificate lie."""
        return IdentityFolder(self.state_dir / IDENTITY)

    def credentials(self) -> TlsCredentials:
        """What this client shows.

        Raises: DomainError CONFIGURATION_INVALID if it has not enrolled, its certificate has expired, or it is of
        another client or federation than this configuration.
        """
        credentials = TlsCredentials(self.identity)
        enrolled = credentials.held.facts.identity
        if enrolled != Identity(Role.CLIENT, self.federation, self.client_id):
            raise invalid(
                f"the identity in {self.state_dir / IDENTITY} is that of {enrolled}, but the configuration is for "
                f"client {self.client_id} of federation {self.federation}: change it, or enrol again"
            )
        return credentials

    def with_local_model(self, folder: Path) -> Self:
        """The same with `model.path` made absolute if it exists in `folder`; otherwise it is a name on the hub."""
        try:
            local = folder / Path(self.model.path).expanduser()
        except RuntimeError as error:
            raise invalid(f"model.path = {self.model.path}: {error}") from error
        if not _exists(local):
            return self
        return self.model_copy(
            update={"model": self.model.model_copy(update={"path": str(local.absolute())})}
        )


def _exists(path: Path) -> bool:
    """Whether something is there. A path that may not be looked at counts as there; reading it is refused later."""
    try:
        return path.exists()
    except PermissionError:
        return True
    except (OSError, ValueError):  # no name that a file can have
        return False


def _override(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Puts every SHELORA_AGENT__A__B=value of the environment at values["a"]["b"]; values are read as YAML."""
    for name, text in sorted(environment.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        *parents, field = name.removeprefix(ENV_PREFIX).lower().split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise invalid(f"environment {name}: {parent} is not a section")
        place[field] = parse_yaml(text, f"environment {name}:")
