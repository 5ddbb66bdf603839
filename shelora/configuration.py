"""Configuration files: strict models, YAML, and errors that name the field, its value and the remedy."""

import codecs
import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shelora import files
from shelora.errors import DomainError, Reason

MAX_PROBLEMS: Final = 20
"""Problems of a file that an error lists."""
MAX_SHOWN_CHARACTERS: Final = 60
"""Characters of a refused value that an error shows."""
LARGEST_SHOWN_BITS: Final = 1024
MAX_FILE_BYTES: Final = 2**21
"""Bytes of a configuration, a token, a password."""


class StrictModel(BaseModel):
    """Frozen; refuses unknown fields, NaN and infinity; the docstring under a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def invalid(message: str) -> DomainError:
    """A CONFIGURATION_INVALID error."""
    return DomainError(Reason.CONFIGURATION_INVALID, message)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; raises CONFIGURATION_INVALID if it cannot be read, is not YAML or has no fields."""
    try:
        text = _decoded(_read_small(path, str(path)))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise invalid(
            f"{path}, line {line} is not {error.encoding.upper()}: save the file as UTF-8"
        ) from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise invalid(f"{path} must hold fields such as 'name: value'")
    return values


def read_secret(path: Path, what: str) -> str:
    """The text of a file that holds a token or a password.

    Args: what: Names the file in errors, which show nothing of it.
    Raises: CONFIGURATION_INVALID.
    """
    content = _read_small(path, f"{what} {path}")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise invalid(f"{what} {path} holds no text: is it the right file?") from None


def _read_small(path: Path, named: str) -> bytes:
    try:
        return files.read_small(path, MAX_FILE_BYTES)
    except files.UnreadableError as error:
        raise invalid(f"{named} cannot be read: {error}") from error


def _decoded(content: bytes) -> str:
    """YAML is UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def parse_yaml(text: str, source: str) -> Any:  # noqa: ANN401 - whatever it holds
    """The value of a YAML text. Raises: CONFIGURATION_INVALID naming the source, in one line."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise invalid(f"{source} is not valid YAML: line {line}: remove the control characters") from error
    except yaml.MarkedYAMLError as error:
        raise invalid(f"{source} is not valid YAML: {_fault(error)}") from error
    except RecursionError as error:
        raise invalid(f"{source} is not valid YAML: it is nested too deeply") from error
    except _MisfitError as error:
        raise invalid(f"{source} is not valid YAML: {error}") from error
    except _UNFIT as error:  # of a set or a list of pairs, which PyYAML fills later
        raise invalid(
            f"{source} is not valid YAML: some value does not fit its tag: leave tags out"
        ) from error


def _fault(error: yaml.MarkedYAMLError) -> str:
    """Where a text is no YAML, why, and what to do about it where users often meet it."""
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = " ".join((error.problem or error.context or "it is malformed").split())
    hint = next((f"; {hint}" for part, hint in _HINTS.items() if part in said), "")
    return f"{place}{said}{hint}"


_HINTS: Final = {
    "'\\t'": "indent with spaces, not with tabs",
    "another document": "keep one of the parts that --- separates",
    "mapping values are not allowed": "put a text that holds ': ' into quotes",
    "could not determine a constructor": "leave the tag out",
    "unhashable key": "put a name with brackets or braces into quotes",
    "cannot start any token": "put the text into quotes",
}
"""Remedies, by part of what PyYAML says."""


_UNFIT: Final = (ValueError, LookupError, AttributeError, TypeError)
"""What PyYAML raises where a value does not fit its tag: each constructor something else."""


class _MisfitError(ValueError):
    """What is wrong with a value, with its line, in users' words."""


