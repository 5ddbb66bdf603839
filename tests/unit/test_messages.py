import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.wire import HEADER_BYTES
from shelora.errors import DomainError, Reason
from shelora.lora.codec import (
    decode_result,
    decode_update,
    encode_result,
    encode_update,
    parse_update,
    validate_update,
)
from shelora.lora.layout import Matrix, Shard, Tensor
from shelora.lora.protect import protect
from shelora.lora.shards import MatrixPart
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.v1 import common_pb2 as pb
from tests.unit.lora.cohorts import TOY_KEY, Cohort, Encryptor, Member, layout_of, lora_factors, planned
from tests.vectors import make_lora_vectors as vectors

BUDGETS = (0.2, 0.6)
MATRICES, ORDERS = planned([(8, 20), (6, 30)], BUDGETS)
TENSORS = (Tensor("head", (3, 4), 0.5), Tensor("bias", (5,)))


def cohort_of(**changes):
    rng = np.random.default_rng(0)
    layout = layout_of(MATRICES, TENSORS, tiers=BUDGETS, **changes)
    members = tuple(
        Member(
            0.5,
            2.0,
            tiers,
            lora_factors(rng, MATRICES, 3),
            {
                "head": rng.uniform(-0.5, 0.5, (3, 4)).astype(np.float32),
                "bias": rng.uniform(-1, 1, 5).astype(np.float32),
            },
        )
        for tiers in (2, 1)
    )
    return Cohort(layout, ORDERS, members)


COHORT, CLEAR = cohort_of(), cohort_of(encrypt_tensors=False)
UPDATES = COHORT.updates()[0]
CLEAR_UPDATES = CLEAR.updates()[0]
RESULTS = COHORT.results(COHORT.updates())
CLEAR_RESULTS = CLEAR.results(CLEAR.updates())
LAYOUT = COHORT.layout


def reason_of(call, *arguments):
    with pytest.raises(DomainError) as error:
        call(*arguments)
    return error.value.reason


def outcome(call, *arguments):
    """What a call returns, or the reason it refuses with; any other error fails the test."""
    try:
        return call(*arguments), None
    except DomainError as error:
        return None, error.reason


def refusal_of(call, *arguments):
    with pytest.raises(DomainError) as error:
        call(*arguments)
    return error.value


def altered(data, message_type=pb.UpdateShard, **fields):
    """The shard with some fields replaced, as protobuf writes it."""
    message = message_type.FromString(data)
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message.SerializeToString()


def same(one, two):
    """Equality of contents, array by array."""
    if isinstance(one, np.ndarray):
        return one.shape == two.shape and (one == two).all()
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f), getattr(two, f)) for f in one.__dataclass_fields__)
    return one == two


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("update_shard", encode_update(vectors.golden_layout(), vectors.update_content())),
        ("tensor_shard", encode_update(vectors.golden_layout(), vectors.tensor_content())),
        ("result_shard", encode_result(vectors.golden_layout(), vectors.result_content())),
    ],
)
def test_shards_have_the_bytes_on_file_and_they_are_protobuf_s_own(name, data):
    assert data.hex() == vectors.golden()[name]
    message = (pb.ResultShard if name == "result_shard" else pb.UpdateShard).FromString(data)
    assert message.SerializeToString(deterministic=True) == data


def test_contents_on_file_are_read_back():
    layout, golden = vectors.golden_layout(), vectors.golden()
    update = parse_update(layout, 0, bytes.fromhex(golden["update_shard"]))
    assert same(update, vectors.update_content())
    assert same(decode_update(layout, 1, bytes.fromhex(golden["tensor_shard"])), vectors.tensor_content())
    assert same(decode_result(layout, 0, bytes.fromhex(golden["result_shard"])), vectors.result_content())


@pytest.mark.parametrize("cohort", [COHORT, CLEAR])
def test_updates_and_results_survive_their_bytes(cohort):
    member, layout = cohort.members[0], cohort.layout
    contents = protect(
        layout, member.factors, member.tensors, member.encrypted_tiers, cohort.orders, Encryptor(TOY_KEY)
    )
    for content in contents:
        assert same(decode_update(layout, content.shard, encode_update(layout, content)), content)
    for index, data in enumerate(cohort.results(cohort.updates())):
        content = decode_result(layout, index, data)
        assert encode_result(layout, content) == data


