"""The form and the YAML file are one thing: same fields, same defaults, same refusals."""

from pathlib import Path

import pytest
import yaml

from shelora.dashboard.forms import checked, groups
from shelora.errors import DomainError
from shelora.federation import FederationSpec

VALID = {"name": "weather", "training.base_model": "tiny-bert", "training.labels": "cold, warm"}


def test_every_field_of_the_yaml_file_is_in_the_form_with_its_default():
    inputs = {i.path: i.text for group in groups() for i in group.inputs}
    spec, errors = checked({**inputs, **VALID})
    assert errors == {}
    sections = {n: f.annotation for n, f in FederationSpec.model_fields.items() if n != "name"}
    paths = {"name", *(f"{n}.{field}" for n, model in sections.items() for field in model.model_fields)}
    assert inputs.keys() == paths
    training = {"base_model": "tiny-bert", "labels": ["cold", "warm"]}
    assert spec == FederationSpec.model_validate({"name": "weather", "training": training})


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("name", "No Capitals", "other characters"),
        ("round.rounds", "three", "whole number"),
        ("round.rounds", "3.5", "whole number"),
        ("round.rounds", "0", "at least 1"),
        ("round.rounds", "yes", "whole number"),
        ("round.rounds", "{a: [", "whole number"),
        ("training.learning_rate", "nan", "number"),
        ("training.learning_rate", "-1", "more than 0"),
        ("training.task", "other", "sequence-classification"),
        ("training.labels", "cold", "at least 2 different classes"),
        ("protection.mode", "magic", "use 'complete' or 'selective'"),
        ("protection.parameters", "weak", "use one of"),
        ("protection.clear_bits", "24", "16 or 32"),
        ("round.clients", "1", "at least 2"),
        ("round.target_updates", "1", "less than min_updates"),
        ("screening.max_norm_ratio", "1", "at least 2"),
        ("protection.coverage_floor", "0.5", "acts on the next vote"),
        ("round.unknown", "1", "no such field"),
    ],
)
def test_what_is_wrong_is_said_beside_its_field_in_the_words_of_the_yaml_file(tmp_path, field, text, words):
    spec, errors = checked({**VALID, field: text})
    assert spec is None
    assert words in errors[field]
    assert (
        any(i.error and i.path == field for g in groups(VALID, errors) for i in g.inputs)
        or "unknown" in field
    )
    content = {"name": "weather", "training": {"base_model": "tiny-bert", "labels": ["cold", "warm"]}}
    section, _, name = field.rpartition(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    place = content.setdefault(section, {}) if section else content
    place[name] = [value] if name == "labels" else value
    file = tmp_path / "federation.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(DomainError, match=".*".join(words.split(" ")[:2])):
        FederationSpec.from_yaml(file)


def test_the_form_keeps_what_was_sent():
    inputs = {
        i.path: i
        for group in groups({"name": "No", "round.rounds": "x"}, {"name": "bad"})
        for i in group.inputs
    }
    assert (inputs["name"].text, inputs["name"].error, inputs["round.rounds"].text) == ("No", "bad", "x")


def test_numbers_as_the_example_writes_them():
    example = yaml.safe_load(Path("examples/reuters/federation.yaml").read_text())
    sent = {"name": example["name"]}
    for section in ("training", "round", "screening", "protection"):
        for name, value in example[section].items():
            sent[f"{section}.{name}"] = ", ".join(value) if isinstance(value, list) else str(value)
    assert checked(sent) == (FederationSpec.model_validate(example), {})
