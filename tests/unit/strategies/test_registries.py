"""What varies is found by name in a registry, and nowhere told apart otherwise."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from shelora.errors import DomainError, Reason
from shelora.lora import kinds
from shelora.lora.layout import Matrix, Shard, build_layout
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.strategies.agents.registry import agent_strategy_of
from shelora.strategies.registry import strategies, strategy_of

ROOT = Path(__file__).resolve().parents[3]
SWITCH = re.compile(
    r"""(\.mode|\bnegotiation|\.kind)\s*(==|!=|in|not\ in)\s*[\[({]?["']"""
    r"""|case\s+["'](selective|none|complete|ope|sealed)["']"""
)


def test_no_code_switches_on_a_strategy_a_negotiation_or_a_kind_by_name():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in ("shelora", "coordinator", "client_agent", "services")
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if SWITCH.search(line)
    ]
    assert not found


@pytest.mark.parametrize("line", ['if spec.mode == "none":', 'negotiation in {"ope"}', 'case "ope":'])
def test_the_search_finds_what_it_looks_for(line):
    assert SWITCH.search(line)


def test_every_strategy_has_both_halves():
    ours = [name for name in strategies() if type(strategy_of(name)).__module__.startswith("shelora.")]
    assert [agent_strategy_of(name).name for name in ours] == ours
    assert ours == ["complete", "selective", "none"], "the default first, as the dashboard's form shows them"


def test_an_unknown_strategy_is_refused_with_those_there_are():
    for look_up in (strategy_of, agent_strategy_of):
        with pytest.raises(DomainError, match="use 'complete' or 'selective' or 'none'") as refused:
            look_up("homomorphic")
        assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_two_strategies_or_kinds_cannot_share_a_name():
    class Other:
        name = "products"

    with pytest.raises(ValueError, match="products already"):
        kinds.register(Other())


def layout():
    return build_layout(
        parameters="standard",
        key_id=b"",
        matrices=[Matrix("a", 4, 6)],
        tensors=[],
        tiers=(),
        encrypt_tensors=False,
        max_rank=2,
        max_directions=4,
    )


@pytest.mark.parametrize(
    ("kind", "said"), [("tuples", "of kind 'tuples'; known are"), ("whole", "holds tensors")]
)
def test_a_layout_with_a_shard_of_another_kind_is_refused_where_it_arrives(kind, said):
    message = layout_to_proto(layout())
    assert message.shards[0].kind == ""
    message.shards[0].kind = kind
    with pytest.raises(DomainError, match=said) as refused:
        layout_from_proto(message)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_kind_that_is_not_the_usual_one_changes_the_digest():
    named = layout()
    other = replace(named, shards=(Shard((0,), kind="other"),))
    assert other.digest != named.digest
    assert replace(named, shards=(Shard((0,), kind="products"),)).digest == named.digest
