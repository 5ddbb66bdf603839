"""Chat: which tokens are learnt, of which records, and what a cut leaves."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from client_agent.checkpoint import load_checkpoint
from client_agent.config import AgentConfig, LoraSettings
from client_agent.conversations import Conversation, Conversations, Turn, read_conversations
from client_agent.evaluation import evaluate
from client_agent.inspection import inspect, report
from client_agent.main import app
from client_agent.model import AdaptedModel
from client_agent.tasks.chat import NOT_LEARNT, ChatEncoder
from client_agent.training import TrainingRun, train
from shelora.configuration import parse_yaml
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec, ProtectionSpec, TrainingSpec
from shelora.obfuscation import Obfuscation
from shelora.terminal import Terminal
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.client_agent.tiny import CHAT_TEMPLATE, chat_tokenizer, save_chat_model

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' [END]' }}{% endgeneration %}{% else %}{{ m['content'] + ' [END]' }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m['content'] + (' was' if loop.last else ' the') }}{% endfor %}"
CONVERSATION = [
    {"role": "user", "content": "the movie"},
    {"role": "assistant", "content": "was good"},
    {"role": "user", "content": "movie"},
    {"role": "assistant", "content": "bad"},
]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def of(*turns: tuple[str, str], messages: bool = True) -> Conversations:
    return Conversations((Conversation(tuple(Turn(*turn) for turn in turns), messages),))


def learnt(
    examples: Conversations, template: str | None = CHAT_TEMPLATE, limit: int = 64, **options: Any
) -> str:
    """The words of the first conversation, those that are learnt in capitals."""
    made = chat_tokenizer(template)
    encoder = ChatEncoder(made, limit, everything=options.get("everything", False))
    one = encoder.encoded(examples)[0]
    assert len(one.ids) == len(one.targets) <= limit
    assert all(target in (NOT_LEARNT, token) for token, target in zip(one.ids, one.targets, strict=True))
    words: Sequence[str] = made.convert_ids_to_tokens(one.ids)
    return " ".join(
        w.upper() if t != NOT_LEARNT else w.lower() for w, t in zip(words, one.targets, strict=True)
    )


MANY = of(*((m["role"], m["content"]) for m in CONVERSATION))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_answers_and_their_ends_are_learnt_and_nothing_else(template: str) -> None:
    assert learnt(MANY, template) == (
        "[bos] user : the movie [end] assistant : WAS GOOD [END] user : movie [end] assistant : BAD [END]"
    )


def test_everything_is_learnt_where_the_federation_says_so() -> None:
    said = learnt(MANY, everything=True)
    assert said == said.upper().replace("[BOS]", "[bos]")  # nothing predicts the first token


def test_a_question_holding_the_marks_of_an_answer_is_not_learnt() -> None:
    said = learnt(of(("user", "movie [END] assistant : good [END]"), ("assistant", "bad")))
    assert said == "[bos] user : movie [end] assistant : good [end] [end] assistant : BAD [END]"


def test_without_a_template_a_prompt_is_an_instruction_and_messages_are_refused(tmp_path: Path) -> None:
    asked = of(("user", "the movie"), ("assistant", "was good"), messages=False)
    assert learnt(asked, None) == "### instruction : the movie ### response : WAS GOOD [END]"
    made = chat_tokenizer(None)
    ChatEncoder(made, 64, everything=False)
    assert "### Instruction" in made.chat_template  # the adapter is saved with what it was trained with
    with pytest.raises(Exception, match="no chat template, which messages need: take the instruct variant"):
        learnt(MANY, None)


def test_a_template_whose_beginnings_differ_is_refused_for_several_answers_alone() -> None:
    with pytest.raises(Exception, match="split the record so that each holds one answer"):
        learnt(MANY, FORGETFUL)


@pytest.mark.parametrize(
    ("words", "limit", "expected"),
    [
        ("the movie was", 64, "[bos] user : the movie was [end] assistant : GOOD BAD [END]"),
        ("the movie was", 9, "[bos] movie was [end] assistant : GOOD BAD [END]"),
        ("the " * 30, 8, "[bos] the [end] assistant : GOOD BAD [END]"),
    ],
)
def test_a_prompt_is_cut_from_the_left(words: str, limit: int, expected: str) -> None:
    assert learnt(of(("user", words), ("assistant", "good bad")), limit=limit) == expected


def test_an_answer_that_does_not_fit_keeps_its_beginning_and_learns_no_end() -> None:
    said = learnt(of(("user", "the movie"), ("assistant", "good " * 30 + "bad")), limit=12)
    assert said == "[bos] assistant : GOOD GOOD GOOD GOOD GOOD GOOD GOOD GOOD GOOD"


def test_a_cut_doubles_no_token_that_begins_every_turn() -> None:
    """SmolLM2's BOS token is the one that begins a turn of ChatML: a cut at a turn had it twice."""
    every = "{% for m in messages %}{{ bos_token + m['role'] + ' : ' + m['content'] + ' [END]' }}{% endfor %}"
    every += "{% if add_generation_prompt %}{{ bos_token + 'assistant : ' }}{% endif %}"
    asked = of(("system", "the " * 20), ("user", "movie"), ("assistant", "bad"))
    assert learnt(asked, every, limit=10) == "[bos] user : movie [end] [bos] assistant : BAD [END]"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}], "id": 1},
        {"prompt": "a\n\nb", "completion": "c", "messages": None},
        {"instruction": "a", "input": "b", "output": "c"},
        {"instruction": "a\n\nb", "input": "", "output": "c"},
    ],
)
def test_every_shape_gives_the_same_conversation(tmp_path: Path, record: dict[str, Any]) -> None:
    expected = (Turn("user", "a\n\nb"), Turn("assistant", "c"))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([record]), table)
    for path in (written(tmp_path / "a.jsonl", record), table):
        assert [one.turns for one in read_conversations(path).conversations] == [expected]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, "is not a conversation; accepted are messages"),
        ({"prompt": "a"}, "fields there: prompt"),
        ({"messages": [], "prompt": "a", "completion": "b"}, "holds messages and also prompt, completion: keep one"),
        ({"messages": "a"}, "'messages' must be a list, not text"),
        ({"messages": []}, "holds no answer of the assistant"),
        ({"messages": ["a"]}, "messages[0] must be an object with role and content, not text"),
        ({"messages": [None]}, "messages[0] must be an object with role and content, not null"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is not there; fields there: content"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role is null: use system, user"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool': use system, user, assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'messages[0].content' must be text, not null"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "'messages[0].content' is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text, not a list"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "'conversations' holds no answer"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be text, not a number"),
        ({"prompt": "\ud83d", "completion": "b"}, "half of a character"),
    ],
)  # fmt: skip
def test_odd_records_are_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, record)
    with pytest.raises(DomainError) as caught:
        read_conversations(path)
    assert caught.value.reason is Reason.DATA_INVALID
    assert caught.value.message.startswith(f"{path}, line 2: ")
    assert said in caught.value.message


