"""Tiny models of many families, made from configurations: no hub is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    ViTImageProcessor,
)

from client_agent.checkpoint import quiet
from tests.unit.client_agent.tiny import chat_tokenizer, save_tokenizer

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DECODERS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 2, "n_layer": 2},
    "falcon": {"head_dim": None},
    "stablelm": {},
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "smollm3": {},
    "helium": {},
    "glm": {},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
"""By `model_type`, beside what is common; None leaves out what a family works out by itself."""
ENCODERS: Mapping[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "xlm-roberta": {"max_position_embeddings": 66},
    "camembert": {"max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 32},
    "deberta-v2": {},
    "mpnet": {},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3},
    "ernie": {},
    "roformer": {"embedding_size": 32},
    "megatron-bert": {},
    "convbert": {"embedding_size": 32},
    "nystromformer": {},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
}
IMAGES: Mapping[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "beit": {},
    "dinov2": {"mlp_ratio": 2},
    "vit_msn": {},
    "data2vec-vision": {},
    "dinov2_with_registers": {"mlp_ratio": 2},
    "convnext": {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "patch_size": 2},
    "convnextv2": {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "patch_size": 2},
    "resnet": {"depths": [1, 2], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "bottleneck"},
    "regnet": {
        "num_hidden_layers": None,
        "depths": [1, 2],
        "hidden_sizes": [16, 32],
        "embedding_size": 8,
        "groups_width": 8,
    },
    "efficientnet": {
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "kernel_sizes": [3, 5],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 6],
        "width_coefficient": 0.5,
        "depth_coefficient": 1.0,
        "hidden_dim": 640,
    },
    "mobilenet_v1": {"depth_multiplier": 0.25, "tf_padding": False},
    "mobilenet_v2": {"depth_multiplier": 0.25, "tf_padding": False},
}
CONVOLUTIONS: Mapping[str, tuple[str, ...]] = {
    "resnet": ("convolution",),
    "regnet": ("layer.0.convolution", "layer.3.convolution", "shortcut.convolution", "attention.0"),
    "efficientnet": ("embeddings.convolution", "expand_conv", "project_conv", "reduce", "top_conv"),
    "mobilenet_v1": ("conv_stem.convolution", "layer.1.convolution", "layer.25.convolution"),
    "mobilenet_v2": ("expand_1x1.convolution", "reduce_1x1.convolution", "first_conv.convolution"),
    "convnext": ("pwconv1", "patch_embeddings", "downsampling_layer.1"),
    "convnextv2": ("pwconv2", "downsampling_layer.1"),
}
"""What to adapt in families of convolutions."""
SIDE = 16


def move_statistics(model: nn.Module) -> None:
    """Gives batch norms running statistics, as training does: fresh ones leave values as they are."""
    for module in model.modules():
        if (
            isinstance(module, nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def save(kind: str, folder: Path, *, chat: bool = False) -> Path:
    """A checkpoint of that `model_type`, without its head, with what prepares its inputs."""
    torch.manual_seed(1)
    image = kind in IMAGES
    extra = IMAGES.get(kind) or DECODERS.get(kind) or ENCODERS.get(kind) or {}
    base = {"image_size": SIDE, "patch_size": 4, "num_channels": 3} if image else {}
    usual = {name: value for name, value in COMMON.items() if not image or not name.endswith("token_id")}
    values = {name: value for name, value in (usual | base | extra).items() if value is not None}
    config = CONFIG_MAPPING[kind](**values)
    config.architectures = []
    loader = AutoModelForCausalLM if kind in DECODERS else AutoModelForMaskedLM
    with quiet():
        if image:
            loader = AutoModelForImageClassification
            ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
        model = loader.from_config(config)
        move_statistics(model)
        model.save_pretrained(folder)
    if chat:
        chat_tokenizer().save_pretrained(folder)
    elif not image:
        save_tokenizer(folder)
    return folder
