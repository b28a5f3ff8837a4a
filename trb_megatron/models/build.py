"""Building this rank's part of a configured model, with the layers of `layers`."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from trb_megatron.config.values import FP8Recipe
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.huggingface.config import HFModelConfig, check_layout, layers_of_stages
from trb_megatron.huggingface.families import has_parameter
from trb_megatron.models import fp8
from trb_megatron.models.gpt import HiddenStateGPTModel
from trb_megatron.models.layers import (
    ColumnLinear,
    PackedDotProductAttention,
    PagedSelfAttention,
    PagedTransformerLayer,
    RMSNorm,
    RowLinear,
)


def fp8_platform(device: torch.device) -> fp8.Platform:
    """The hardware and libraries that this process has for FP8."""
    cuda_version = None
    if device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.version.cuda.split(".")[:2]
        cuda_version = int(major), int(minor)
    return fp8.Platform(
        compute_capability=torch.cuda.get_device_capability(device) if cuda_version else None,
        cuda_version=cuda_version,
        transformer_engine=version("transformer-engine") if HAVE_TE else None,
    )


def _pipeline_layout(num_layers: int, pp_size: int) -> str | None:
    """Megatron's layout string where PP doesn't divide the layers."""
    if num_layers % pp_size == 0:
        return None
    stages = [f"t*{len(layers)}" for layers in layers_of_stages(num_layers, pp_size)]
    return "|".join(["E" + stages[0], *stages[1:-1], stages[-1] + "L"])


def _transformer_config(
    config: HFModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute_activations: bool,
    fp8_recipe: FP8Recipe | None,
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
        qk_layernorm=has_parameter(config.family, "q_layernorm.weight"),
        add_qkv_bias=has_parameter(config.family, "linear_qkv.bias"),
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
        # Megatron trains experts under tensor parallelism only with it.
        sequence_parallel=(sequence_parallel or config.num_experts > 0) and layout.tp_size > 1,
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
        **_expert_settings(config, on_gpu),
        **recompute,
        **({} if fp8_recipe is None else fp8.megatron_settings(fp8_recipe)),
    )


def _expert_settings(config: HFModelConfig, on_gpu: bool) -> dict[str, Any]:
    if config.num_experts == 0:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_ffn_hidden_size,
        "moe_router_topk": config.experts_per_token,
        # A softmax over the chosen experts alone is one over all, made to sum to one.
        "moe_router_pre_softmax": not config.normalize_expert_weights,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": HAVE_TE and on_gpu,
    }


def _layer_specs(config: TransformerConfig, on_gpu: bool) -> TransformerBlockSubmodules:
    kinds = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if HAVE_TE and on_gpu:
        from megatron.core.extensions.transformer_engine import TENorm

        spec = get_gpt_layer_with_transformer_engine_spec(**kinds)
        final_norm: Any = TENorm
    else:
        spec = get_gpt_layer_local_spec(**kinds, normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.linear_qkv = ColumnLinear
        spec.submodules.self_attention.submodules.linear_proj = RowLinear
        if config.num_moe_experts is None:
            mlp = spec.submodules.mlp
            # A specification in 0.16, a builder with its arguments in 0.19.
            layers = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
            layers.linear_fc1, layers.linear_fc2 = ColumnLinear, RowLinear
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
            spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
        if config.num_moe_experts is not None:
            # With experts, Transformer Engine's spec names this norm as it is; checkpoints of both
            # must have the same names.
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        final_norm = RMSNorm
    spec.module = PagedTransformerLayer
    spec.submodules.self_attention.module = PagedSelfAttention
    if not (HAVE_TE and on_gpu):
        spec.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
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
    fp8_recipe: FP8Recipe | None = None,
) -> HiddenStateGPTModel:
    """This rank's part of a model, its weights not yet set.

    Args:
        vocab_size: padded vocabulary, a multiple of the tensor-parallel size.
        dtype: type of the parameters and activations, torch.float32 or torch.bfloat16.
        fp8_recipe: of the layers' matrix products; without Transformer Engine they have `dtype`.

    Raises:
        ValueError: the layout does not fit the model (see `check_layout`).
    """
    check_layout([config], layout.tp_size, layout.pp_size)
    transformer_config = _transformer_config(
        config, layout, dtype, sequence_parallel, recompute_activations, fp8_recipe
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
    )
    model.rotary_pos_emb.inv_freq = torch.tensor(config.inv_freq, device=layout.device)
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
