"""A model as its HF `config.json` describes it, without weights and without Megatron.

Also how its layers and vocabulary are spread over pipeline and tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trb_megatron.huggingface.config_values import check_side_files, check_values
from trb_megatron.huggingface.families import FAMILIES, has_parameter
from trb_megatron.huggingface.formats import refuse_other_formats
from trb_megatron.huggingface.kinds import ModelShape
from trb_megatron.huggingface.tensors import CheckpointError, read_json

VOCAB_MULTIPLE = 128
"""Padded vocabularies are multiples of this and of TP: power-of-two TP sizes agree on it."""


@dataclass(frozen=True)
class HFModelConfig:
    """The part of an HF `config.json` that decides how a model is built.

    `inv_freq` are the angular frequencies of the rotary embedding, scaling applied, one for each
    pair of a head's dimensions. `max_positions` is the longest sequence (prompt and response) that
    the model was made for. The `expert` sizes are 0 in a dense model; `normalize_expert_weights`
    says whether the weights of the chosen experts are made to sum to one.
    """

    path: Path
    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_epsilon: float
    inv_freq: tuple[float, ...]
    max_positions: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    normalize_expert_weights: bool = False

    @property
    def num_qkv_rows(self) -> int:
        """Rows of a layer's query, key and value weights together."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim

    def shape(self, padded_vocab_size: int) -> ModelShape:
        """The sizes that the parameter mapping needs, at a padded vocabulary."""
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
            hf_vocab_size=self.vocab_size,
            padded_vocab_size=padded_vocab_size,
            tied_embeddings=self.tied_embeddings,
            num_experts=self.num_experts,
            expert_ffn_hidden_size=self.expert_ffn_hidden_size,
        )


QKV_ROWS = "(num_attention_heads + 2 * num_key_value_heads) * head_dim"
"""`num_qkv_rows` in the names of a `config.json`, for messages."""