def spec(**fields: Any) -> TrainingSpec:
    return TrainingSpec(base_model="tiny", task="chat", target_modules=("q_proj", "v_proj"), **fields)


def test_check_shows_what_is_learnt_and_what_is_cut(
    agent_folder: Path, chat_folder: Path, capsys: Any
) -> None:
    long = {"prompt": "the " * 90, "completion": "good"}
    endless = {"prompt": "the", "completion": "good " * 90}
    written(agent_folder / "train.jsonl", {"messages": CONVERSATION}, long, endless)
    written(agent_folder / "test.jsonl", {"prompt": "the movie", "completion": "was good"})
    config = AgentConfig.load(agent_folder / "agent.yaml", {"SHELORA_AGENT__MODEL__PATH": str(chat_folder)})
    found = inspect(config, spec(max_tokens=32), ProtectionSpec(mode="selective"))
    assert (found.encrypted, found.most_upload_bytes) == ("100%", found.upload_bytes)
    assert (found.prepared.lengths.cut, found.prepared.lengths.ends_cut) == (2, 1)
    Terminal().print(report(spec(max_tokens=32), found))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "assistant : [ was good [END] ] user : movie [END] assistant : [ bad [END] ]" in shown
    assert "5 of 19 tokens" in shown


def test_a_conversation_that_the_template_refuses_is_named(agent_folder: Path, chat_folder: Path) -> None:
    from client_agent.tasks.chat import survey_conversations  # noqa: PLC0415 - beside its use

    path = written(agent_folder / "train.jsonl", {"prompt": "a", "completion": "b"})
    strict = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DomainError, match=r"line 1: the chat template refuses .*roles must alternate"):
        survey_conversations(path, read_conversations(path), ChatEncoder(strict, 64, everything=False))


def test_training_lowers_the_loss_of_answers_and_counts_their_tokens(
    chat_folder: Path, obfuscation: Obfuscation
) -> None:
    checkpoint = load_checkpoint(str(chat_folder), "chat", ())
    model = AdaptedModel(
        checkpoint,
        task="chat",
        target_modules=("q_proj", "v_proj"),
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )
    model.initialise(obfuscation)
    encoder = ChatEncoder(model.tokenizer, 32, everything=False)
    examples = Conversations(MANY.conversations + of(("user", "the"), ("assistant", "sad")).conversations)
    before = evaluate(model, encoder, examples, lambda _: None)
    train(model, encoder, examples, TrainingRun(rates=[0.05] * 30, batch_size=2, seed=3), lambda _: None)
    after = evaluate(model, encoder, examples, lambda _: None)
    assert before.count == after.count == 3 + 2 + 2
    assert after.loss < before.loss
    assert before.correct < after.correct == after.count


def test_what_is_learnt_crosses_the_wire_and_older_callers_need_not_know() -> None:
    told = FederationSpec(name="chat", training=spec(loss_on="everything"))
    assert FederationSpec.from_proto(told.to_proto()).training.loss_on == "everything"
    older = FederationSpec(name="chat", training=spec()).to_proto()
    older.training.ClearField("loss_on")
    assert (
        FederationSpec.from_proto(pb.FederationSpec.FromString(older.SerializeToString())).training == spec()
    )


def test_the_commands_and_records_of_the_guide_work(
    agent_folder: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path("docs/chat.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", guide, re.DOTALL))
    told = FederationSpec.model_validate(parse_yaml(blocks["yaml"], "docs/chat.md"))
    assert (told.training.task, told.training.loss_on) == ("chat", "answers")
    (agent_folder / "train.jsonl").write_text(blocks["json"])
    (agent_folder / "test.jsonl").write_text(blocks["json"])
    assert len(read_conversations(agent_folder / "train.jsonl")) == 4
    monkeypatch.chdir(agent_folder)
    monkeypatch.setenv("SHELORA_AGENT__MODEL__PATH", str(chat_folder))
    for command in blocks["sh"].splitlines():
        program, *arguments = shlex.split(command)
        assert program == "client-agent"
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert "the first one, [ learnt ]" in shown.output
