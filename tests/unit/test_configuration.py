"""Configuration files: what YAML makes of them, and what errors say."""

import datetime as dt
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core.core_schema import ErrorType

from client_agent.config import AgentConfig
from coordinator.settings import CoordinatorSettings
from services.aggregation.settings import AggregationSettings
from services.key_authority.settings import KeyAuthoritySettings
from shelora.configuration import MAX_FILE_BYTES, REMEDIES, explain, read_secret, read_yaml, remedy
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec

WRONG = [
    *(None, True, "", "x", "[/x]", "x" * 2000, "1e400", b"x", dt.date(2026, 1, 1)),
    *(-1, 0, 1, 10**30, 10**5000, -1.5, 0.5, 1e300, float("nan"), float("inf")),
    *([], ["x"], [1], [[]], ["x"] * 100, {}, {"x": 1}, {"x": {}}, {1, 2}, object()),
]
JARGON = re.compile(
    r"Input should|valid (tuple|dict|integer|string|number|bool|path)|instance|parse|pydantic|Value error"
)
LIBRARY = set(get_args(ErrorType)) - {"value_error"}


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields, sections included."""
    for name, field in model.model_fields.items():
        yield (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*path, name))


def nested(path: tuple[str, ...], value: object) -> dict:
    return {path[0]: value if len(path) == 1 else nested(path[1:], value)}


def refused(model: type[BaseModel], values: dict) -> ValidationError:
    with pytest.raises(ValidationError) as error:  # other fields are missing at least
        model.model_validate(values)
    return error.value


@pytest.mark.parametrize(
    "model", [AgentConfig, FederationSpec, CoordinatorSettings, AggregationSettings, KeyAuthoritySettings]
)
def test_no_wrong_value_of_any_field_is_explained_in_the_librarys_words(model):
    seen = set()
    for path in fields(model):
        for value in [*WRONG, {"no_such_field": 1}]:
            error = refused(model, nested(path, value))
            for problem in error.errors(include_url=False):
                seen.add(problem["type"])
                assert not JARGON.search(remedy(problem)), problem
            assert not JARGON.search(explain(error, model))
    assert seen & LIBRARY <= REMEDIES.keys(), "errors of the library without words of ours"
    assert {"missing", "string_type"} <= seen


def refusal(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(DomainError) as error:
        read_yaml(path)
    assert error.value.reason is Reason.CONFIGURATION_INVALID
    return error.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice, in line 1 and line 3: keep one"),
        ("r:\n  x: 1\n  y: {x: 1}\n  x: 2\n", "x is given twice, in line 2 and line 4"),
        ("a: {x: 1, x: 1}", "x is given twice, in line 1 and line 1"),
        ("'a': 1\na: 2", "a is given twice"),
        ("l:\n- {x: 1}\n- {y: 1, y: 2}", "y is given twice, in line 3 and line 3"),
    ],
)
def test_a_field_given_twice_is_refused_with_both_places(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_an_anchor_may_be_merged_and_overridden(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nother: &c {z: 3}\nuse:\n  <<: [*b, *c]\n  x: 5\n")
    assert read_yaml(path)["use"] == {"x": 5, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2.5e3", -2500.0),
        ("+.5e1", 5.0),
        ("1.e2", 100.0),
        ("1e", "1e"),
        ("e5", "e5"),
        ("0x1e3", 483),
        ("12", 12),
        ("1.5", 1.5),
        ("'1e-3'", "1e-3"),
        ("1e3abc", "1e3abc"),
        ("1.2.3e4", "1.2.3e4"),
    ],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"a: {text}")
    read = read_yaml(path)["a"]
    assert (read, type(read)) == (value, type(value))


def test_an_exponent_does_for_a_learning_rate(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("name: f\ntraining: {base_model: b, labels: [x, y], learning_rate: 1e-3}\n")
    assert FederationSpec.from_yaml(path).training.learning_rate == 1e-3


def test_a_name_that_yaml_takes_for_something_else_is_answered_with_quotes(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("name: f\ntraining: {base_model: b, labels: [yes, no]}\n")
    with pytest.raises(DomainError, match=r"training.labels.0 = True: write text; in quotes"):
        FederationSpec.from_yaml(path)
    path.write_text("name: f\ntraining: {base_model: b, labels: yes}\n")
    with pytest.raises(DomainError, match=r"write a list, as \[a, b\]"):
        FederationSpec.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a:\n\tb: 1\n",
            "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document; keep one"),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here; put a text"),
        ('a: !!python/object/apply:os.system ["id"]', "line 1, column 4: could not determine a constructor"),
        ("? [a, b]\n: x\n", "line 1, column 3: found unhashable key"),
        ("a: {b: ${C}}\n", "line 1, column 9"),
        ("a: @b\n", "line 1, column 4"),
        ("b: 1\na: \x01\n", "line 2: remove the control characters"),
        ("[" * 5000, "nested too deeply"),
        ("b: 1\na: " + "9" * 5000, "line 2: " + "9" * 60 + "...: write a shorter number"),
        ("a: 2024-13-01", "line 1: it is not of type timestamp: put it into quotes"),
    ],
)
def test_what_is_no_yaml_is_refused_in_one_line_with_the_place(tmp_path, text, said):
    message = refusal(tmp_path, text)
    assert said in message
    assert f"{tmp_path}/x.yaml" in message
    assert "\n" not in message
    assert "unicode string" not in message
    assert len(message) < 400


@pytest.mark.parametrize("text", ["010", "-010", "0_7", "00", "1:30", "1:30.5", "-1:30"])
def test_numbers_that_yaml_reads_in_another_base_without_a_word_are_refused(tmp_path, text):
    assert f"line 2: {text}: write a number without leading zeros or colons" in refusal(
        tmp_path, f"b: 1\na: {text}\n"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-0", 0), ("0.5", 0.5), ("0x10", 16), ("1_000", 1000), ("00e1", 0.0), ("'010'", "010")],
)
def test_numbers_that_can_be_read_in_one_way_alone_are_read(tmp_path, text, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"a: {text}")
    assert read_yaml(path) == {"a": value}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    path = tmp_path / "x.yaml"
    path.write_bytes("a: b\u00e9n\u00e9f\n".encode(encoding))
    assert read_yaml(path) == {"a": "b\u00e9n\u00e9f"}


@pytest.mark.parametrize(
    ("content", "said"),
    [("a: 1\nb: b\u00e9\n".encode("latin-1"), "line 2 is not UTF-8"), (b"\xff\xfea", "line 1 is not UTF-16")],
)
def test_another_encoding_is_refused_with_the_line_and_the_remedy(tmp_path, content, said):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(DomainError, match=said) as error:
        read_yaml(path)
    assert error.value.message.endswith(": save the file as UTF-8")


def test_of_very_many_problems_the_first_are_listed(tmp_path):
    path = tmp_path / "f.yaml"
    labels = ", ".join(map(str, range(5000)))
    path.write_text(f"name: f\ntraining: {{base_model: b, labels: [{labels}]}}\n")
    with pytest.raises(DomainError, match=r"training.labels.0 = 0: write text") as error:
        FederationSpec.from_yaml(path)
    assert error.value.message.endswith("  and 4,980 more problems")
    assert len(error.value.message) < 5000


def test_a_wrong_item_of_a_list_is_named_alone(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("name: f\ntraining: {base_model: b, labels: [x, y], target_modules: [1]}\n")
    with pytest.raises(DomainError, match=r"training.target_modules.0 = 1: write text") as error:
        FederationSpec.from_yaml(path)
    assert "list at least" not in error.value.message


def test_half_a_character_and_a_number_for_a_name_are_refused_in_users_words(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text('name: f\n1: x\ntraining: {base_model: "\\ud800", labels: [x, y]}\n')
    with pytest.raises(DomainError, match="half of a character") as error:
        FederationSpec.from_yaml(path)
    assert "1 = 1: put the name into quotes" in error.value.message


def test_a_list_in_the_environment_that_is_no_json_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("SHELORA_COORDINATOR_AGGREGATION_ADDRESSES", "a:1,b:2")
    with pytest.raises(DomainError, match="SHELORA_COORDINATOR_AGGREGATION_ADDRESSES") as error:
        CoordinatorSettings.load()
    assert "\n" not in error.value.message
    assert json.dumps("a:1,b:2") not in error.value.message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent", None, "cannot be read: No such file"),
        ("bytes", b"\xff\xfe\x00", "holds no text: is it the right file?"),
        (
            "long",
            b"x" * (MAX_FILE_BYTES + 1),
            "it has more than 2,097,152 bytes: is it the right file?",
        ),
        ("a\0b", None, "cannot be read: no file can have this name"),
        ("x" * 300, None, "cannot be read: File name too long"),
    ],
)
def test_a_file_of_a_secret_that_is_none_is_named_and_not_shown(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DomainError) as caught:
        read_secret(tmp_path / name, "the token file")
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert caught.value.message.startswith(f"the token file {tmp_path / name} ")
    assert said in caught.value.message


def test_a_file_without_end_is_no_configuration():
    with pytest.raises(DomainError, match="/dev/zero cannot be read: it has more than 2,097,152 bytes"):
        read_yaml(Path("/dev/zero"))
