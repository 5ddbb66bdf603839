import pytest
import yaml

from shelora.errors import DomainError, Reason
from shelora.federation import ABSENT, FederationSpec
from shelora.v1 import coordinator_pb2 as pb

MINIMAL = {
    "name": "reuters",
    "training": {"base_model": "all-MiniLM-L6-v2", "labels": ["earn", "acq"]},
}


def written(tmp_path, content):
    path = tmp_path / "federation.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def merged(**sections):
    return {name: {**MINIMAL.get(name, {}), **fields} for name, fields in sections.items()}


def refusal(tmp_path, content) -> str:
    with pytest.raises(DomainError) as refused:
        FederationSpec.from_yaml(written(tmp_path, content))
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    return refused.value.message


def test_a_minimal_file_gets_every_default(tmp_path):
    spec = FederationSpec.from_yaml(written(tmp_path, MINIMAL))
    assert spec.training.labels == ("earn", "acq")
    assert (spec.round.rounds, spec.round.min_updates, spec.protection.mode) == (3, 3, "complete")


def test_a_specification_survives_the_wire(tmp_path):
    spec = FederationSpec.from_yaml(written(tmp_path, MINIMAL))
    assert FederationSpec.from_proto(spec.to_proto()) == spec


def test_every_field_of_the_wire_has_a_field_here_and_back():
    message = FederationSpec.model_validate(MINIMAL).to_proto()
    for section in (message.training, message.round, message.protection, message.screening):
        model = getattr(
            FederationSpec.model_validate(MINIMAL), section.DESCRIPTOR.name.removesuffix("Spec").lower()
        )
        assert {field.name for field in section.DESCRIPTOR.fields} == set(type(model).model_fields)


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        ("round", {"min_updates": 1}, "round.min_updates = 1: use at least 2"),
        ("round", {"deadline_s": "soon"}, "round.deadline_s = 'soon': write a whole number"),
        ("round", {"rounds": 10_001}, "round.rounds = 10001: use at most 10000"),
        (
            "round",
            {"min_update": 2},
            "round.min_update = 2: there is no such field; did you mean round.min_updates?",
        ),
        ("round", {"clients": 2, "min_updates": 3}, "raise clients or lower min_updates"),
        ("round", {"clients": 2}, "lower min_updates (with 2, either client can work out the other's update"),
        (
            "round",
            {"clients": 20_000, "min_updates": 20_000},
            "round.min_updates = 20000 is more than a round of protection.mode complete adds up: use at most 16384",
        ),
        (
            "round",
            {"target_updates": 20_000},
            "round.target_updates = 20000 is more than a round of protection.mode complete adds up: use at most",
        ),
        ("training", {"task": "diffusion"}, "training.task = 'diffusion': use 'sequence-classification'"),
        ("training", {"labels": ["only"]}, "at least 2 different classes"),
        ("training", {"labels": ["same", "same"]}, "at least 2 different classes"),
        ("training", {"task": "causal-lm"}, "labels must be empty for causal-lm"),
        ("training", {"task": "causal-lm", "labels": [], "max_tokens": 1}, "causal-lm needs at least 2"),
        (
            "training",
            {"target_pattern": "a{99999999999}"},
            "is not a regular expression: the repetition number",
        ),
        ("training", {"learning_rate": float("nan")}, "training.learning_rate = nan"),
        ("training", {"learning_rate": 0.0}, "training.learning_rate = 0.0: use more than 0"),
        ("training", {"target_modules": []}, "training.target_modules = []"),
        ("training", {"base_model": " "}, "training.base_model = ' ': use a character that can be seen"),
        ("training", {"labels": ["\t", "b"]}, "training.labels.0 = '\\t': use a character that can be seen"),
        ("training", {"zzz": 1}, "there is no such field; known are base_model"),
        (
            "protection",
            {"parameters": "insecure-toy"},
            "protection.parameters = 'insecure-toy': use one of large",
        ),
        (
            "protection",
            {"negotiation": "open"},
            "protection.negotiation = 'open': use 'sealed', 'ope' or 'ope-refined'",
        ),
        (
            "protection",
            {"max_vote_weight": 65},
            "protection.max_vote_weight = 65: use at most 64",
        ),
        (
            "protection",
            {"coverage_floor": 0.5},
            "set round.replan_every_rounds or round.replan_below_overlap",
        ),
        ("protection", {"tensor_bound": -1.0}, "protection.tensor_bound = -1.0"),
        ("protection", {"key_rotation_rounds": -1}, "protection.key_rotation_rounds = -1"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(tmp_path, section, fields, expected):
    content = {**MINIMAL, **merged(**{section: fields})}
    assert expected in refusal(tmp_path, content)


def test_every_wrong_field_has_its_own_line(tmp_path):
    message = refusal(tmp_path, {"name": "Not Valid", "training": {"labels": ["a", "b"]}})
    assert (
        "name = 'Not Valid': it has other characters or another length than allowed. Name and identifier, 1 to 64"
        in message
    )
    assert "training.base_model: this field has no default: add it" in message


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "name: [unclosed"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    assert "federation.yaml" in refusal(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DomainError, match=r"nowhere\.yaml cannot be read"):
        FederationSpec.from_yaml(tmp_path / "nowhere.yaml")


def test_a_wrong_message_is_refused_field_by_field():
    message = FederationSpec.model_validate(MINIMAL).to_proto()
    message.round.deadline_s = 0
    message.training.ClearField("base_model")
    with pytest.raises(DomainError) as refused:
        FederationSpec.from_proto(message)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    assert "round.deadline_s = 0" in refused.value.message
    assert "training.base_model: this field has no default: add it" in refused.value.message


def unlike_the_defaults() -> FederationSpec:
    """A federation none of whose fields has its default, so that a lost field shows."""
    return FederationSpec.model_validate(
        {
            "name": "reuters",
            "training": {
                "base_model": "all-MiniLM-L6-v2",
                "task": "causal-lm",
                "target_modules": ["dense"],
                "local_steps": 7,
                "batch_size": 7,
                "learning_rate": 0.5,
                "learning_rate_decay": 0.5,
                "max_rank": 7,
                "max_tokens": 7,
                "calibration_examples": 7,
                "evaluation_examples": 7,
                "evaluation_every": 7,
                "loss_on": "everything",
                "target_layers": [0, 7],
                "target_pattern": ".*",
                "modules_to_save": ["norm"],
                "local_epochs": 0.5,
                "learning_rate_schedule": "cosine",
                "warmup_steps": 7,
                "initial_seed": 9,
            },
            "round": {
                "rounds": 7,
                "clients": 9,
                "min_updates": 3,
                "deadline_s": 7,
                "target_updates": 7,
                "over_selection": 2.0,
                "grace": 0.0,
                "max_attempts": 7,
                "committee_s": 7,
                "replan_every_rounds": 7,
                "replan_below_overlap": 0.5,
                "stop": {"metric": "accuracy", "patience": 7, "threshold": 0.5},
            },
            "protection": {
                "mode": "none",
                "parameters": "large",
                "negotiation": "ope",
                "tensor_bound": 0.5,
                "max_directions": 7,
                "clear_bits": 16,
                "common_weight": 0.0,
                "coverage_floor": 0.25,
                "max_vote_weight": 2.0,
                "key_rotation_rounds": 7,
            },
            "screening": {"max_update_norm": 0.0, "max_norm_ratio": 0.0, "max_example_ratio": 0.0},
        }
    )


DEFAULTED = [
    (section, field)
    for section, fields in FederationSpec.model_validate(MINIMAL).model_dump().items()
    if section != "name"
    for field in fields
    if (section, field)
    not in {("training", "base_model"), ("training", "labels"), ("protection", "client_privacy")}
]
"""Every field that MINIMAL leaves out. Client privacy goes with one mode: test_client_privacy.py."""


def meant(section: str, field: str) -> object:
    """What a message without that field means."""
    default = getattr(getattr(FederationSpec.model_validate(MINIMAL), section), field)
    return ABSENT.get(section, {}).get(field, default)


def test_what_was_sent_is_what_arrives_zeros_too():
    spec = unlike_the_defaults()
    for section, field in DEFAULTED:
        assert getattr(getattr(spec, section), field) != meant(section, field)
    assert (
        FederationSpec.from_proto(pb.FederationSpec.FromString(spec.to_proto().SerializeToString())) == spec
    )


@pytest.mark.parametrize(("section", "field"), DEFAULTED)
def test_a_field_that_an_older_caller_does_not_send_has_its_default(section, field):
    sent = {**MINIMAL, "round": {"min_updates": 2}}
    message = FederationSpec.model_validate(sent).to_proto()
    getattr(message, section).ClearField(field)
    assert FederationSpec.from_proto(message) == FederationSpec.model_validate(
        {**sent, section: {**sent.get(section, {}), field: meant(section, field)}}
    )


@pytest.mark.parametrize("section", ["round", "protection", "screening"])
def test_a_section_that_an_older_caller_does_not_send_has_its_defaults(section):
    message = FederationSpec.model_validate(MINIMAL).to_proto()
    message.ClearField(section)
    assert FederationSpec.from_proto(message) == FederationSpec.model_validate(
        {**MINIMAL, section: dict(ABSENT.get(section, {}))}
    )


def test_a_caller_from_before_complete_was_the_default_gets_what_it_meant():
    """It sent no mode for `selective`, and for two clients nothing."""
    message = FederationSpec.model_validate(MINIMAL).to_proto()
    message.ClearField("round")
    message.ClearField("protection")
    spec = FederationSpec.from_proto(message)
    assert (spec.protection.mode, spec.round.clients, spec.round.min_updates) == ("selective", 2, 2)


def test_a_caller_of_today_leaves_no_field_to_be_guessed():
    message = FederationSpec.model_validate(MINIMAL).to_proto()
    for section, fields in ABSENT.items():
        assert all(getattr(message, section).HasField(field) for field in fields)
    assert message.protection.mode == "complete"


def test_two_clients_take_saying_so(tmp_path):
    """Of two, either can work out the other's update, in every mode: a federation of two is meant, or a mistake."""
    two = {**MINIMAL, "round": {"clients": 2, "min_updates": 2}}
    spec = FederationSpec.from_yaml(written(tmp_path, two))
    assert (spec.protection.mode, spec.round.min_updates) == ("complete", 2)


def test_a_round_asks_no_more_clients_than_its_mode_adds_up():
    many = {"clients": 20_000, "min_updates": 3}
    complete = FederationSpec.model_validate({**MINIMAL, "round": many})
    assert complete.cohort_limit == 16_384
    assert (
        complete.model_copy(
            update={"round": complete.round.model_copy(update={"target_updates": 10})}
        ).cohort_limit
        == 13
    )
    selective = {**MINIMAL, "round": {**many, "min_updates": 20_000}, "protection": {"mode": "selective"}}
    assert FederationSpec.model_validate(selective).cohort_limit == 0


@pytest.mark.parametrize("mode", ["complete", "none"])
def test_runs_may_start_alike_where_servers_may_know_the_initial_factors(mode):
    content = merged(training={"initial_seed": 7}) | {"name": "f", "protection": {"mode": mode}}
    assert FederationSpec.model_validate(content).training.initial_seed == 7


def test_the_initial_factors_of_selective_stay_secret(tmp_path):
    content = {
        **MINIMAL,
        **merged(training={"initial_seed": 7}),
        "protection": {"mode": "selective"},
    }
    assert "training.initial_seed tells servers the initial factors" in refusal(tmp_path, content)
    with pytest.raises(DomainError, match=r"which protection\.mode selective must keep"):
        FederationSpec.from_proto(
            pb.FederationSpec(
                name="f",
                training={"base_model": "m", "labels": ["a", "b"], "initial_seed": 7},
                protection={"mode": "selective"},
            )
        )


def test_every_field_of_a_specification_knows_whether_it_was_sent():
    """Else a zero and an absent field are the same on the wire; what has no default need not be told apart."""
    for section in ("training", "round", "protection", "screening"):
        message = pb.FederationSpec.DESCRIPTOR.fields_by_name[section].message_type
        silent = {f.name for f in message.fields if not (f.has_presence or f.is_repeated)}
        assert silent <= {"base_model"}, f"make these fields of {message.name} optional"


def test_a_specification_never_changes():
    spec = FederationSpec.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


@pytest.mark.parametrize(("name", "value"), [("max_norm_ratio", 1.5), ("max_example_ratio", 0.5)])
def test_a_ratio_that_drops_the_median_itself_is_refused(tmp_path, name, value):
    message = refusal(tmp_path, {**MINIMAL, "screening": {name: value}})
    assert f"screening.{name} must be 0 (off) or at least" in message
    assert FederationSpec.from_yaml(written(tmp_path, {**MINIMAL, "screening": {name: 0.0}}))


@pytest.mark.parametrize("field", ["base_model", "labels", "target_modules"])
def test_names_have_no_control_characters(field):
    spec = FederationSpec.model_validate(
        {"name": "f", "training": {"base_model": "b", "labels": ["x", "y"], "target_modules": ["q"]}}
    ).to_proto()
    hostile = "cold\x1b[2J"
    if field == "base_model":
        spec.training.base_model = hostile
    else:
        getattr(spec.training, field)[0] = hostile
    with pytest.raises(DomainError, match="control characters"):
        FederationSpec.from_proto(spec)


def test_a_rule_to_stop_has_defaults_on_the_wire_too():
    message = FederationSpec.model_validate({**MINIMAL, "round": {"stop": {}}}).to_proto()
    whole = FederationSpec.from_proto(message).round.stop
    for name in ("metric", "patience", "threshold"):
        sent = pb.FederationSpec.FromString(message.SerializeToString())
        sent.round.stop.ClearField(name)
        assert FederationSpec.from_proto(sent).round.stop == whole
    message.round.stop.patience = 0
    with pytest.raises(DomainError, match=r"round\.stop\.patience"):
        FederationSpec.from_proto(message)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("training", {"evaluation_examples": 0}, "evaluation_examples = 0 asks for none"),
        (
            "protection",
            {"client_privacy": {"epsilon": 8, "delta": 1e-5, "clip": 0.5}},
            "do not report under protection.client_privacy",
        ),
    ],
)
def test_a_rule_to_stop_without_evaluations_is_refused(tmp_path, section, fields, words):
    content = {**MINIMAL, "round": {"stop": {"patience": 2}}}
    content[section] = {**content.get(section, {}), **fields}
    assert words in refusal(tmp_path, content)
