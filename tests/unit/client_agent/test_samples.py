"""What a language model writes after each round."""

import json
from types import SimpleNamespace

import pytest
import torch

from client_agent.config import AgentConfig, SampleSettings
from client_agent.encoding import Encoder
from client_agent.learner import Learner
from client_agent.preparation import prepare
from client_agent.progress import Activity, Stopped
from client_agent.samples import Sampler, continued
from client_agent.state import AgentState
from client_agent.tasks.chat import ChatEncoder
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import chat_tokenizer, decoder

PROMPTS = SampleSettings(prompts=("the movie was", "good movie"), max_new_tokens=6)
SECRETS = SimpleNamespace(key_id=bytes(16), obfuscation=Obfuscation(bytes(range(32)), 1))
SPEC = TrainingSpec(
    base_model="tiny", task="causal-lm", target_modules=("q_proj", "v_proj"), local_steps=3, batch_size=4
)


def silent(_: float) -> None:
    pass


def sampler(model, settings=PROMPTS):
    return Sampler(settings, model, Encoder(model.tokenizer, 32, append_end=True))


def test_samples_are_the_likeliest_tokens_of_the_present_model(llama_folder, obfuscation):
    model = decoder(llama_folder)
    model.initialise(obfuscation)
    ids = Encoder(model.tokenizer, 32, append_end=True).prompt("the movie was")
    assert ids == [2, 14, 15, 16], "no special token ends what the model goes on from"
    expected = list(ids)
    for _ in range(6):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
        if expected[-1] == model.tokenizer.eos_token_id:
            break
    assert continued(model, ids, 6, lambda: None) == expected[len(ids) :]
    first, second = sampler(model).write(silent)
    assert (first.prompt, second.prompt) == PROMPTS.prompts
    assert first.text == model.tokenizer.decode(expected[len(ids) :], skip_special_tokens=True).strip()


def test_writing_ends_between_two_tokens_when_it_is_no_longer_wanted(llama_folder):
    told = []

    def stop(done: float) -> None:
        told.append(done)
        if len(told) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        sampler(decoder(llama_folder)).write(stop)
    assert told == [0.0, 0.0, 0.0]


def test_a_prompt_of_a_chat_ends_where_the_answer_begins():
    tokenizer = chat_tokenizer()
    ids = ChatEncoder(tokenizer, 32, everything=False).prompt("the movie was")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "[BOS]",
        "user",
        ":",
        "the",
        "movie",
        "was",
        "[END]",
        "assistant",
        ":",
    ]


def test_what_a_chat_template_refuses_is_a_prompt_refused():
    tokenizer = chat_tokenizer("{{ raise_exception('no questions') }}")
    with pytest.raises(DomainError, match="samples: the chat template refuses") as refusal:
        ChatEncoder(tokenizer, 32, everything=False).prompt("good")
    assert refusal.value.reason is Reason.CONFIGURATION_INVALID


def test_a_prompt_that_leaves_no_room_is_refused(llama_folder):
    with pytest.raises(DomainError, match=r"has 4 tokens, and with max_new_tokens = 61 .* the 64 that"):
        sampler(decoder(llama_folder), PROMPTS.model_copy(update={"max_new_tokens": 61}))


def test_samples_of_a_classifier_are_refused_before_it_joins(agent_folder):
    with (agent_folder / "agent.yaml").open("a") as file:
        file.write("samples: {prompts: [good]}\n")
    spec = TrainingSpec(base_model="tiny", labels=("bad", "good"))
    with pytest.raises(DomainError, match="sequence-classification write no text: remove samples") as refusal:
        prepare(AgentConfig.load(agent_folder / "agent.yaml", {}), spec)
    assert refusal.value.reason is Reason.CONFIGURATION_INVALID


@pytest.fixture
def learner(agent_folder, llama_folder):
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    model = config.model.model_copy(update={"path": str(llama_folder)})
    config = config.model_copy(update={"model": model, "samples": PROMPTS})
    state = AgentState(config.state_dir)
    yield Learner(config, SPEC, state)
    state.close()


def test_a_file_a_round_holds_what_was_written(learner, agent_folder):
    folder = agent_folder / "state" / "samples"
    learner.start(SECRETS)
    learner.write_samples(0, Activity())
    written = json.loads((folder / "round-0000.json").read_text())
    assert written["round"] == 0
    assert [one["prompt"] for one in written["samples"]] == list(PROMPTS.prompts)
    learner.write_samples(9, Activity())
    assert not (folder / "round-0009.json").exists(), "the same state writes the same"
    learner._current.round_id = "another"
    learner.write_samples(1, Activity())
    again = json.loads((folder / "round-0001.json").read_text())
    assert again == {"round": 1, "samples": written["samples"]}


def test_a_model_that_cannot_write_trains_all_the_same(learner, agent_folder, monkeypatch):
    def broken(self, report):
        raise RuntimeError("no kernel")

    learner.start(SECRETS)
    monkeypatch.setattr(Sampler, "write", broken)
    learner.write_samples(0, Activity())
    assert not (agent_folder / "state" / "samples").exists()
