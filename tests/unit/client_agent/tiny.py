"""Tiny real models and their tokenizer over a small vocabulary."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.config import LoraSettings
from client_agent.model import AdaptedModel
from shelora.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
GOOD = ["good", "great", "fine", "nice", "happy"]
BAD = ["bad", "awful", "poor", "sad", "angry"]
LABELS = ("bad", "good")
CHAT_WORDS = ["[PAD]", "[UNK]", "[BOS]", "[END]", *GOOD, *BAD, "the", "movie", "was"]
CHAT_WORDS += ["user", "assistant", "system", ":", "###", "Instruction", "Response"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' [END]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *GOOD, *BAD, "the", "movie", "was"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )


def classifier(
    folder: Path, lora: LoraSettings | None = None, targets: tuple[str, ...] = ("query", "value")
) -> AdaptedModel:
    return AdaptedModel(
        load_checkpoint(str(folder), SEQUENCE_CLASSIFICATION, LABELS),
        task=SEQUENCE_CLASSIFICATION,
        target_modules=targets,
        lora=lora or LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )


def decoder(folder: Path) -> AdaptedModel:
    return AdaptedModel(
        load_checkpoint(str(folder), CAUSAL_LM, ()),
        task=CAUSAL_LM,
        target_modules=("q_proj", "v_proj"),
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CHAT_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[END]"
    )
    made.chat_template = template
    return made


def save_chat_model(folder: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
