"""Student and teacher: from an HF `config.json` to a Megatron-Core GPT model on this rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_grad_accumulation_and_async_allreduce,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trb_megatron.distributed import ParallelLayout
from trb_megatron.hf_checkpoint import CheckpointError, read_json
from trb_megatron.kv_cache import paged_attention
from trb_megatron.param_mapping import FAMILIES, ModelShape

VOCAB_MULTIPLE = 128
"""Padded vocabularies are multiples of this and of TP: power-of-two TP sizes agree on it."""


@dataclass(frozen=True)
class HFModelConfig:
    """What a model needs to know of its HF `config.json`.

    `max_positions` is the longest sequence (prompt and response) that the model was made for.
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
    rope_theta: float
    max_positions: int

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
        )


def read_hf_config(path: Path) -> HFModelConfig:
    """Read the `config.json` of an HF checkpoint folder.

    Raises:
        CheckpointError: missing or broken file, an unsupported architecture (the supported ones are
            listed), or a feature that the model would need and that is not built (rope scaling,
            sliding windows, another activation, quantisation).
    """
    raw = read_json(path / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {family!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    rope = config.rope_parameters
    unsupported = {
        "quantization_config": raw.get("quantization_config") is not None,
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "use_sliding_window": bool(config.use_sliding_window),
        "attention_bias": bool(config.attention_bias),
        f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise CheckpointError(f"{path / 'config.json'}: {feature} is not supported")
    return HFModelConfig(
        path=path,
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        max_positions=config.max_position_embeddings,
    )


def padded_vocab_size(vocab_sizes: list[int], tp_size: int) -> int:
    """The common internal vocabulary of several models, so that their shards line up."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
    return -(-max(vocab_sizes) // multiple) * multiple


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm for the local layer spec.

    Megatron's own wrapper refuses sequence parallelism; this one marks its weight, so that its
    gradient is summed over the tensor-parallel group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


# The attention asserts a flash-attention package before it calls the kernel that
# `PagedSelfAttention` replaces; the name exists in all supported versions.
megatron_attention.is_fa_min_version = lambda *args, **kwargs: True


class PagedSelfAttention(SelfAttention):
    """Megatron's self-attention whose inference kernel reads the paged cache."""

    def flash_decode_and_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqlens_k: Tensor,
        block_table: Tensor,
        is_decode_only: bool,
        **_: Any,
    ) -> Tensor:
        scale = self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
        return paged_attention(q, k, v, cu_seqlens_q, seqlens_k, block_table, max_seqlen_q, scale)


class HiddenStateGPTModel(GPTModel):
    """A GPT model whose forward ends at the final hidden states; `project` makes the logits.

    Keeping the two apart lets a loss walk the vocabulary projection in pieces, so that no
    [tokens, vocabulary] tensor of a whole batch exists.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def gather_hidden(self, hidden: Tensor) -> Tensor:
        """[T, B, H] of the whole sequence from the last stage's output.

        With sequence parallelism an all-gather over the tensor-parallel group of [T/tp, B, H]; its
        backward takes this rank's part, since `project` has summed the gradient already.
        """
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )

    def project(self, hidden: Tensor) -> Tensor:
        """Vocabulary-parallel logits [..., U] of gathered hidden states [..., H], in their type.

        Differentiable: the gradient of the replicated `hidden` is all-reduced over the
        tensor-parallel group, that of the weight shard is local.
        """
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def token_multiple(config: TransformerConfig) -> int:
    """What the number of tokens of a forward pass must be a multiple of."""
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def check_layout(config: HFModelConfig, tp_size: int, pp_size: int) -> None:
    """Refuse a layout that the model cannot be cut into.

    Raises:
        ValueError: names the size that TP does not divide, or a pipeline longer than the model.
    """
    for name, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_query_groups),
        ("intermediate_size", config.ffn_hidden_size),
    ):
        if size % tp_size != 0:
            raise ValueError(
                f"{config.path}: parallel.tensor_model_parallel_size={tp_size} does not divide "
                f"{name}={size}; choose a divisor"
            )
    if pp_size > config.num_layers:
        raise ValueError(
            f"{config.path}: parallel.pipeline_model_parallel_size={pp_size} exceeds the model's "
            f"{config.num_layers} layers"
        )


def _pipeline_layout(num_layers: int, pp_size: int) -> str | None:
    """Megatron's layout string where PP doesn't divide the layers: first stages take one more."""
    if num_layers % pp_size == 0:
        return None
    counts = [num_layers // pp_size + (s < num_layers % pp_size) for s in range(pp_size)]
    stages = [f"t*{count}" for count in counts]
    return "|".join(["E" + stages[0], *stages[1:-1], stages[-1] + "L"])


def _transformer_config(
    config: HFModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute_activations: bool,
) -> TransformerConfig:
    on_gpu = layout.device.type == "cuda"
    recompute = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if recompute_activations
        else {}
    )
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        attention_backend=AttnBackend.auto,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        pipeline_model_parallel_layout=_pipeline_layout(config.num_layers, layout.pp_size),
        sequence_parallel=sequence_parallel and layout.tp_size > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        **recompute,
    )


def _layer_specs(config: TransformerConfig, on_gpu: bool) -> TransformerBlockSubmodules:
    if HAVE_TE and on_gpu:
        from megatron.core.extensions.transformer_engine import TENorm

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        final_norm: Any = TENorm
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
        final_norm = RMSNorm
    spec.submodules.self_attention.module = PagedSelfAttention
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=final_norm
    )


def build_model(
    config: HFModelConfig,
    layout: ParallelLayout,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    recompute_activations: bool = False,
) -> HiddenStateGPTModel:
    """This rank's part of a model, its weights not yet set.

    Args:
        vocab_size: padded vocabulary, a multiple of the tensor-parallel size.
        dtype: type of the parameters and activations, torch.float32 or torch.bfloat16.

    Raises:
        ValueError: the layout does not fit the model (see `check_layout`).
    """
    check_layout(config, layout.tp_size, layout.pp_size)
    transformer_config = _transformer_config(
        config, layout, dtype, sequence_parallel, recompute_activations
    )
    on_gpu = layout.device.type == "cuda"
    model = HiddenStateGPTModel(
        transformer_config,
        _layer_specs(transformer_config, on_gpu),
        vocab_size=vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
    )
    _mark_tensor_parallel(model)
    return model.to(device=layout.device, dtype=dtype)


_PARTITION_DIM = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}


def _mark_tensor_parallel(model: HiddenStateGPTModel) -> None:
    """Tell the gradient norm which parameters are shards.

    Megatron-Core marks them while it initialises them, which is left out here, since the weights
    come from a checkpoint (0.19 marks some all the same).
    """
    for module in model.modules():
        dim = next((d for kind, d in _PARTITION_DIM.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)