def test_contents_are_views_of_their_shard():
    content = decode_update(LAYOUT, 0, UPDATES[0])
    assert content.ciphertexts.obj is UPDATES[0]
    assert not content.matrices[0].B.flags.owndata


NAMES = st.text("aZ.09 é/\N{SNOWMAN}", min_size=1, max_size=9)


@st.composite
def layouts(draw):
    tiers = draw(st.lists(st.floats(2**-40, 1), max_size=3, unique=True).map(sorted))
    matrices = [
        Matrix(
            name, draw(st.integers(1, 2**20)), 60, tier_columns=tuple(draw(st.integers(0, 20)) for _ in tiers)
        )
        for name in draw(st.lists(NAMES, max_size=3, unique=True))
    ]
    tensors = [
        Tensor(name, tuple(draw(st.lists(st.integers(1, 9), max_size=4))), draw(st.floats(2**-100, 2**100)))
        for name in draw(st.lists(NAMES, max_size=3, unique=True))
    ]
    return layout_of(
        matrices,
        tensors,
        tiers=tiers,
        cuts=draw(st.sets(st.integers(1, 2))) if matrices else (),
        encrypt_tensors=draw(st.booleans()),
        max_rank=draw(st.integers(1, 1024)),
        max_directions=draw(st.integers(1, 2**32 - 1)),
        **({} if matrices else {"shards": tuple(Shard(tensors=(i,)) for i in range(len(tensors)))}),
    )


@settings(max_examples=40)
@given(layout=layouts())
def test_layouts_and_their_digests_survive_protobuf(layout):
    data = layout_to_proto(layout).SerializeToString()
    again = layout_from_proto(pb.Layout.FromString(data))
    assert again == layout
    assert again.digest == layout.digest


SMALL = st.integers(0, 2**32 - 1) | st.integers(0, 3)


@settings(max_examples=150)
@given(
    matrices=st.lists(st.tuples(SMALL, SMALL, st.lists(SMALL, max_size=2)), max_size=2),
    tensors=st.lists(st.tuples(st.lists(SMALL, max_size=12), st.floats()), max_size=2),
    tiers=st.lists(st.floats(), max_size=2),
    shards=st.lists(st.tuples(st.lists(SMALL, max_size=2), st.lists(SMALL, max_size=2)), max_size=3),
    key_id=st.binary(max_size=17),
    parameters=st.sampled_from(["", "standard", INSECURE_TOY.name, "x"]),
    ranks=st.tuples(SMALL, SMALL),
)
def test_any_layout_message_is_a_layout_or_an_invalid_argument(
    matrices, tensors, tiers, shards, key_id, parameters, ranks
):
    message = pb.Layout(
        parameters=parameters,
        key_id=key_id,
        tiers=tiers,
        max_rank=ranks[0],
        max_directions=ranks[1],
        matrices=[pb.Matrix(name="m", out_features=o, in_features=i, tier_columns=c) for o, i, c in matrices],
        tensors=[pb.Tensor(name="t", shape=shape, bound=bound) for shape, bound in tensors],
        shards=[pb.Shard(matrices=m, tensors=t) for m, t in shards],
    )
    layout, reason = outcome(layout_from_proto, message)
    if layout is None:
        assert reason is Reason.INVALID_ARGUMENT
        return
    assert layout_from_proto(layout_to_proto(layout)).digest == layout.digest


DECODERS = [
    (decode_update, LAYOUT, UPDATES),
    (validate_update, LAYOUT, UPDATES),
    (decode_update, CLEAR.layout, CLEAR_UPDATES),
    (decode_result, LAYOUT, RESULTS),
    (decode_result, CLEAR.layout, CLEAR_RESULTS),
]


