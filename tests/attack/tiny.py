"""A tiny Llama with random weights: attacks on structure need no trained model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """
patient reports chest pain since tuesday night transfer money to account before noon merger closes
on friday board has not been told yet password for the vault is blue canyon seven shares of apex
will fall after recall notice next monday morning maria tested positive and starts therapy week at
clinic a in we they north south red green
"""


def save_tiny_llama(folder: Path) -> Path:
    """A model of two layers and its tokenizer of whole words."""
    vocabulary = ["<pad>", "<unk>", "</s>", *dict.fromkeys(TEXT.split())]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