class _Loader(yaml.SafeLoader):
    """YAML in which a field is given once; as in YAML 1.2, `1e-3` is a number, and `010` and `1:30` are none."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        """Raises: _MisfitError naming both places of a field that is given twice."""
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            first = seen.setdefault((key.tag, str(key.value)), key)
            if first is not key and key.tag != _MERGE:
                places = " and ".join(f"line {k.start_mark.line + 1}" for k in (first, key))
                raise _MisfitError(f"{key.value} is given twice, in {places}: keep one")
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - PyYAML's
        """Raises: _MisfitError for a value that its tag does not fit, of which PyYAML raises whatever it happens to."""
        try:
            return super().construct_object(node, deep)
        except _MisfitError:
            raise
        except _UNFIT as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _MisfitError(
                f"line {node.start_mark.line + 1}: it is not of type {kind}: put it into quotes if it is text, without "
                "a tag"
            ) from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Raises: _MisfitError for fields taken over from one another until they fill the memory."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_FIELDS:
            raise _MisfitError(f"line {node.start_mark.line + 1}: it has more than {_MOST_FIELDS:,} fields")

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Raises: _MisfitError for what YAML 1.1 reads in base 8 or 60, without a word, and for numbers of a book."""
        text = self.construct_scalar(node)
        if _AMBIGUOUS.match(text):
            what = "write a number without leading zeros or colons, or put it into quotes if it is text"
        elif len(text) > _LONGEST_NUMBER:
            what = "write a shorter number, or put it into quotes if it is text"
        elif node.tag == _INTEGER:
            return super().construct_yaml_int(node)
        else:
            return super().construct_yaml_float(node)
        shown = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
        raise _MisfitError(f"line {node.start_mark.line + 1}: {shown}: {what}")


_MOST_FIELDS: Final = 10_000
"""Of one section, those included that `<<` takes over."""
_MERGE: Final = "tag:yaml.org,2002:merge"
_INTEGER: Final = "tag:yaml.org,2002:int"
_FLOAT: Final = "tag:yaml.org,2002:float"
_LONGEST_NUMBER: Final = 300
"""Characters; more are beyond every float, and Python refuses to convert thousands."""
_AMBIGUOUS: Final = re.compile(r"[-+]?(0[0-9_]+$|.*:)")
for _tag in (_INTEGER, _FLOAT):
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A line for each of the first problems: the field's dotted path, its value, what to do, what the field is."""
    problems = _own(error.errors(include_url=False))
    lines = [_line(problem, model) for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, f"  and {more:,} more problems"] if more else lines)


def _own(problems: Sequence[ErrorDetails]) -> Sequence[ErrorDetails]:
    """Without lists that are too short only because of a wrong item, which is named itself."""
    inside = {problem["loc"][:-1] for problem in problems}
    return [p for p in problems if p["type"] != "too_short" or p["loc"] not in inside]


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
    text = _Bounded().repr(problem["input"])
    return f" = {text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + '...'}"


class _Bounded(reprlib.Repr):
    """Shows the beginning alone: some lines of YAML, whose anchors repeat one another, can stand for gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 2 * MAX_SHOWN_CHARACTERS, 2 * MAX_SHOWN_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        """Python itself refuses to write a number of thousands of digits."""
        if x.bit_length() > LARGEST_SHOWN_BITS:
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)


def _remedy(problem: ErrorDetails, owner: type[BaseModel], path: Sequence[int | str]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"there is no such field{_suggestion(owner, path)}"
    return remedy(problem)


def remedy(problem: ErrorDetails) -> str:
    """What to do about a wrong value, in users' words."""
    words = REMEDIES.get(problem["type"])
    if words is None:  # of our own validators, which speak to users
        return problem["msg"].removeprefix("Value error, ")
    return words.format(**problem.get("ctx", {}))


REMEDIES: Final = {
    "missing": "this field has no default: add it",
    "extra_forbidden": "there is no such field",
    "string_type": "write text; in quotes, if it looks like a number, a date, yes or no",
    "string_unicode": "it holds half of a character (of a surrogate pair): remove it",
    "invalid_key": "put the name into quotes",
    "string_too_short": "write at least {min_length} characters",
    "string_too_long": "write at most {max_length} characters",
    "string_pattern_mismatch": "it has other characters or another length than allowed",
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "int_parsing_size": "write a smaller number",
    "float_type": "write a number",
    "float_parsing": "write a number",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "greater_than": "use more than {gt:g}",
    "greater_than_equal": "use at least {ge:g}",
    "less_than": "use less than {lt:g}",
    "less_than_equal": "use at most {le:g}",
    "literal_error": "use {expected}",
    "enum": "use {expected}",
    "tuple_type": "write a list, as [a, b]",
    "list_type": "write a list, as [a, b]",
    "too_short": "list at least {min_length}",
    "too_long": "list at most {max_length}",
    "model_type": "write fields below it, each as 'name: value'",
    "dict_type": "write fields below it, each as 'name: value'",
    "path_type": "write a path",
    "is_instance_of": "write a {class}",
}
"""What to do, by pydantic's type of the error; `{...}` are its details."""


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