@settings(max_examples=200)
@given(data=st.data(), which=st.sampled_from(DECODERS))
def test_altered_shards_are_read_or_refused_with_a_reason(data, which):
    decode, layout, shards = which
    index = data.draw(st.integers(0, len(shards) - 1))
    shard = bytearray(shards[index])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(shard), 400) - 1) | st.integers(0, len(shard) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "copy"])):
            case "flip":
                shard[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                del shard[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                shard[place:place] = data.draw(st.binary(min_size=1, max_size=12))
            case "copy":
                shard[place:place] = shard[: data.draw(st.integers(1, 60))]
        if not shard:
            break
    assert outcome(decode, layout, index, bytes(shard))[1] is not Reason.INTERNAL


@settings(max_examples=100)
@given(data=st.binary(max_size=200), which=st.sampled_from(DECODERS))
def test_random_bytes_are_refused_with_a_reason(data, which):
    decode, layout, _ = which
    assert reason_of(decode, layout, 0, data) in {Reason.SHARD_MALFORMED, Reason.LAYOUT_MISMATCH}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": 2}, Reason.SHARD_MALFORMED),
        ({"layout_digest": bytes(32)}, Reason.LAYOUT_MISMATCH),
        ({"shard": 1}, Reason.LAYOUT_MISMATCH),
        ({"rank": 0}, Reason.SHAPE_MISMATCH),
        ({"rank": 2}, Reason.SHAPE_MISMATCH),
        ({"rank": 9}, Reason.SHAPE_MISMATCH),
        ({"encrypted_tiers": 1}, Reason.SHAPE_MISMATCH),
        ({"encrypted_tiers": 3}, Reason.SHAPE_MISMATCH),
        ({"matrices": []}, Reason.SHAPE_MISMATCH),
        ({"clear_tensors": [b"\0" * 4]}, Reason.SHAPE_MISMATCH),
        ({"ciphertexts": b""}, Reason.CIPHERTEXT_TRUNCATED),
        ({"ciphertexts": bytes(HEADER_BYTES)}, Reason.CIPHERTEXT_MALFORMED),
    ],
)
def test_an_update_that_does_not_fit_its_layout_is_refused(fields, reason):
    assert reason_of(validate_update, LAYOUT, 0, altered(UPDATES[0], **fields)) is reason


def test_ciphertexts_where_none_belong_are_refused():
    member = replace(COHORT.members[0], encrypted_tiers=0)
    data = replace(COHORT, members=(member,)).updates()[0][0]
    assert not decode_update(LAYOUT, 0, data).ciphertexts
    assert reason_of(validate_update, LAYOUT, 0, altered(data, ciphertexts=b"x")) is Reason.SHAPE_MISMATCH


def with_part(which, value):
    """The first update shard with one value of the second matrix replaced."""
    content = decode_update(LAYOUT, 0, UPDATES[0])
    part = content.matrices[1]
    arrays = {"B": part.B.copy(), "clear_A": part.clear_A.copy()}
    arrays[which][1, 2] = value
    return encode_update(LAYOUT, replace(content, matrices=(content.matrices[0], MatrixPart(**arrays))))


@pytest.mark.parametrize(
    ("which", "value", "reason"),
    [
        ("B", np.nan, Reason.VALUE_NOT_FINITE),
        ("B", np.inf, Reason.VALUE_NOT_FINITE),
        ("clear_A", np.nan, Reason.VALUE_NOT_FINITE),
        ("clear_A", -np.inf, Reason.VALUE_NOT_FINITE),
        ("clear_A", np.nextafter(np.float32(1), np.float32(2)), Reason.VALUE_OUT_OF_RANGE),
        ("clear_A", -1.5, Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_unusable_values_of_an_update_are_refused_by_the_name_of_their_matrix(which, value, reason):
    refusal = refusal_of(decode_update, LAYOUT, 0, with_part(which, value))
    assert refusal.reason is reason
    assert MATRICES[1].name in refusal.message


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_at_its_limit_is_accepted(value):
    assert decode_update(LAYOUT, 0, with_part("clear_A", value)).matrices[1].clear_A[1, 2] == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, Reason.VALUE_NOT_FINITE), (np.inf, Reason.VALUE_NOT_FINITE), (0.51, Reason.VALUE_OUT_OF_RANGE)],
)
@pytest.mark.parametrize(
    ("decode", "shards"), [(decode_update, CLEAR_UPDATES), (decode_result, CLEAR_RESULTS)]
)
def test_unusable_clear_tensors_are_refused_by_name(decode, shards, value, reason):
    values = np.zeros(12, dtype="<f4")
    values[7] = value
    kind = pb.UpdateShard if decode is decode_update else pb.ResultShard
    refusal = refusal_of(decode, CLEAR.layout, 1, altered(shards[1], kind, clear_tensors=[values.tobytes()]))
    assert refusal.reason is reason
    assert "head" in refusal.message


