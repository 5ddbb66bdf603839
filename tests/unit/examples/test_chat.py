"""The chat demo: who has which questions, what its files say, when it fails."""

import json

import pytest
import yaml

from client_agent.config import AgentConfig
from client_agent.conversations import read_conversations
from client_agent.samples import Completion, as_json
from examples.agents import Nowhere
from examples.chat import data
from examples.chat.demo import BEFORE, HERE, PROMPTS, WRITER, agent_config, require_best, show_samples
from shelora.errors import DomainError
from shelora.federation import FederationSpec


def corpus(folder):
    for name in {name for names in data.TOPICS.values() for name in names}:
        pairs = [[f"{name} {i}?", f"answer {i}"] for i in range(3 * data.HELD_OUT)]
        odd = [
            [f"{name} 0?", "another answer"],
            [f"{name} 0?", "answer 0"],
            ["three", "of", "them"],
            ["year?", 1963],
        ]
        content = {"categories": [name], "conversations": [*pairs, *odd]}
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content))
    return folder


def questions(path):
    found = read_conversations(path).conversations
    return [one.turns[0].content for one in found]


def test_agents_have_their_topics_and_no_question_is_trained_and_tested(tmp_path):
    counts = data.write_agents(corpus(tmp_path), tmp_path / "agents")
    trained = {}
    for agent, names in data.TOPICS.items():
        trained[agent] = questions(tmp_path / "agents" / agent / "train.jsonl")
        assert {question.split()[0] for question in trained[agent]} == set(names)
        assert len(trained[agent]) == counts[agent][0]
    tests = questions(tmp_path / "agents" / "test.jsonl")
    assert {question.split()[0] for question in tests} == {n for names in data.TOPICS.values() for n in names}
    shares = [q for agent in data.TOPICS for q in questions(tmp_path / "agents" / agent / "test.jsonl")]
    assert sorted(shares) == sorted(tests)
    assert not set(tests) & {question for own in trained.values() for question in own}


def test_pairs_are_read_once_and_what_is_no_pair_is_left_out(tmp_path):
    pairs = data.read_topic(corpus(tmp_path), ("coding",))
    assert len(pairs) == 3 * data.HELD_OUT + 1
    assert [pair.answer for pair in pairs if pair.question == "coding 0?"] == ["answer 0", "another answer"]


def test_the_files_of_the_chat_demo_are_valid(tmp_path):
    spec = FederationSpec.from_yaml(HERE / "federation.yaml")
    assert (spec.protection.mode, spec.training.task) == ("complete", "chat")
    assert spec.round.clients == len(data.TOPICS) == len(PROMPTS)
    path = tmp_path / "agent.yaml"
    for name in data.TOPICS:
        path.write_text(yaml.safe_dump(agent_config(Nowhere(), name=name, model=tmp_path)))
        config = AgentConfig.load(path, {})
        assert config.federation == spec.name
        assert config.samples.prompts == (PROMPTS if name == WRITER else ())


def test_the_chat_demo_fails_unless_the_federation_is_best():
    others = {BEFORE: 30.0, "workshop": 20.0, "quiz-club": 12.0}
    require_best(11.0, others)
    with pytest.raises(DomainError, match="is not below that of: quiz-club"):
        require_best(12.0, others)


def test_samples_before_and_after_are_set_side_by_side(tmp_path, capsys):
    for number, text in ((0, "Hello! How"), (2, "Canberra\nof course")):
        (tmp_path / f"round-{number:04}.json").write_bytes(as_json(number, [Completion("capital?", text)]))
    (pair,) = show_samples(tmp_path, 2)
    assert json.dumps(pair) == json.dumps(
        {"prompt": "capital?", "before": "Hello! How", "after": "Canberra\nof course"}
    )
    assert "Canberra of course" in capsys.readouterr().out
