from pathlib import Path

import pytest
import yaml

import client_agent
from client_agent.config import AgentConfig
from shelora.errors import DomainError, Reason
from tests.identities import client

SAMPLE = Path(client_agent.__file__).parent / "sample.yaml"


def refusal(tmp_path: Path, **changes: object) -> str:
    values = yaml.safe_load(SAMPLE.read_text()) | changes
    path = tmp_path / "agent.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v != "REMOVED"}))
    with pytest.raises(DomainError) as caught:
        AgentConfig.load(path, {})
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    return caught.value.message


def test_the_sample_is_valid_and_its_paths_start_from_its_folder() -> None:
    config = AgentConfig.load(SAMPLE, {})
    assert config.lora.rank == 8
    assert config.lora.scaling == 2.0
    assert config.data.train == SAMPLE.parent / "data/train.jsonl"
    assert config.state_dir == SAMPLE.parent / "state"


def test_the_sample_shows_every_section() -> None:
    assert set(yaml.safe_load(SAMPLE.read_text())) == set(AgentConfig.model_fields)


def test_the_environment_overrides_single_values() -> None:
    environment = {
        "SHELORA_AGENT__LORA__RANK": "16",
        "SHELORA_AGENT__BUDGET": "0.25",
        "SHELORA_AGENT__AGGREGATION": '["127.0.0.1:9", "127.0.0.1:10"]',
        "OTHER": "x",
    }
    config = AgentConfig.load(SAMPLE, environment)
    assert (config.lora.rank, config.lora.alpha, config.budget) == (16, 16.0, 0.25)
    assert config.aggregation == ("127.0.0.1:9", "127.0.0.1:10")


def test_a_wrong_value_is_named_with_its_path_and_what_the_field_is(tmp_path: Path) -> None:
    message = refusal(tmp_path, budget=1.5, lora={"rank": 0})
    assert "budget = 1.5: use at most 1. Least share of the columns" in message
    assert "lora.rank = 0: use at least 1. Rank r" in message


def test_an_unknown_field_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    assert "lora.rnak = 4: there is no such field; did you mean lora.rank?" in refusal(
        tmp_path, lora={"rnak": 4}
    )
    assert "budgets = 1: there is no such field; did you mean budget?" in refusal(tmp_path, budgets=1)
    assert "zzz = 1: there is no such field; known are federation" in refusal(tmp_path, zzz=1)


def test_an_unknown_environment_variable_is_refused_too() -> None:
    with pytest.raises(DomainError, match=r"did you mean lora\.rank"):
        AgentConfig.load(SAMPLE, {"SHELORA_AGENT__LORA__RANKS": "16"})


def test_a_missing_field_is_named_with_what_it_is(tmp_path: Path) -> None:
    assert "client_id: this field has no default: add it. Name of this client" in refusal(
        tmp_path, client_id="REMOVED"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"coordinator": "nowhere"},
            "coordinator = 'nowhere': address 'nowhere' is not host:port: add the port",
        ),
        ({"aggregation": []}, "aggregation = []: "),
        ({"aggregation": ["x"]}, "aggregation.0 = 'x': address 'x'"),
        (
            {"data": {"train": "a.txt"}},
            "data.train = 'a.txt': the file name must end in one of .jsonl",
        ),
        ({"federation": "Has Spaces"}, "federation = 'Has Spaces': it has other characters"),
    ],
)
def test_values_of_no_use_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    assert said in refusal(tmp_path, **changes)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    for content, said in (("- 1", "must hold fields"), ("a: [", "not valid YAML")):
        (tmp_path / "agent.yaml").write_text(content)
        with pytest.raises(DomainError, match=said):
            AgentConfig.load(tmp_path / "agent.yaml", {})
    with pytest.raises(DomainError, match="cannot be read"):
        AgentConfig.load(tmp_path / "none.yaml", {})


def test_an_identity_that_others_can_read_is_refused(agent_folder: Path) -> None:
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    assert config.credentials().held.facts.identity == client("one", "films")
    config.identity.path.chmod(0o644)
    with pytest.raises(DomainError, match="chmod 600"):
        config.credentials()


def test_an_agent_that_has_not_enrolled_is_told_how(tmp_path: Path) -> None:
    config = AgentConfig.load(SAMPLE, {"SHELORA_AGENT__STATE_DIR": str(tmp_path)})
    with pytest.raises(DomainError, match="enrol first, with a token") as caught:
        config.credentials()
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize(("field", "value"), [("CLIENT_ID", "two"), ("FEDERATION", "songs")])
def test_the_identity_of_another_client_or_federation_is_refused(
    agent_folder: Path, field: str, value: str
) -> None:
    config = AgentConfig.load(agent_folder / "agent.yaml", {f"SHELORA_AGENT__{field}": value})
    with pytest.raises(DomainError, match="that of client one of federation films"):
        config.credentials()


def test_a_model_name_that_is_no_folder_is_left_for_the_hub(tmp_path: Path) -> None:
    assert AgentConfig.load(SAMPLE, {}).model.path == "models/all-MiniLM-L6-v2"


def test_a_model_in_a_folder_that_may_not_be_looked_into_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch
) -> None:
    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    environment = {"SHELORA_AGENT__MODEL__PATH": str(tmp_path / "home" / "model")}
    assert AgentConfig.load(SAMPLE, environment).model.path == str(tmp_path / "home" / "model")