def altered_matrix(**fields):
    message = pb.ResultShard.FromString(RESULTS[0])
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(message.matrices[1], name)[:]
            getattr(message.matrices[1], name).extend(value)
        else:
            setattr(message.matrices[1], name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"directions": 5}, Reason.SHAPE_MISMATCH),
        ({"directions": 2**32 - 1}, Reason.SHAPE_MISMATCH),
        ({"directions": 0}, Reason.SHAPE_MISMATCH),
        ({"row_exponents": [1]}, Reason.SHAPE_MISMATCH),
        ({"row_exponents": [1001] * 6}, Reason.SHAPE_MISMATCH),
        ({"row_exponents": [-(2**31)] * 6}, Reason.SHAPE_MISMATCH),
        ({"energy_left_out": 1.5}, Reason.SHAPE_MISMATCH),
        ({"energy_left_out": -0.1}, Reason.SHAPE_MISMATCH),
        ({"energy_left_out": float("nan")}, Reason.SHAPE_MISMATCH),
        ({"q": b""}, Reason.SHAPE_MISMATCH),
        ({"clear_m": b"\0" * 4}, Reason.SHAPE_MISMATCH),
        ({"q": struct.pack("<f", float("nan")) * 36}, Reason.VALUE_NOT_FINITE),
    ],
)
def test_a_result_that_does_not_fit_its_layout_is_refused(fields, reason):
    assert reason_of(decode_result, LAYOUT, 0, altered_matrix(**fields)) is reason


def test_shards_in_another_order_of_fields_or_with_new_fields_are_read():
    """Other languages write protobuf too, and later versions may add fields."""
    message = pb.UpdateShard.FromString(UPDATES[0])
    head = pb.UpdateShard.FromString(UPDATES[0])
    del head.matrices[:]
    head.ClearField("ciphertexts")
    late = pb.UpdateShard(matrices=message.matrices, ciphertexts=message.ciphertexts)
    data = late.SerializeToString() + b"\xf8\x07\x05" + head.SerializeToString()
    assert same(decode_update(LAYOUT, 0, data), decode_update(LAYOUT, 0, UPDATES[0]))


def test_a_shard_that_does_not_exist_is_refused():
    data = altered(UPDATES[0], shard=9)
    assert reason_of(decode_update, LAYOUT, 9, data) is Reason.SHARD_UNKNOWN


BEYOND = 200_000
"""Items that a message of 4 MiB can hold: converted one by one they take most of a second."""


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Layout(matrices=[pb.Matrix(name="m", out_features=1, in_features=1)] * 2**15), "matrices"),
        (pb.Layout(tensors=[pb.Tensor(name="t", shape=[1], bound=1)] * 2**15), "tensors"),
        (pb.Layout(tiers=[0.5] * BEYOND), "tiers"),
        (pb.Layout(shards=[pb.Shard(matrices=[0])] * 2**16), "shards"),
        (pb.Layout(shards=[pb.Shard(matrices=range(BEYOND))]), "matrices of a shard"),
        (pb.Layout(shards=[pb.Shard(tensors=range(BEYOND))]), "tensors of a shard"),
        (pb.Layout(matrices=[pb.Matrix(name="m", tier_columns=[1] * BEYOND)]), "tier_columns"),
        (pb.Layout(tensors=[pb.Tensor(name="t", shape=[1] * BEYOND)]), "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_many_there_are_is_looked_at_before_any_is_converted(message, field):
    with pytest.raises(DomainError, match=f"^{field} has [0-9]+ items, at most") as caught:
        layout_from_proto(message)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
