"""Student and teacher as Megatron-Core GPT models: this rank's part of a configured model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
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
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from trb_megatron import fp8
from trb_megatron.config import FP8Recipe
from trb_megatron.distributed import ParallelLayout
from trb_megatron.hf_config import HFModelConfig, check_layout, layers_of_stages
from trb_megatron.kv_cache import PagedKVCache
from trb_megatron.paged_attention import paged_attention
from trb_megatron.param_mapping import has_parameter


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


class ColumnLinear(ColumnParallelLinear):
    """A column-parallel layer that is a plain product where no gradient is wanted.

    Megatron's own forward prepares the backward all the same: 40 to 60 us of Python per call, half
    of a small model's decoding step.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The product with this rank's rows, and the bias where it is added later."""
        if torch.is_grad_enabled() or self.sequence_parallel or weight is not None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.skip_bias_add:
            return F.linear(input_, self.weight), self.bias
        return F.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """A row-parallel layer that is a product and a sum where no gradient is wanted.

    See `ColumnLinear`. The sum is an all-reduce over the tensor-parallel group.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product with this rank's columns, summed over the ranks."""
        if torch.is_grad_enabled() or self.sequence_parallel or self.bias is not None:
            return super().forward(input_)
        output = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        return output, None


# The router compares this with None, but 0.16 leaves it undefined without Transformer Engine.
if not HAVE_TE:
    moe_utils.te_general_gemm = None


