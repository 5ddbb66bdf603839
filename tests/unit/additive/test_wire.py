"""The wire format: one encoding, strict reading, sums that wrap, memory that does not grow."""

import ast
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import shelora.additive
from shelora.additive import (
    BALANCED,
    COMPACT,
    INSECURE_TOY,
    SMALL,
    STANDARD,
    Adder,
    ShardShape,
    validate_shard,
)
from shelora.additive.codec import PlaneSum, decode, encode, encoded_bytes
from shelora.additive.wire import HEADER_BYTES, sum_header, sum_planes, summand_header, summand_planes
from shelora.errors import DomainError, Reason

PROFILES = [STANDARD, BALANCED, COMPACT, SMALL, INSECURE_TOY]
SHAPE = ShardShape(INSECURE_TOY, 3, 100)
FOLDER = Path(shelora.additive.__file__).parent


def summand(shape, seed=0):
    return summand_header(shape) + np.random.default_rng(seed).bytes(shape.encoded_bytes - HEADER_BYTES)


def refusal(data, shape=SHAPE):
    adder = Adder(shape)
    reasons = set()
    for read in (adder.add, lambda d: validate_shard(d, shape)):
        with pytest.raises(DomainError) as error:
            read(data)
        reasons.add(error.value.reason)
    assert adder.contributors == 0
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize("parameters", PROFILES, ids=lambda p: p.name)
def test_coefficients_survive_encoding_and_every_string_is_an_encoding(parameters):
    count = 4 * parameters.degree
    values = np.random.default_rng(0).integers(0, 1 << parameters.kept_bits, count, dtype=np.uint32)
    data = encode(parameters, values)
    assert len(data) == encoded_bytes(parameters, count) == count * parameters.kept_bits // 8
    assert np.array_equal(decode(parameters, memoryview(data), count), values)
    noise = np.random.default_rng(1).bytes(len(data))
    assert encode(parameters, decode(parameters, memoryview(noise), count)) == noise


@pytest.mark.parametrize("parameters", PROFILES, ids=lambda p: p.name)
def test_sums_wrap_at_the_kept_bits(parameters):
    total = PlaneSum(parameters, 64)
    largest = np.full(64, (1 << parameters.kept_bits) - 1, dtype=np.uint32)
    data = memoryview(encode(parameters, largest))
    for _ in range(300):  # both accumulators overflow on the way
        total.add(data)
    total._low += np.uint32(2**32 - 2**20 * 16)
    assert (total.coefficients() == (-300 - 2**24) % (1 << parameters.kept_bits)).all()


@pytest.mark.parametrize("parameters", PROFILES, ids=lambda p: p.name)
def test_a_shard_costs_what_is_documented(parameters):
    shape = ShardShape(parameters, 0, parameters.degree * 10)
    assert shape.encoded_bytes - HEADER_BYTES == parameters.degree * 10 * parameters.kept_bits / 8
    assert ShardShape(parameters, 0, 1).coefficients == parameters.degree, (
        "garbage in less might pass the guard"
    )
    assert ShardShape(parameters, 0, 3 * parameters.degree + 1).coefficients == 3 * parameters.degree + 64


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"SLCT", Reason.CIPHERTEXT_MALFORMED),
        (4, b"\1\0", Reason.CIPHERTEXT_MALFORMED),
        (6, b"\2\0", Reason.CIPHERTEXT_MALFORMED),
        (8, bytes(32), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (40, b"\4\0\0\0", Reason.CIPHERTEXT_WRONG_SHAPE),
        (44, b"\xff\xff\xff\xff", Reason.CIPHERTEXT_WRONG_SHAPE),
        (48, b"\2\0\0\0", Reason.CIPHERTEXT_WRONG_SHAPE),
    ],
)
def test_every_field_of_the_header_is_compared(offset, content, reason):
    data = summand(SHAPE)
    assert refusal(data[:offset] + content + data[offset + len(content) :]) is reason


def test_a_shard_of_another_length_is_refused():
    data = summand(SHAPE)
    assert refusal(b"") is Reason.CIPHERTEXT_TRUNCATED
    assert refusal(data[:51]) is Reason.CIPHERTEXT_TRUNCATED
    assert refusal(data[:-1]) is Reason.CIPHERTEXT_TRUNCATED
    assert refusal(data + b"\0") is Reason.CIPHERTEXT_MALFORMED


def test_a_sum_is_no_summand_and_tells_its_contributors():
    adder = Adder(SHAPE)
    for seed in range(3):
        adder.add(summand(SHAPE, seed))
    total = adder.finish()
    assert refusal(total) is Reason.CIPHERTEXT_MALFORMED
    sum_planes(total, SHAPE, 3)
    for wrong in (2, 4):
        with pytest.raises(DomainError):
            sum_planes(total, SHAPE, wrong)
    with pytest.raises(DomainError):
        sum_header(SHAPE, 0)


def test_the_sum_of_one_is_not_given():
    adder = Adder(SHAPE)
    adder.add(summand(SHAPE))
    with pytest.raises(DomainError) as error:
        adder.finish()
    assert error.value.reason is Reason.TOO_FEW_CONTRIBUTORS


def test_a_refused_shard_leaves_the_sum_as_it_was():
    first, second = Adder(SHAPE), Adder(SHAPE)
    for adder in (first, second):
        adder.add(summand(SHAPE, 1))
    with pytest.raises(DomainError):
        first.add(summand(SHAPE)[:-1])
    for adder in (first, second):
        adder.add(memoryview(summand(SHAPE, 2)))
    assert first.finish() == second.finish()


@pytest.mark.parametrize(("shard", "values"), [(-1, 1), (2**24, 1), (0, 0), (0, 2**30 + 1)])
def test_shapes_out_of_range_are_refused(shard, values):
    with pytest.raises(DomainError):
        ShardShape(STANDARD, shard, values)


def test_memory_is_bounded_by_a_shard_whatever_the_number_of_clients():
    shape = ShardShape(STANDARD, 0, 1 << 19)
    data = summand(shape)
    tracemalloc.start()
    try:
        adder = Adder(shape)
        for _ in range(5):
            adder.add(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * shape.values


@pytest.mark.parametrize("source", ["adder.py", "codec.py", "parameters.py", "wire.py", "__init__.py"])
def test_who_adds_imports_nothing_that_opens(source):
    tree = ast.parse((FOLDER / source).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"shelora.additive.secret", "shelora.additive.ring", "shelora.additive.sampler"}


@pytest.mark.parametrize(
    "module", ["shelora.additive", "shelora.committee.certificate", "shelora.committee.verdict"]
)
def test_importing_what_servers_use_loads_no_secrets(module):
    check = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in "
        "('shelora.additive.secret', 'shelora.committee.sealing', 'shelora.committee.shamir', 'grpc')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], cwd=FOLDER.parent.parent, check=False).returncode == 0
    )


def test_a_summands_planes_are_a_view():
    data = summand(SHAPE)
    assert summand_planes(data, SHAPE).obj is data
