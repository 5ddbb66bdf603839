"""The form of a new federation: its fields are those of the YAML file, read from the same classes, checked by them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from shelora.ckks.parameters import PROFILES
from shelora.configuration import parse_yaml, remedy
from shelora.errors import DomainError
from shelora.federation import FederationSpec
from shelora.strategies.registry import strategies

ESSENTIAL: Final = frozenset(
    {
        "name",
        "training.base_model",
        "training.task",
        "training.labels",
        "training.local_steps",
        "round.rounds",
        "round.clients",
        "round.min_updates",
        "round.deadline_s",
        "protection.mode",
    }
)
"""What most operators set; the others are folded away."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One field of the form."""

    path: str
    """As in YAML, such as `round.clients`."""
    text: str
    """What it holds: what was sent, or its default."""
    hint: str
    choices: tuple[str, ...]
    """Nothing else is valid, if there are any."""
    numeric: bool
    required: bool
    error: str

    @property
    def essential(self) -> bool:
        """Whether it is always shown."""
        return self.path in ESSENTIAL

    @property
    def label(self) -> str:
        """Its name within its section."""
        name = self.path.rpartition(".")[2]
        return (name[:-2] + " (s)" if name.endswith("_s") else name).replace("_", " ")


@dataclass(frozen=True)
class Group:
    """A section of the YAML file."""

    name: str
    inputs: tuple[Input, ...]
    error: str
    """What is wrong with several fields together."""


def checked(sent: Mapping[str, str]) -> tuple[FederationSpec | None, dict[str, str]]:
    """The specification that a form holds, or what is wrong by dotted path, in the words that a YAML file gets."""
    try:
        return FederationSpec.model_validate(_values(sent)), {}
    except ValidationError as error:
        return None, {_place(problem): remedy(problem) for problem in error.errors(include_url=False)}


def groups(sent: Mapping[str, str] | None = None, errors: Mapping[str, str] | None = None) -> list[Group]:
    """The form: as it was sent, with what is wrong beside each field, or with all defaults."""
    errors = errors or {}
    top = [n for n, f in FederationSpec.model_fields.items() if _section(f) is None]
    found = [
        Group(
            "federation", tuple(_input(n, FederationSpec, n, sent, errors) for n in top), errors.get("", "")
        )
    ]
    for name, model in _sections():
        inputs = tuple(_input(f"{name}.{field}", model, field, sent, errors) for field in model.model_fields)
        found.append(Group(name, inputs, errors.get(name, "")))
    return found


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in FederationSpec.model_fields.items():
        model = _section(field)
        if model is not None:
            yield name, model


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _input(
    path: str,
    model: type[BaseModel],
    name: str,
    sent: Mapping[str, str] | None,
    errors: Mapping[str, str],
) -> Input:
    field = model.model_fields[name]
    text = _shown(field.default) if sent is None else sent.get(path, "")
    return Input(
        path=path,
        text=text,
        hint=" ".join((field.description or "").split()),
        choices=_choices(path, field),
        numeric=_is_number(field.annotation),
        required=field.is_required(),
        error=errors.get(path, ""),
    )


def _choices(path: str, field: FieldInfo) -> tuple[str, ...]:
    if path == "protection.mode":
        return strategies()
    if path == "protection.parameters":
        return tuple(sorted(p.name for p in PROFILES.values() if p.secure))
    return tuple(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ()


def _shown(default: Any) -> str:  # noqa: ANN401 - of any field
    if default is PydanticUndefined or default is None:
        return ""
    return ", ".join(default) if isinstance(default, tuple) else str(default)


def _values(sent: Mapping[str, str]) -> dict[str, Any]:
    """The fields as YAML would hold them. An empty one is absent, so it has its default; unknown ones are refused."""
    found: dict[str, Any] = {}
    for path, text in sent.items():
        section, _, name = path.rpartition(".")
        if text.strip():
            place = found.setdefault(section, {}) if section else found
            place[name] = _value(path, text.strip())
    return {"training": {}, **found}


def _value(path: str, text: str) -> Any:  # noqa: ANN401 - of any field
    kind = _annotation(path)
    if get_origin(kind) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if _is_number(kind) or _is_section(kind):
        try:
            return parse_yaml(text, path)
        except DomainError:
            return text
    return text


def _is_number(kind: Any) -> bool:  # noqa: ANN401 - a type, a form of typing or a choice
    """Whether values are numbers: a type, a choice of them, or one that may be absent."""
    return kind in {int, float} or isinstance(kind, int) or any(map(_is_number, get_args(kind)[:2]))


def _is_section(kind: Any) -> bool:  # noqa: ANN401 - a type or a form of typing
    """Whether values are a section within a section, which a form takes in YAML's braces."""
    return any(isinstance(k, type) and issubclass(k, BaseModel) for k in get_args(kind))


def _annotation(path: str) -> Any:  # noqa: ANN401 - a type or a form of typing
    section, _, name = path.rpartition(".")
    model: type[BaseModel] = dict(_sections()).get(section, FederationSpec)
    field = model.model_fields.get(name)
    return None if field is None else field.annotation


def _place(problem: ErrorDetails) -> str:
    """Dotted path of the field beside which a problem is shown: that of a rule over several names the one to change."""
    path: Sequence[int | str] = [part for part in problem["loc"] if not str(part).startswith("function-")]
    dotted = ".".join(str(part) for part in path if not isinstance(part, int))
    known = {f"{name}.{field}" for name, model in _sections() for field in model.model_fields}
    if dotted in known:
        return dotted
    if (around := dotted.rpartition(".")[0]) in known:
        return around
    candidates = [p for p in known if p.startswith(dotted) and p.rpartition(".")[2] == problem["type"]]
    return candidates[0] if len(candidates) == 1 else dotted