class PagedTransformerLayer(TransformerLayer):
    """Megatron's dense or expert layer, pre-norm and without dropout, over a paged cache.

    Without a cache it is Megatron's own. With one it is the same computation in fewer steps:
    Megatron's branches for the features that these models lack cost a fifth of a decoding step.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron looks for a CUDA graph of the layer here; `decode_graphs` captures models."""
        return torch.nn.Module.__call__(self, *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        inference_context: PagedKVCache | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [N, 1, H] (or [N / tp, 1, H]) after the layer, and no context."""
        if inference_context is None:
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        assert rotary_pos_emb is not None
        attended = self.self_attention.attend(
            self.input_layernorm(hidden_states), inference_context, rotary_pos_emb
        )
        hidden_states = hidden_states + attended
        return hidden_states + self._feed_forward(self.pre_mlp_layernorm(hidden_states)), None

    def _feed_forward(self, normed_N1H: Tensor) -> Tensor:
        if self.config.num_moe_experts is not None:
            return self.mlp(normed_N1H)[0]
        gate, up = self.mlp.linear_fc1(normed_N1H)[0].chunk(2, dim=-1)
        return self.mlp.linear_fc2(F.silu(gate) * up)[0]


class PagedSelfAttention(SelfAttention):
    """Megatron's self-attention, with another way in for tokens whose past is in a paged cache."""

    def attend(self, hidden_N1H: Tensor, cache: PagedKVCache, angles: Tensor) -> Tensor:
        """Store keys and values of new tokens, and attend to all that the cache holds; [N, 1, H].

        Megatron's own call of flash-attention is used where it can read the pages. `angles` are
        the rotary embedding's, [max_tokens, 1, 1, d].
        """
        query_key_N1ghd, value_N1g1d = self._query_key_value(hidden_N1H)
        rotated_N1ghd = cache.rotate(query_key_N1ghd, angles)
        query_N1grd, key_N1g1d = rotated_N1ghd.split((rotated_N1ghd.shape[3] - 1, 1), dim=3)
        cache.append(self.layer_number, key_N1g1d, value_N1g1d)
        query_N1hd = query_N1grd.flatten(2, 3)
        if flash_attention_version(query_N1hd.device, query_N1hd.dtype) is None:
            keys, values = cache.gather(self.layer_number)
            scale = self.hidden_size_per_attention_head**-0.5
            context = paged_attention(query_N1hd, keys, values, cache.batch, scale)
        else:
            context = self._flash_attention(query_N1hd, cache)
        output, _ = self.linear_proj(context.flatten(2))
        return output

    def _query_key_value(self, hidden_N1H: Tensor) -> tuple[Tensor, Tensor]:
        """Before the rotation: each group's queries and then its key [N, 1, g, h / g + 1, d], and
        values [N, 1, g, 1, d]."""
        projected, _ = self.linear_qkv(hidden_N1H)
        groups, head_size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads_N1ghd = projected.view(*projected.shape[:2], groups, -1, head_size)
        query_key, value = heads_N1ghd.split((heads_N1ghd.shape[3] - 1, 1), dim=3)
        if self.config.qk_layernorm:
            query_key = self._norm_heads(query_key)
        return query_key, value

    def _norm_heads(self, query_key_N1ghd: Tensor) -> Tensor:
        """The RMS norms of queries and keys in one, rounded once at the end like each of them."""
        num_queries, head_size = query_key_N1ghd.shape[3] - 1, query_key_N1ghd.shape[4]
        query_weight, key_weight = self.q_layernorm.weight, self.k_layernorm.weight
        weight_hd = torch.cat((query_weight.expand(num_queries, -1), key_weight[None]))
        normed = F.rms_norm(
            query_key_N1ghd.float(), (head_size,), eps=self.config.layernorm_epsilon
        )
        return (normed * weight_hd).to(query_key_N1ghd.dtype)

    def _flash_attention(self, query_N1hd: Tensor, cache: PagedKVCache) -> Tensor:
        """By Megatron's own call of flash-attention, which reads the pages; [N, 1, h, d]."""
        keys, values = cache.pools(self.layer_number)
        batch = cache.batch
        context_N1hd = self.flash_decode_and_prefill(
            query_N1hd[: batch.num_tokens],
            keys,
            values,
            batch.max_query_length,
            batch.max_kv_length,
            batch.cu_query_lengths,
            batch.cu_kv_lengths,
            batch.kv_lengths_S.int(),
            batch.block_table_SP.int(),
            batch.max_query_length == 1,
        )
        # Zeros, since one scale of FP8 may serve all rows.
        num_filled = len(query_N1hd) - batch.num_tokens
        return F.pad(context_N1hd, (0, 0, 0, 0, 0, 0, 0, num_filled))


def flash_attention_version(device: torch.device, dtype: torch.dtype) -> int | None:
    """The flash-attention that Megatron would read a paged cache with: 3, 2, or None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if megatron_attention.HAVE_FA3:
        return 3
    return 2 if importlib.util.find_spec("flash_attn") is not None else None


class PackedDotProductAttention(DotProductAttention):
    """Megatron's local attention that also takes packed sequences, like Transformer Engine's."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention of each sequence within itself.

        With packed sequences: query [T, heads, D], key and value [T, groups, D], result
        [T, heads * D]; without: as in Megatron.
        """
        if packed_seq_params is None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        heads_per_group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
        # [heads, T, D] of each sequence
        queries, keys, values = (
            x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)
        )
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)


class HiddenStateGPTModel(GPTModel):
    """A GPT model whose forward ends at the final hidden states; `project` makes the logits.

    Keeping the two apart lets a loss walk the vocabulary projection in pieces, so that no
    [tokens, vocabulary] tensor of a whole batch exists.

    Attributes:
        token_multiple: the number of tokens of a forward pass must be a multiple of it.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.token_multiple = self.num_sequence_shards * (fp8.MULTIPLE if config.fp8 else 1)

    @property
    def num_sequence_shards(self) -> int:
        """Ranks that the tokens between the layers are cut over, for sequence parallelism."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    @property
    def fp8_copy_bytes(self) -> int:
        """Memory of the FP8 copies of the layers' weights, which the first pass makes."""
        if self.config.fp8 is None:
            return 0
        return sum(param.numel() for param in self.decoder.parameters() if param.dim() > 1)

    @contextmanager
    def in_inference(self) -> Iterator[None]:
        """Evaluation mode, with the weights as they are now; for passes with a cache.

        Transformer Engine keeps FP8 copies of the weights until it is told to renew them, which
        Megatron's schedules do. With delayed scaling the products are bf16 (see `fp8`).
        """
        was_training, fp8_format = self.training, self.config.fp8
        self.eval()
        self.set_is_first_microbatch()
        if self.config.fp8_recipe == "delayed":
            self.config.fp8 = None
        try:
            yield
        finally:
            self.train(was_training)
            self.config.fp8 = fp8_format

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description of the parameters for a checkpoint, the same for any precision.

        Without Transformer Engine's extra states. They are pickled Python objects, empty but for
        delayed scaling, whose histories begin anew in a resumed run.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "_extra_state" not in name}

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def embed(self, tokens_1N: Tensor) -> Tensor | None:
        """Embeddings [N, 1, H] by a mere lookup where that is all; None leaves them to Megatron.

        Without tensor parallelism Megatron's two autograd functions around the lookup do nothing
        but take time.
        """
        if not self.pre_process or self.config.tensor_model_parallel_size > 1:
            return None
        return F.embedding(tokens_1N.T, self.embedding.word_embeddings.weight)

    def gather_hidden(self, hidden: Tensor) -> Tensor:
        """[T, B, H] of the whole sequence from the last stage's output.

        With sequence parallelism an all-gather over the tensor-parallel group of [T/tp, B, H]; its
        backward takes this rank's part, since the fused loss (or `project`) has summed the gradient
        already.
        """
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )

    @property
    def output_weight(self) -> Any:
        """This rank's rows [U, H] of the output weight, tied or not; on the last stage.

        A parameter on which Megatron's data parallelism hangs a gradient buffer, `main_grad`.
        """
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def project(self, hidden: Tensor) -> Tensor:
        """Vocabulary-parallel logits [..., U] of gathered hidden states [..., H], in their type.

        Differentiable: the gradient of the replicated `hidden` is all-reduced over the
        tensor-parallel group, that of the weight shard is local.
        """
        if not torch.is_grad_enabled():
            return F.linear(hidden, self.output_weight)
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            self.output_weight,
            None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def common_token_multiple(models: Iterable[HiddenStateGPTModel | None]) -> int:
    """What the number of tokens of passes must be a multiple of that all these models make."""
    return math.lcm(*(model.token_multiple for model in models if model is not None))


def fp8_platform(device: torch.device) -> fp8.Platform:
    """What this process has for FP8."""
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
            # shall have the same names.
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
    check_layout(config, layout.tp_size, layout.pp_size)
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
