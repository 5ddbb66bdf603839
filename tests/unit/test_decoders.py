"""No bytes from outside crash a decoder, make it allocate what was not sent, or are refused without a known reason."""

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS
from tests.fuzz.mutations import EXTREMES, damaged

ROOM_BYTES = 2**20
"""What a decoder may allocate whatever it is sent."""
FACTOR = 100
"""What it may allocate for each byte that it is sent."""
LENGTHS = (b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff\x07")

every = pytest.mark.parametrize("decoder", DECODERS.values(), ids=lambda decoder: decoder.name)
quick = settings(
    max_examples=10,
    derandomize=True,  # the same on every machine: `make fuzz` explores
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@every
def test_valid_messages_are_read(decoder):
    assert decoder.attempt(decoder.seeds()[0]) is None


@every
@quick
@given(data=st.data())
def test_damaged_messages_are_read_or_refused_by_name(decoder, data):
    decoder.attempt(data.draw(damaged(decoder.seeds())))


@every
@quick
@given(data=st.binary(max_size=300))
def test_random_bytes_are_read_or_refused_by_name(decoder, data):
    decoder.attempt(data)


@every
def test_what_parsers_stumble_over_is_read_or_refused_by_name(decoder):
    for extreme in (b"", *EXTREMES):
        decoder.attempt(extreme)


@pytest.mark.parametrize(
    "decoder", [d for d in DECODERS.values() if d.binary], ids=lambda decoder: decoder.name
)
def test_a_length_that_promises_too_much_allocates_nothing(decoder):
    seed = decoder.seeds()[0]
    decoder.attempt(seed)  # fills caches
    tracemalloc.start()
    try:
        for place in range(0, min(len(seed), 96), 4):
            for length in LENGTHS:
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                decoder.attempt(seed[:place] + length + seed[place + len(length) :])
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before <= ROOM_BYTES + FACTOR * len(seed)
    finally:
        tracemalloc.stop()
