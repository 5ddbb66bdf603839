"""Digests of what stays as it is during training: agents whose base models differ must not train together.

They are of what is loaded, not of files: sharded, renamed or stored in another format, the same values give the same
digest. Agents send them keyed by the epoch's secret (`shelora.obfuscation`), so that servers see equality alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from client_agent.checkpoint import Checkpoint, under
from client_agent.encoding import tokenizing
from client_agent.learning import BaseDigest

_PROBED: Final = 2048
"""Entries of the vocabulary that are tokenized, about: other merges of the same vocabulary show there."""
_PROBE: Final = (
    "Zwölf Boxkämpfer jagen Viktor; 3.14159 + 2 = 5?\n\tif (x != y) { return 'été'; } 東京 — привет 🙂"
)


def base_digest(checkpoint: Checkpoint) -> BaseDigest:
    """Of a checkpoint before it is adapted. Reads every weight once, without a copy."""
    frozen = {
        name: value
        for name, value in checkpoint.model.state_dict().items()
        if not under(name, checkpoint.head)
    }
    return BaseDigest(
        weights=weights_digest(frozen),
        tokenizer=_processor_digest(checkpoint.tokenizer),
        chat_template=_of(getattr(checkpoint.tokenizer, "chat_template", None)),
    )


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of names, types, shapes and values, in order of the names."""
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return hashlib.sha256(b"".join(pool.map(_tensor_digest, sorted(tensors.items())))).digest()


def _tensor_digest(named: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = named
    value = tensor.detach().contiguous().cpu()
    if value.is_floating_point():  # a checkpoint may be loaded in a smaller type that holds it exactly
        value = value.float()
    hashed = hashlib.sha256(_of([name, str(value.dtype), list(value.shape)]))
    hashed.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.digest()


def _processor_digest(processor: Any) -> bytes:  # noqa: ANN401 - a tokenizer, or what prepares images
    if isinstance(processor, PreTrainedTokenizerBase):
        return _tokenizer_digest(processor)
    settings = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
    return _of(json.loads(json.dumps(settings, default=str)))


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Of what it does: its vocabulary, its special tokens, how it cuts a sample of both."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    sample = " ".join(token for token, _ in vocabulary[:: max(1, len(vocabulary) // _PROBED)])
    return _of(
        [
            vocabulary,
            [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
            _ids(tokenizer, [_PROBE, sample, sample.upper()]),
        ]
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    with tokenizing():
        ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    return ids


def _of(value: Any) -> bytes:  # noqa: ANN401 - any JSON
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).digest()
