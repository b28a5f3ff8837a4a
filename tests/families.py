"""Tiny checkpoints of every supported model family, built by transformers in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.tiny import make_tokenizer

ORIGINAL_CONTEXT = 16
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * ORIGINAL_CONTEXT,
    "eos_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "head_dim": 16,
}

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **sizes: LlamaConfig(rope_parameters=LLAMA3_ROPE, **sizes),
    "llama-linear": lambda **sizes: LlamaConfig(rope_parameters=LINEAR_ROPE, **sizes),
    "mistral": lambda **sizes: MistralConfig(head_dim=12, sliding_window=None, **sizes),
    "qwen2": Qwen2Config,
    "qwen2-one-group": lambda **sizes: Qwen2Config(**{**sizes, "num_key_value_heads": 1}),
    "qwen3": lambda **sizes: Qwen3Config(head_dim=16, **sizes),
    "qwen3_moe": lambda **sizes: Qwen3MoeConfig(**EXPERTS, **sizes),
    "qwen3_moe-raw": lambda **sizes: Qwen3MoeConfig(
        **{**EXPERTS, "norm_topk_prob": False}, **sizes
    ),
}


def make_family_checkpoint(
    path: Path,
    family: str,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **sizes: Any,
) -> Path:
    """Write a randomly initialised checkpoint with tokenizer and generation config."""
    torch.manual_seed(0)
    config = FAMILIES[family](**{**SIZES, **sizes}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.25)
    model.generation_config.eos_token_id = [0, 2]
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(path)
    return path
