"""Random models of transformers' classes, for benchmarks that need no trained ones."""

from typing import Any

import torch


def random_qwen3(
    *, vocab_size: int, layers: int, width: int, seed: int, **values: Any
) -> torch.nn.Module:
    """A Qwen3 model, fp32, whose logits have a standard deviation of about 2.

    `values` are further fields of its configuration.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        **values,
    )
    model = Qwen3ForCausalLM(config)
    model.get_output_embeddings().weight.data.normal_(0, 2.0 / width**0.5)
    return model
