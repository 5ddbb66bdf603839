"""A layout is stored field by field: agents compare its digest with their own."""

from dataclasses import fields, replace

import pytest

from coordinator.records import LayoutRecord
from shelora.lora.layout import Layout, Matrix, Shard, SumTerms, Tensor

LAYOUT = Layout(
    parameters="standard",
    key_id=bytes(range(16)),
    matrices=(Matrix("q", 8, 12, tier_columns=(2, 4)),),
    tensors=(Tensor("head", (3, 4), 2.0),),
    tiers=(0.25, 1.0),
    encrypt_tensors=True,
    max_rank=4,
    max_directions=16,
    shards=(Shard(matrices=(0,)), Shard(tensors=(0,))),
    sums=SumTerms(profile="standard", sketch_columns=6, sketch_rows=9),
    clear_bits=16,
)


def test_what_is_read_is_what_was_stored():
    """Regression: a record without `clear_bits` asked every agent of selective for more than was promised."""
    stored = LayoutRecord.of(LAYOUT).model_dump_json()
    assert LayoutRecord.model_validate_json(stored).layout() == LAYOUT


def test_an_older_layout_of_sums_has_no_figures():
    stored = LayoutRecord.of(LAYOUT).model_dump(mode="json")
    del stored["sums"]["figures"]
    assert LayoutRecord.model_validate(stored, strict=False).layout() == LAYOUT


@pytest.mark.parametrize("name", ["clear_bits", "sums"])
def test_older_records_lack_what_is_newer(name):
    usual = {f.name: f.default for f in fields(Layout)}[name]
    stored = LayoutRecord.of(LAYOUT).model_dump(mode="json", exclude={name})
    assert LayoutRecord.model_validate(stored, strict=False).layout() == replace(LAYOUT, **{name: usual})
