"""Configuration files: strict models, YAML, and errors that name the field, its value and the remedy."""

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shelora.errors import DomainError, Reason

MAX_SHOWN_CHARACTERS: Final = 60
"""Characters of a refused value that an error shows."""


class StrictModel(BaseModel):
    """Frozen; refuses unknown fields, NaN and infinity; the docstring under a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def invalid(message: str) -> DomainError:
    """A CONFIGURATION_INVALID error."""
    return DomainError(Reason.CONFIGURATION_INVALID, message)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; raises CONFIGURATION_INVALID if it cannot be read, is not YAML or has no fields."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"{path} cannot be read: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise invalid(f"{path} must hold fields such as 'name: value'")
    return values


def parse_yaml(text: str, source: str) -> Any:  # noqa: ANN401 - whatever it holds
    """The value of a YAML text. Raises: CONFIGURATION_INVALID naming the source."""
    try:
        return yaml.safe_load(text)
    # PyYAML lets int() and date() speak for themselves
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise invalid(f"{source} is not valid YAML: {error}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A line for every problem: the field's dotted path, its value, what to do, what the field is."""
    return "\n".join(_line(problem, model) for problem in error.errors(include_url=False))


def _line(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = [part for part in problem["loc"] if not str(part).startswith("function-")]
    owner, field = _locate(model, path)
    dotted = ".".join(map(str, path)) or "together"
    return f"  {dotted}{_shown(problem)}: {_remedy(problem, owner, path)}{_described(problem, field)}"


def _locate(model: type[BaseModel], path: Sequence[int | str]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost model on the path, and the last field found on it."""
    field = None
    for part in path:
        if str(part) not in model.model_fields:
            break
        field = model.model_fields[str(part)]
        model = next(_models(field), model)
    return model, field


def _models(field: FieldInfo) -> Iterator[type[BaseModel]]:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _shown(problem: ErrorDetails) -> str:
    """` = value`, cut short; nothing for an absent field or a problem of several fields."""
    if problem["type"] == "missing" or isinstance(problem["input"], Mapping | BaseModel):
        return ""
    text = _bounded().repr(problem["input"])
    return f" = {text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + '...'}"


def _bounded() -> reprlib.Repr:
    """Shows the beginning alone: some lines of YAML, whose anchors repeat one another, can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 2 * MAX_SHOWN_CHARACTERS, 2 * MAX_SHOWN_CHARACTERS
    return short


def _remedy(problem: ErrorDetails, owner: type[BaseModel], path: Sequence[int | str]) -> str:
    match problem["type"]:
        case "missing":
            return "this field has no default: add it"
        case "extra_forbidden":
            return f"there is no such field{_suggestion(owner, path)}"
        case "string_pattern_mismatch":
            return "it has other characters or another length than allowed"
    message = problem["msg"].removeprefix("Value error, ")
    return message.replace("Input should be", "use", 1)


def _suggestion(owner: type[BaseModel], path: Sequence[int | str]) -> str:
    """The field whose name is nearest, else the fields there are."""
    close = difflib.get_close_matches(str(path[-1]), owner.model_fields, n=1)
    if close:
        return f"; did you mean {'.'.join(map(str, [*path[:-1], close[0]]))}?"
    return f"; known are {', '.join(owner.model_fields)}"


def _described(problem: ErrorDetails, field: FieldInfo | None) -> str:
    """What the field is, unless it is another field that is unknown."""
    if field is None or not field.description or problem["type"] == "extra_forbidden":
        return ""
    return f". {' '.join(field.description.split())}"
