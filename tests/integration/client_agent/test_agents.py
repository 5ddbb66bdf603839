import asyncio
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from client_agent import memory
from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.doctor import CheckResult, examine
from client_agent.learner import Learner
from client_agent.memory import Memory
from client_agent.session import Session
from client_agent.state import Inbox, newest_adapter
from shelora.errors import DomainError, Reason
from shelora.negotiation import sealed
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.client_agent.tiny import bert_config, save_chat_model, save_model

Make = Callable[..., Any]


async def outcomes(*agents: Agent) -> list[Outcome]:
    return await asyncio.gather(*(agent.run() for agent in agents))


def product(home: Path, scaling: float) -> dict[str, np.ndarray]:
    weights = load_file(home / "state" / "adapter" / "adapter_model.safetensors")
    return {
        name: scaling * weights[name.replace("lora_A", "lora_B")] @ value
        for name, value in weights.items()
        if "lora_A" in name
    }


async def test_agents_of_different_ranks_and_budgets_finish_a_federation_and_agree(
    make_federation: Make,
) -> None:
    federation = make_federation("mixed", clients=3)
    await federation.start()
    agents = [
        await federation.agent("one", rank=2),
        await federation.agent("two", rank=8),
        await federation.agent("three", rank=8, budget=0.25),
    ]
    assert await outcomes(*agents) == [Outcome.FINISHED] * 3
    record = await federation.now()
    assert record.phase == pb.PHASE_FINISHED
    trained = [r for r in record.history if r.kind == pb.ROUND_KIND_TRAIN]
    assert [[e.example_count for e in r.evaluations] for r in trained] == [[5, 5, 5], [10, 10, 10]]
    assert sum(e.correct_count for e in trained[-1].evaluations) >= 27
    two, three = (product(federation.folder / name, 1.0) for name in ("two", "three"))
    for name, value in two.items():
        np.testing.assert_allclose(value, three[name], atol=1e-5)


async def test_agents_learn_to_answer_and_their_adapter_does(make_federation: Make, tmp_path: Path) -> None:
    federation = make_federation("chat")
    training = {"task": "chat", "labels": (), "target_modules": ("q_proj", "v_proj"), "max_tokens": 32}
    training["evaluation_every"] = 3
    told = federation.spec.training.model_copy(update=training)
    federation.spec = federation.spec.model_copy(update={"training": told})
    federation.model = save_chat_model(tmp_path / "model")
    await federation.start()
    records = [{"prompt": "the movie", "completion": "was good"}, {"prompt": "movie", "completion": "bad"}]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {"train": str(data), "test": str(data)}
    agents = [await federation.agent(name, data=files) for name in ("one", "two")]
    assert await outcomes(*agents) == [Outcome.FINISHED] * 2
    record = await federation.now()
    first, last = [r for r in record.history if r.kind == pb.ROUND_KIND_TRAIN]
    assert not first.evaluations, "its number is no multiple of 3"
    assert [(e.example_count, e.correct_count) for e in last.evaluations] == [(5, 5)] * 2
    adapter = federation.folder / "one" / "state" / "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(federation.model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the movie"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    told_back = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(told_back).split() == ["was", "good", "[END]"]


