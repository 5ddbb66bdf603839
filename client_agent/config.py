"""Configuration of an agent: one YAML file, single values overridden from the environment.

`SHELORA_AGENT__DATA__TRAIN=/data/train.jsonl` overrides `data.train`. Unknown fields are refused.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails

from shelora.errors import DomainError, Reason
from shelora.transport.address import HostPort

ENV_PREFIX: Final = "SHELORA_AGENT__"
_SUFFIXES: Final = (".jsonl", ".csv", ".parquet")
_FOLDER: Final = "folder"
"""Key of the validation context: the folder that relative paths start from."""


class StrictModel(BaseModel):
    """Frozen; refuses unknown fields; the docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )


def _absolute(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get(_FOLDER, Path())
    return (folder / path.expanduser()).absolute()


def _data_file(path: Path) -> Path:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"the file name must end in one of {', '.join(_SUFFIXES)}")
    return path


def _address(value: str) -> str:
    try:
        return str(HostPort.parse(value))
    except DomainError as error:
        raise ValueError(error.message) from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
DataPath = Annotated[Path, AfterValidator(_absolute), AfterValidator(_data_file)]
Address = Annotated[str, AfterValidator(_address)]
Name = Annotated[str, StringConstraints(min_length=1)]


class ModelConfig(StrictModel):
    path: Name
    """Base model: a folder, a `.gguf` file, or a name on the Hugging Face hub. It must hold the same weights at every
    agent of the federation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA if there is any."""


class DataConfig(StrictModel):
    train: DataPath
    """Training examples; the suffix .jsonl, .csv or .parquet gives the format. Relative to the configuration file."""
    test: DataPath | None = None
    """Test examples, for the evaluation reported after each round. None: nothing is reported."""
    text_field: Name = "text"
    """Field (column) that holds the text."""
    label_field: Name = "label"
    """Field (column) that holds the class name; not read for causal-lm."""


class LoraSettings(StrictModel):
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank r of this client's factors. Larger costs memory and upload in proportion."""
    alpha: Annotated[float, Field(gt=0, le=10_000)] = 16.0
    """LoRA alpha; an update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the inputs of the adapters while training, 0 to below 1."""

    @property
    def scaling(self) -> float:
        """The s of ΔW = s B A."""
        return self.alpha / self.rank


class ResourcesConfig(StrictModel):
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for training; 0 takes all cores."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """How far to step back for other processes, 0 (not) to 19 (most)."""


class LogConfig(StrictModel):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe records that are shown."""
    json_lines: bool = False
    """One JSON object a line in place of lines for people."""


class AgentConfig(StrictModel):
    """Everything an agent is told. What all agents share comes from the federation instead."""

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
    credential_file: AbsolutePath
    """File that holds the bearer credential for the key authority. Readable by this user only (mode 0600)."""
    state_dir: AbsolutePath
    """Folder for state that survives a restart, and for the trained adapter. Mode 0700. One agent a folder."""
    allow_plaintext: bool = False
    """Whether to talk to other machines without TLS. Only where something else protects the network."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The examples, which never leave this machine."""
    lora: LoraSettings = LoraSettings()
    """This client's adapter."""
    budget: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the columns of A to encrypt, 0 to 1. 1 is the safe choice; less is for uplinks that cannot carry it."""
    resources: ResourcesConfig = ResourcesConfig()
    """What of this machine to use."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """TCP port of the Prometheus endpoint on 127.0.0.1; 0 picks a free one. None: no endpoint."""
    log: LogConfig = LogConfig()
    """Logs."""

    @classmethod
    def load(cls, path: Path, environment: Mapping[str, str] = os.environ) -> Self:
        """Reads a YAML file, then the overrides.

        Relative paths start from the file's folder; `model.path` does so where such a folder or file exists.

        Raises: DomainError CONFIGURATION_INVALID naming each field, its value and what is allowed.
        """
        values = _read_yaml(path)
        _override(values, environment)
        folder = path.absolute().parent
        try:
            config = cls.model_validate(values, context={_FOLDER: folder})
        except ValidationError as error:
            lines = "\n".join(_explain(cls, details) for details in error.errors())
            raise invalid(f"{path}:\n{lines}") from error
        return config.with_local_model(folder)

    def credential(self) -> str:
        """The bearer credential.

        Raises: DomainError CONFIGURATION_INVALID if the file cannot be read, is empty or is open to other users.
        """
        try:
            mode = self.credential_file.stat().st_mode
            value = self.credential_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise invalid(
                f"credential_file: {self.credential_file} cannot be read: {error.strerror}"
            ) from error
        if mode & 0o077:
            raise invalid(f"credential_file: others can read {self.credential_file}; run chmod 600 on it")
        if not value:
            raise invalid(f"credential_file: {self.credential_file} is empty")
        return value

    def with_local_model(self, folder: Path) -> Self:
        """The same with `model.path` made absolute if it exists in `folder`; otherwise it is a name on the hub."""
        local = folder / Path(self.model.path).expanduser()
        if not local.exists():
            return self
        return self.model_copy(
            update={"model": self.model.model_copy(update={"path": str(local.absolute())})}
        )


def invalid(message: str) -> DomainError:
    """A CONFIGURATION_INVALID error."""
    return DomainError(Reason.CONFIGURATION_INVALID, message)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise invalid(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise invalid(f"{path} must hold fields such as 'federation: my-federation'")
    return values


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
        try:
            place[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise invalid(f"environment {name} is not a valid YAML value") from error


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    """One line for one mistake: dotted path, value, what is wrong, what the field is."""
    path = [part for part in details["loc"] if not str(part).startswith("function-")]
    owner, field = _locate(model, path)
    dotted = ".".join(str(part) for part in path)
    if details["type"] == "extra_forbidden":
        return f"  {dotted}: there is no such field{_nearest(str(path[-1]), owner, path[:-1])}"
    description = " ".join(((field.description if field else None) or "").split())
    if details["type"] == "missing":
        return f"  {dotted}: missing. {description}"
    message = details["msg"].removeprefix("Value error, ")
    return f"  {dotted}: {details['input']!r} is refused: {message}. {description}"


def _locate(model: type[BaseModel], path: Sequence[int | str]) -> tuple[type[BaseModel], Any]:
    """The deepest model on the path, and the last field found on it (None if none)."""
    field = None
    for part in path:
        if str(part) not in model.model_fields:
            break
        field = model.model_fields[str(part)]
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)), None)
        if inner is not None:
            model = inner
    return model, field


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nearest(name: str, owner: type[BaseModel], parents: Sequence[int | str]) -> str:
    found = difflib.get_close_matches(name, owner.model_fields, n=1)
    suggestion = ".".join([*map(str, parents), *found])
    return f"; did you mean {suggestion}?" if found else f"; known are {', '.join(owner.model_fields)}"
