"""An aggregation whose operator changed it: the first result is crafted so that agents send back what they decrypt.

Each shard of the first training round becomes Q = I and rows of M that hold a multiple of the identity and, encrypted,
the victim's A. An agent factors it, trains a little, and sends B in the clear: from B Bᵀ one reads A. What arrives is
kept in SHELORA_TEST_ORACLE. On the path of a server's process, Python runs this before anything else.
"""

import os
import sys
from pathlib import Path
from typing import Any

if any("services.aggregation.worker" in argument for argument in getattr(sys, "orig_argv", [])):
    import json

    import numpy as np

    from shelora.ckks.evaluator import Evaluator
    from shelora.ckks.wire import BlockReader, encode_block
    from shelora.lora import products
    from shelora.lora.aggregate import Aggregation
    from shelora.lora.codec import encode_result, parse_update
    from shelora.lora.shards import MatrixAggregate, ResultShardContent
    from shelora.messages import layout_to_proto

    FOLDER, VICTIM, EXPONENT, COLUMNS, SCALE = Path(os.environ["SHELORA_TEST_ORACLE"]), "clinic", 12, 4, 0.4
    begin, honest = Aggregation.__init__, Aggregation.whole

    def begun(self: Any, layout: Any, index: int, contributions: Any, load: Any) -> None:
        begin(self, layout, index, contributions, load)
        self.load = load

    def crafted(self: Any) -> bytes:
        layout, index, contributions = self._cohort.layout, self._cohort.index, self._cohort.contributions
        load, shard = self.load, layout.shard(index)
        if not shard.matrices or not layout.tiers:
            return honest(self)
        number = len(list(FOLDER.glob(f"*.{index}.layout")))
        for part in contributions:
            (FOLDER / f"{number}.{index}.{part.client_id}.update").write_bytes(load(part.client_id))
        scalings = {part.client_id: part.scaling for part in contributions}
        (FOLDER / f"{number}.{index}.scalings").write_text(json.dumps(scalings))
        (FOLDER / f"{number}.{index}.layout").write_bytes(layout_to_proto(layout).SerializeToString())
        if number:
            return honest(self)
        content = parse_update(layout, index, load(VICTIM))
        kind = products.KIND
        shape = kind.update_block_shape(layout, content)
        segments, total = kind.segments(layout, shard), kind.slot_count(layout, shard)
        rank, rows = content.rank, COLUMNS + content.rank
        accumulator = Evaluator(layout.ckks, layout.key_id).accumulator([2] * (total // 2), rows)
        weights, clear = np.zeros((rows, rank, total // 2)), np.zeros((rows, total))
        for segment in segments:
            for i in range(COLUMNS):
                clear[i, segment.slot + i] = SCALE
            for j in range(rank):
                weights[COLUMNS + j, j, segment.slot // 2 : segment.slot // 2 + COLUMNS // 2] = SCALE
        accumulator.add(BlockReader(content.ciphertexts, shape), weights)
        accumulator.add_clear(clear)
        matrices = tuple(
            MatrixAggregate(
                Q=np.eye(layout.matrices[i].out_features, rows, dtype=np.float32),
                clear_M=np.zeros((rows, layout.matrices[i].clear), np.float32),
                row_exponents=(-EXPONENT,) * rows,
                energy_left_out=0.0,
            )
            for i in shard.matrices
        )
        return encode_result(
            layout,
            ResultShardContent(
                shard=index,
                contributor_count=len(contributions),
                matrices=matrices,
                clear_tensors=(),
                ciphertexts=encode_block(accumulator.finish()),
            ),
        )

    Aggregation.__init__, Aggregation.whole = begun, crafted  # type: ignore[method-assign]