async def test_an_agent_stopped_after_training_uploads_without_training_again(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation("resumed", rounds=1)
    await federation.start()
    trained: list[int] = []
    real_train, real_commit = Learner._train, Session.commit
    first = await federation.agent("one")

    def counting_train(self: Learner, number: int, *others: Any) -> Any:
        trained.append(number)
        return real_train(self, number, *others)

    async def stopping_commit(self: Session, spool: Any, upload_s: float) -> int:
        if self._config.client_id == "one" and spool.note.rank > 1:
            first.stop()
            await asyncio.sleep(3600)
        return await real_commit(self, spool, upload_s)

    monkeypatch.setattr(Learner, "_train", counting_train)
    monkeypatch.setattr(Session, "commit", stopping_commit)
    other = asyncio.create_task((await federation.agent("two")).run())
    assert await first.run() is Outcome.STOPPED
    assert len(trained) >= 1
    monkeypatch.setattr(Session, "commit", real_commit)
    await federation.until(lambda f: f.current.kind == pb.ROUND_KIND_TRAIN and f.current.update_count == 1)
    before = len(trained)
    again = await federation.agent("one")
    assert await again.run() is Outcome.FINISHED
    assert await other is Outcome.FINISHED
    assert len(trained) == before == 2


async def test_an_agent_stopped_while_training_leaves_soon_and_can_come_back(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation("interrupted", rounds=1, local_steps=10)
    await federation.start()
    first = await federation.agent("one")
    real_train = Learner._train
    stopped: list[bool] = []

    def stopping_train(self: Learner, number: int, activity: Any, *others: Any) -> Any:
        if self._config.client_id == "one" and not stopped:
            first.stop()
            activity._stop.wait(60)
            stopped.append(True)
        return real_train(self, number, activity, *others)

    monkeypatch.setattr(Learner, "_train", stopping_train)
    other = asyncio.create_task((await federation.agent("two")).run())
    assert await first.run() is Outcome.STOPPED
    assert stopped == [True]
    assert await (await federation.agent("one")).run() is Outcome.FINISHED
    assert await other is Outcome.FINISHED


async def test_an_abandoned_round_is_taken_up_again_without_training_twice(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends at its deadline, because one agent's upload hangs; the second reuses what was trained."""
    federation = make_federation("again", rounds=1, deadline_s=6)
    await federation.start()
    trained: list[int] = []
    real_train, real_commit = Learner._train, Session.commit

    def counting_train(self: Learner, number: int, *others: Any) -> Any:
        trained.append(number)
        return real_train(self, number, *others)

    async def hanging_commit(self: Session, spool: Any, upload_s: float) -> int:
        record = await federation.now()
        if spool.note.rank > 1 and self._config.client_id == "one" and record.current.attempt == 1:
            await asyncio.sleep(3600)
        return await real_commit(self, spool, upload_s)

    monkeypatch.setattr(Learner, "_train", counting_train)
    monkeypatch.setattr(Session, "commit", hanging_commit)
    assert (
        await outcomes(await federation.agent("one"), await federation.agent("two")) == [Outcome.FINISHED] * 2
    )
    attempts = [
        (r.attempt, r.state) for r in (await federation.now()).history if r.kind == pb.ROUND_KIND_TRAIN
    ]
    assert attempts[0] == (1, pb.ROUND_STATE_ABANDONED)
    assert attempts[-1][1] == pb.ROUND_STATE_PUBLISHED
    assert trained == [1, 1]


async def test_a_plan_that_the_votes_do_not_bear_out_is_rejected_and_another_leader_named(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation("crooked", rounds=1)
    await federation.start()
    real_make_plan = sealed.make_plan
    made: list[int] = []

    def crooked_first(scores: Any, matrices: Any, tiers: Any) -> Any:
        made.append(1)
        if len(made) == 1:
            scores = {name: -value for name, value in scores.items()}
        return real_make_plan(scores, matrices, tiers)

    monkeypatch.setattr(sealed, "make_plan", crooked_first)
    agents = [await federation.agent("one", budget=0.5), await federation.agent("two", budget=0.5)]
    assert await outcomes(*agents) == [Outcome.FINISHED] * 2
    assert len(made) == 2


async def test_without_protection_no_key_is_fetched(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_args: Any) -> None:
        raise AssertionError("a key was fetched")

    monkeypatch.setattr(Session, "secrets", refused)
    federation = make_federation("open", mode="none", rounds=1)
    await federation.start()
    written = {"protection": {"accept": ["none"]}}
    agents = [await federation.agent(name, **written) for name in ("one", "two")]
    assert await outcomes(*agents) == [Outcome.FINISHED] * 2
    ended = await federation.now()
    assert [summary.kind for summary in ended.history] == [pb.ROUND_KIND_TRAIN], "nobody votes"
    assert ended.epoch == 0, "the key authority opened no epoch"


async def test_an_agent_waits_for_a_federation_that_does_not_exist_yet(make_federation: Make) -> None:
    federation = make_federation("late", rounds=1)
    running = asyncio.create_task(outcomes(await federation.agent("one"), await federation.agent("two")))
    await asyncio.sleep(0)
    await federation.start()
    assert await running == [Outcome.FINISHED] * 2


async def test_an_agent_restarted_after_the_end_still_gets_the_adapter(make_federation: Make) -> None:
    federation = make_federation("over", rounds=1)
    await federation.start()
    await outcomes(await federation.agent("one"), await federation.agent("two"))
    adapter = federation.folder / "one" / "state" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    for file in adapter.parent.iterdir():
        file.unlink()
    assert await (await federation.agent("one")).run() is Outcome.FINISHED
    assert adapter.read_bytes() == before


async def test_an_agent_with_another_model_than_most_is_refused_by_name_though_it_came_first(
    make_federation: Make, tmp_path: Path
) -> None:
    federation = make_federation("strict", rounds=4)  # long enough for the odd one to hear of it
    await federation.start()
    model = {"path": str(_larger_model(tmp_path / "larger")), "device": "cpu"}
    other = asyncio.create_task((await federation.agent("other", model=model)).run())
    await federation.until(lambda f: len(f.members) == 1)
    assert (
        await outcomes(await federation.agent("one"), await federation.agent("two")) == [Outcome.FINISHED] * 2
    )
    with pytest.raises(DomainError, match=r"matrix .* is not in the federation's model") as caught:
        await other
    assert caught.value.reason is Reason.MODEL_MISMATCH


async def test_who_ends_before_it_joins_is_shown_with_its_reason_until_it_joins(
    make_federation: Make,
) -> None:
    federation = make_federation("early", rounds=1)
    await federation.start()
    agent = await federation.agent("one")
    data = federation.folder / "one" / "train.jsonl"
    rows = data.read_text()
    data.write_text('{"text": "the movie was odd", "label": "unheard of"}\n')
    with pytest.raises(DomainError) as caught:
        await agent.run()
    assert caught.value.reason is Reason.DATA_INVALID
    (applicant,) = (await federation.now()).applicants
    assert (applicant.client_id, applicant.reason) == ("one", Reason.DATA_INVALID)
    assert "unheard of" in caught.value.message, "its owner reads the label"
    assert applicant.why == "the agent's own log says what is wrong and where"
    data.write_text(rows)
    assert (
        await outcomes(await federation.agent("one"), await federation.agent("two")) == [Outcome.FINISHED] * 2
    )
    assert not (await federation.now()).applicants


async def test_of_two_copies_of_an_identity_the_one_that_came_last_takes_part(
    make_federation: Make, tmp_path: Path
) -> None:
    federation = make_federation("twins", rounds=1)
    await federation.start()
    first = await federation.agent("one")
    running = asyncio.create_task(first.run())
    await federation.until(lambda f: len(f.members) == 1)
    copied = tmp_path / "copy"
    shutil.copytree(federation.folder / "one" / "state", copied, ignore=shutil.ignore_patterns("lock"))
    second = asyncio.create_task((await federation.agent("one", state_dir=str(copied))).run())
    with pytest.raises(DomainError, match="another process with the identity of one") as caught:
        await running
    assert caught.value.reason is Reason.CLIENT_REPLACED
    (member,) = (await federation.now()).members
    assert member.copy_refused_unix_ms > 0, "the operator sees it"
    assert await (await federation.agent("two")).run() is Outcome.FINISHED
    assert await second is Outcome.FINISHED


async def test_adapters_are_kept_after_every_round_and_a_stopped_federation_has_one(
    make_federation: Make,
) -> None:
    federation = make_federation("halfway", rounds=9, local_steps=2)
    await federation.start()
    running = asyncio.create_task(outcomes(await federation.agent("one"), await federation.agent("two")))
    state = federation.folder / "one" / "state"
    await federation.until(lambda f: f.trained_rounds >= 2 and (state / "adapter").is_dir())
    await federation.coordinator.StopFederation(pb.StopFederationRequest(federation_id="halfway"))
    assert await running == [Outcome.FINISHED] * 2
    shown = await federation.now()
    assert (shown.phase, shown.stopped) == (pb.PHASE_FINISHED, True)
    assert {m.stage for m in shown.members} == {"finished"}
    for name in ("adapter", "adapter-best"):
        assert (state / name / "adapter_model.safetensors").is_file()
        assert newest_adapter(state, best=name == "adapter-best") == state / name
    trained = shown.trained_rounds
    request = pb.ExtendFederationRequest(federation_id="halfway", rounds=trained + 1)
    await federation.coordinator.ExtendFederation(request)
    again = [await federation.agent("one"), await federation.agent("two")]
    assert await outcomes(*again) == [Outcome.FINISHED] * 2, "they go on from where they were"
    assert (await federation.now()).trained_rounds == trained + 1


async def test_an_agent_with_other_weights_is_told_and_ends_and_comes_back_with_the_right_ones(
    make_federation: Make, tmp_path: Path
) -> None:
    """Shapes and names are the same; before, all three finished, and the adapter was of no use to any."""
    federation = make_federation("weights", clients=3, rounds=2, deadline_s=600)
    await federation.start()
    torch.manual_seed(2)
    other = save_model(BertModel(bert_config()), tmp_path / "other")
    wrong = await federation.agent("three", model={"path": str(other), "device": "cpu"})
    honest = [asyncio.create_task((await federation.agent(name)).run()) for name in ("one", "two")]
    with pytest.raises(DomainError, match="has other weights than those of most agents") as caught:
        await wrong.run()
    assert caught.value.reason is Reason.MODEL_MISMATCH
    assert await (await federation.agent("three")).run() is Outcome.FINISHED
    assert await asyncio.gather(*honest) == [Outcome.FINISHED] * 2
    left_out = [
        (d.client_id, d.reason) for round_ in (await federation.now()).history for d in round_.dropped
    ]
    assert left_out == [("three", "MODEL_MISMATCH")]


async def test_a_client_of_another_federation_is_refused_at_once(make_federation: Make) -> None:
    federation = make_federation("locked", rounds=1)
    await federation.start()
    agent = await federation.agent("one")
    home = federation.folder / "one"
    await federation.cluster.enrol_client("elsewhere", "one", home / "state")
    with pytest.raises(DomainError, match="that of client one of federation elsewhere") as caught:
        await agent.run()
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


def _larger_model(folder: Path) -> Path:
    config = bert_config()
    config.num_hidden_layers = 3
    folder.mkdir()
    return save_model(BertModel(config), folder)


async def test_a_process_told_to_terminate_ends_in_order(make_federation: Make) -> None:
    federation = make_federation("signalled")
    await federation.start()
    await federation.agent("one")
    config = federation.folder / "one" / "agent.yaml"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "client_agent.main",
        "run",
        "--config",
        str(config),
        stderr=asyncio.subprocess.PIPE,
    )
    await federation.until(lambda f: len(f.members) == 1)
    assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0), "its keys would lie in a dump"
    process.terminate()
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    assert b"outcome=stopped" in log


async def test_the_doctor_finds_nothing_to_mend_on_a_device_that_can_take_part(make_federation: Make) -> None:
    federation = make_federation("examined")
    await federation.start()
    await federation.agent("one")
    config = AgentConfig.load(federation.folder / "one" / "agent.yaml", {})
    findings = await examine(config, lambda _: None)
    assert {finding.verdict for finding in findings} == {CheckResult.OK}, findings
    assert {"clock", "network: coordinator", "memory", "disk", "training"} <= {f.check for f in findings}


async def test_the_doctor_names_the_server_that_does_not_answer(make_federation: Make) -> None:
    federation = make_federation("cut-off")
    await federation.start()
    await federation.agent("one", aggregation=["127.0.0.1:1"])
    config = AgentConfig.load(federation.folder / "one" / "agent.yaml", {})
    findings = {finding.check: finding for finding in await examine(config, lambda _: None)}
    assert findings["network: aggregation"].verdict is CheckResult.FAILED
    assert "127.0.0.1:1" in findings["network: aggregation"].remedy
    assert findings["network: coordinator"].verdict is CheckResult.OK


async def test_agents_that_lack_memory_or_disk_say_so_wait_and_finish_the_federation(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One downloads onto /dev/full, where writes fail with ENOSPC; the other is told that nothing is free. Memory is
    short when the first one joins, and when one of them votes."""
    federation = make_federation("full", rounds=1)
    await federation.start()
    one, two = await federation.agent("one"), await federation.agent("two")
    where, usage, failures = Inbox.partial, shutil.disk_usage, {"one": 2, "two": 2}

    def fails(path: Path, name: str) -> bool:
        failures[name] -= path.is_relative_to(federation.folder / name)
        return path.is_relative_to(federation.folder / name) and failures[name] >= 0

    def partial(self: Inbox, index: int) -> Path:
        path = where(self, index)
        path.unlink() if path.is_symlink() else None
        if fails(path, "one"):
            path.symlink_to("/dev/full")
        return path

    def disk_usage(folder: Path) -> Any:
        found = usage(folder)
        return found._replace(free=0) if fails(folder, "two") else found

    short_of_memory = iter([True, False, False, True])

    def memory_here() -> Memory:
        return Memory(10**9, 0 if next(short_of_memory, False) else 10**9)

    monkeypatch.setattr(memory, "memory_here", memory_here)
    monkeypatch.setattr(Inbox, "partial", partial)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with structlog.testing.capture_logs() as logs:
        assert await outcomes(one, two) == [Outcome.FINISHED] * 2
    short = [log["event"] for log in logs if log.get("reason") is Reason.MEMORY_UNAVAILABLE]
    assert short == ["join_failed", "assignment_failed"]
    why = {record["why"] for record in logs if record.get("reason") is Reason.DISK_UNAVAILABLE}
    assert any("No space left on device; make room" in each for each in why)
    assert any("0.0 MB are free" in each for each in why)