def read_hf_config(path: Path) -> HFModelConfig:
    """Read the `config.json` of an HF checkpoint folder.

    Raises:
        CheckpointError: weights in another format than safetensors, a missing or broken file, an
            unsupported architecture (the supported ones are listed), or a feature that the model
            would need and that is not built (some kinds of rope scaling, sliding windows, another
            activation, quantisation).
    """
    refuse_other_formats(path)
    check_side_files(path)
    file = path / "config.json"
    raw = read_json(file)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{file}: model_type {family!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    check_values(raw, file)
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers' validators raise several types
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not a valid {family} configuration: {reason}") from error
    if config.model_type != family:
        raise CheckpointError(
            f"{file}: with layer_types, transformers reads a {family} model as "
            f"{config.model_type}, which is not supported; remove layer_types if all layers are "
            "full_attention"
        )
    # As every rotary embedding with a scaling does: a value beside the parameters goes before them.
    config.standardize_rope_params()
    for feature, is_used in _unsupported_features(config).items():
        if is_used:
            raise CheckpointError(f"{file}: {feature} is not supported")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_sizes(config, head_dim, file)
    return HFModelConfig(
        path=path,
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        norm_epsilon=config.rms_norm_eps,
        inv_freq=tuple(_rope_frequencies(config, head_dim).tolist()),
        max_positions=config.max_position_embeddings,
        **_expert_config(config),
    )


def _unsupported_features(config: Any) -> dict[str, bool]:
    """Features that the configuration asks for and our model lacks, for any family.

    transformers ignores a key that the family's class doesn't have, such as attention_bias in
    Mistral, and so do we; layer types alone mean something in every family.
    """
    rope_type = config.rope_parameters["rope_type"]
    window = _field(config, "sliding_window")
    is_short = window is not None and window < config.max_position_embeddings
    own_types = _field(config, "layer_types")
    harmless = {"full_attention", *([] if window is None or is_short else ["sliding_attention"])}
    layer_types = set(getattr(config, "layer_types", None) or ()) - harmless
    return {
        f"rope_type {rope_type!r} (only {', '.join(ROPE_TYPES)})": rope_type not in ROPE_TYPES,
        "partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
        f"a sliding window (sliding_window = {window}, use_sliding_window)": (
            is_short and (own_types is None or "sliding_attention" in own_types)
        ),
        f"layer_types with {', '.join(sorted(layer_types))}": bool(layer_types),
        "attention_bias": bool(_field(config, "attention_bias")),
        "mlp_bias": bool(_field(config, "mlp_bias")),
        f"hidden_act {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        "is_encoder_decoder": config.is_encoder_decoder,
        "a mixture of dense and expert layers (decoder_sparse_step, mlp_only_layers)": (
            _field(config, "decoder_sparse_step") not in (None, 1)
            or bool(_field(config, "mlp_only_layers"))
        ),
    }


def _field(config: Any, name: str) -> Any:
    """A value that the family's class of transformers has, else None."""
    return getattr(config, name) if name in type(config).__dataclass_fields__ else None


def _check_sizes(config: Any, head_dim: int, file: Path) -> None:
    """Refuse sizes that contradict each other."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_parameters
    contradictions = {
        f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}": (
            heads % groups != 0
        ),
        f"head_dim={head_dim}, of hidden_size={config.hidden_size} and num_attention_heads={heads},"
        " is not even and positive, as rotary embeddings need": head_dim < 1 or head_dim % 2 != 0,
        f"pad_token_id={config.pad_token_id} is not in the vocabulary of {config.vocab_size}": (
            config.pad_token_id is not None
            and not -config.vocab_size <= config.pad_token_id < config.vocab_size
        ),
        "high_freq_factor must exceed low_freq_factor in the rope parameters": (
            rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]
        ),
    }
    if has_parameter(config.model_type, "mlp.router.weight"):
        chosen, experts = config.num_experts_per_tok, config.num_experts
        contradictions[f"num_experts_per_tok={chosen} exceeds num_experts={experts}"] = (
            chosen > experts
        )
    for contradiction, holds in contradictions.items():
        if holds:
            raise CheckpointError(f"{file}: {contradiction}")


def _expert_config(config: Any) -> dict[str, Any]:
    if not has_parameter(config.model_type, "mlp.router.weight"):
        return {}
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_ffn_hidden_size": config.moe_intermediate_size,
        "normalize_expert_weights": config.norm_topk_prob,
    }


ROPE_TYPES = ("default", "linear", "llama3")


def _rope_frequencies(config: Any, head_dim: int) -> Tensor:
    """Angular frequencies of the rotary embedding [head_dim / 2], fp32.

    "linear" divides all by a factor. "llama3" divides those whose wavelength exceeds the original
    context divided by `low_freq_factor`, keeps those shorter than the context divided by
    `high_freq_factor`, and blends linearly between (Llama 3.1, `apply_scaling` of the reference
    code). Megatron has constants in place of these numbers.
    """
    rope = config.rope_parameters
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "default":
        return inv_freq
    scaled = inv_freq / rope["factor"]
    if rope["rope_type"] == "linear":
        return scaled
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns_in_context = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    unscaled_share = ((turns_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return unscaled_share * inv_freq + (1 - unscaled_share) * scaled


def padded_vocab_size(vocab_sizes: list[int], tp_size: int) -> int:
    """The common internal vocabulary of several models, so that their shards line up."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
    return -(-max(vocab_sizes) // multiple) * multiple


def layers_of_stages(num_layers: int, pp_size: int) -> list[range]:
    """The layers of each pipeline stage; the first stages take one more where PP doesn't divide."""
    counts = [num_layers // pp_size + (s < num_layers % pp_size) for s in range(pp_size)]
    return [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def check_layout(
    models: Sequence[HFModelConfig],
    tp_size: int,
    pp_size: int,
    options: tuple[str, str] = (
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
    ),
) -> None:
    """Refuse a layout that the models, which share the ranks, cannot all be cut into.

    Args:
        options: what sets `tp_size` and `pp_size`, for the messages.

    Raises:
        ValueError: names the size that TP does not fit, and the TP sizes that fit all models; or a
            pipeline longer than a model.
    """
    tp_option, pp_option = options
    for model in models:
        misfit = _tp_misfit(model, tp_size)
        if misfit is not None:
            most = min(model.num_attention_heads for model in models)
            sizes = [n for n in range(1, most + 1) if not any(_tp_misfit(m, n) for m in models)]
            fitting = "sizes that fit" + (" both models" if len(models) > 1 else "")
            raise ValueError(
                f"{model.path}: {tp_option}={tp_size} {misfit}; "
                f"{fitting}: {', '.join(map(str, sizes))}"
            )
        if pp_size > model.num_layers:
            raise ValueError(
                f"{model.path}: {pp_option}={pp_size} exceeds the model's {model.num_layers} layers"
            )


def _tp_misfit(model: HFModelConfig, tp_size: int) -> str | None:
    """Why a model cannot be cut over so many tensor-parallel ranks, as the end of a sentence.

    Ranks hold whole heads. They hold whole query groups, too, or several share one group: then they
    cut the rows of the QKV weight evenly, wherever that falls.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % tp_size != 0:
        return f"does not divide num_attention_heads={heads}"
    if groups % tp_size != 0 and tp_size % groups != 0:
        return f"is neither a divisor nor a multiple of num_key_value_heads={groups}"
    for name, size in (
        (QKV_ROWS, model.num_qkv_rows),
        ("intermediate_size", model.ffn_hidden_size),
        ("moe_intermediate_size", model.expert_ffn_hidden_size),
    ):
        if size % tp_size != 0:
            return f"does not divide {name}={size}"
    return None
