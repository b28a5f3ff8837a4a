"""Megatron's layers where ours differ: norms, products, attention over packed or paged tokens."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from trb_megatron.models.kv_cache import PagedKVCache
from trb_megatron.models.paged_attention import paged_attention
from trb_megatron.models.rotary import Rotation


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


@dataclass
class PackedSequences(PackedSeqParams):
    """Where packed sequences begin and end, and the rotation of their tokens."""

    rotation: Rotation = field(kw_only=True)


class PagedSelfAttention(SelfAttention):
    """Megatron's self-attention for packed sequences, and for tokens with a paged cache."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention of each packed sequence within itself; [T, 1, H], and no bias.

        `rotary_pos_emb` are the angles [max_tokens, 1, 1, d]. A sequence that is not packed takes
        Megatron's own way.
        """
        if packed_seq_params is None:
            return super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        assert rotary_pos_emb is not None
        heads = self._heads(hidden_states, packed_seq_params.rotation, rotary_pos_emb)
        context = self.core_attention(
            *(x.squeeze(1) for x in heads),
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(context.view(len(context), 1, -1))

    def attend(self, hidden_N1H: Tensor, cache: PagedKVCache, angles: Tensor) -> Tensor:
        """Store keys and values of new tokens, and attend to all that the cache holds; [N, 1, H].

        Megatron's own call of flash-attention is used where it can read the pages. `angles` are
        the rotary embedding's, [max_tokens, 1, 1, d].
        """
        query_N1hd, key_N1gd, value_N1gd = self._heads(hidden_N1H, cache.rotation, angles)
        cache.append(self.layer_number, key_N1gd, value_N1gd)
        if flash_attention_version(query_N1hd.device, query_N1hd.dtype) is None:
            keys, values = cache.gather(self.layer_number)
            scale = self.hidden_size_per_attention_head**-0.5
            context = paged_attention(query_N1hd, keys, values, cache.batch, scale)
        else:
            context = self._flash_attention(query_N1hd, cache)
        output, _ = self.linear_proj(context.flatten(2))
        return output

    def _heads(
        self, hidden_N1H: Tensor, rotation: Rotation, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, 1, h, d] and keys [N, 1, g, d], and values [N, 1, g, d]."""
        query_key_N1ghd, value_N1g1d = self._query_key_value(hidden_N1H)
        rotated_N1ghd = rotation(query_key_N1ghd, angles)
        query_N1grd, key_N1g1d = rotated_N1ghd.split((rotated_N1ghd.shape[3] - 1, 1), dim=3)
        return query_N1grd.flatten(2, 3), key_N1g1d.squeeze(3), value_N1g1d.squeeze(3)

    def _query_key_value(self, hidden_N1H: Tensor) -> tuple[Tensor, Tensor]:
        """Before the rotation: each group's queries and then its key [N, 1, g, h / g + 1, d], and
        values [N, 1, g, 1, d]."""
        projected, _ = self.linear_qkv(hidden_N1H)
        groups, head_size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        if self.config.num_query_groups < self.tp_group.size():
            projected = self._heads_of_shared_group(projected)
        heads_N1ghd = projected.view(*projected.shape[:2], groups, -1, head_size)
        query_key, value = heads_N1ghd.split((heads_N1ghd.shape[3] - 1, 1), dim=3)
        if self.config.qk_layernorm:
            query_key = self._norm_heads(query_key)
        return query_key, value

    def _heads_of_shared_group(self, part_N1R: Tensor) -> Tensor:
        """This rank's queries and its group's key and value [N, 1, (h + 2) * d].

        As in Megatron's `get_query_key_value_tensors`: an all-gather over the tensor-parallel group
        of the rows that the ranks have computed, R each, and of them those of this rank's heads.
        """
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        heads, head_size = self.config.num_attention_heads, self.hidden_size_per_attention_head
        groups_N1gX = all_gather_last_dim_from_tensor_parallel_region(
            part_N1R, group=self.tp_group
        ).unflatten(-1, (self.config.num_query_groups, -1))
        group, rank_in_group = divmod(tp_rank, tp_size // self.config.num_query_groups)
        num_features = heads // tp_size * head_size
        group_N1X = groups_N1gX[:, :, group]
        query_N1Y = group_N1X.narrow(-1, rank_in_group * num_features, num_features)
        return torch.cat((query_N1Y, group_N1X[..., -2 * head_size :]), dim=-1)

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
        # Sequences of one length in a row are a batch [B, heads, length, D]. Without that dimension
        # torch takes a kernel that writes all scores into memory.
        runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
        parts = (x.split([math.prod(run) for run in runs]) for x in (query, key, value))
        outputs = []
        for (length, _), *part in zip(runs, *parts, strict=True):
            q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in part)
            context = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale
            )
            outputs.append(context.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs)
