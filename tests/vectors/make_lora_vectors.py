"""Writes tests/vectors/lora_golden.json. Run from the repository root: `python -m tests.vectors.make_lora_vectors`.

What agents and servers of different releases must agree on: the digest of a layout, the bytes of shards, and all that
is derived from the obfuscation secret. A change here is a change of the protocol.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from shelora.lora.codec import encode_result, encode_update
from shelora.lora.layout import SKETCHES, SUMS, Layout, Matrix, Shard, SumTerms, Tensor
from shelora.lora.shards import MatrixAggregate, MatrixPart, ResultShardContent, UpdateShardContent
from shelora.obfuscation import Obfuscation

FILE: Final = Path(__file__).parent / "lora_golden.json"
SECRET: Final = bytes(range(32))


def golden_layout() -> Layout:
    return Layout(
        parameters="standard",
        key_id=bytes(range(16)),
        matrices=(
            Matrix("model.layers.0.q_proj", 8, 12, tier_columns=(2, 4)),
            Matrix("größe", 6, 12, tier_columns=(0, 3)),
        ),
        tensors=(Tensor("head", (3, 4), 2.5), Tensor("scalar", ())),
        tiers=(0.125, 0.3),
        encrypt_tensors=False,
        max_rank=4,
        max_directions=16,
        shards=(Shard(matrices=(0, 1)), Shard(tensors=(0, 1))),
    )


def sums_layout() -> Layout:
    return Layout(
        parameters="standard",
        key_id=b"",
        matrices=(Matrix("q", 8, 12),),
        tensors=(Tensor("head", (3, 4), 2.5),),
        tiers=(),
        encrypt_tensors=False,
        max_rank=4,
        max_directions=6,
        shards=(Shard(matrices=(0,), kind=SKETCHES), Shard(tensors=(0,), kind=SUMS)),
        sums=SumTerms(profile="standard", sketch_columns=6, sketch_rows=9),
    )


def update_content() -> UpdateShardContent:
    parts = tuple(
        MatrixPart(_ramp(m.out_features, 2), _ramp(2, 12 - m.protected(1))) for m in golden_layout().matrices
    )
    return UpdateShardContent(
        shard=0, rank=2, encrypted_tiers=1, matrices=parts, clear_tensors=(), ciphertexts=b"ciphertexts"
    )


def result_content() -> ResultShardContent:
    parts = tuple(
        MatrixAggregate(
            Q=_ramp(m.out_features, 3),
            clear_M=_ramp(3, m.clear),
            row_exponents=(-2, 0, 31),
            energy_left_out=0.25,
        )
        for m in golden_layout().matrices
    )
    return ResultShardContent(
        shard=0, contributor_count=5, matrices=parts, clear_tensors=(), ciphertexts=b"ciphertexts"
    )


def tensor_content() -> UpdateShardContent:
    return UpdateShardContent(
        shard=1,
        rank=1,
        encrypted_tiers=2,
        matrices=(),
        clear_tensors=(_ramp(3, 4), np.float32([0.5]).reshape(())),
        ciphertexts=b"",
    )


def _ramp(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def vectors() -> dict[str, Any]:
    layout, secret = golden_layout(), Obfuscation(SECRET, 7)
    initial = secret.initial_A("q", 2, 4)
    return {
        "layout_digest": layout.digest.hex(),
        "update_shard": encode_update(layout, update_content()).hex(),
        "tensor_shard": encode_update(layout, tensor_content()).hex(),
        "result_shard": encode_result(layout, result_content()).hex(),
        "permutation": secret.permutation("q", 12).tolist(),
        "long_permutation_sha256": hashlib.sha256(
            secret.permutation("q", 4096).astype("<i8").tobytes()
        ).hexdigest(),
        "initial_A": initial.astype("<f4").tobytes().hex(),
        "initial_tensor": secret.initial_tensor("head", (2, 3)).astype("<f4").tobytes().hex(),
        "plan_key": secret.plan_key().hex(),
        "sketch": secret.sketch("columns", "q", 3, (3, 5)).tolist(),
        "long_sketch_sha256": hashlib.sha256(
            secret.sketch("rows", "q", 3, (36, 768)).astype("<i2").tobytes()
        ).hexdigest(),
        "sums_layout_digest": sums_layout().digest.hex(),
    }


def golden() -> dict[str, Any]:
    """What is on file."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=2) + "\n", encoding="utf-8")
