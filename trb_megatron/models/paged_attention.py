"""Causal attention of new tokens over a paged cache, on any device, from torch alone.

Where flash-attention is installed Megatron's own kernel is used in its place (see
`layers.PagedSelfAttention`).

Shapes: S sequences, N packed new tokens, q new tokens of a sequence at most, P pages of a sequence,
k = P * page_tokens cached positions, h heads, g key/value heads, d head size.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from trb_megatron.models.kv_cache import RaggedBatch


def paged_attention(
    query_N1hd: Tensor,
    keys_Sgkd: Tensor,
    values_Sgkd: Tensor,
    batch: RaggedBatch,
    softmax_scale: float,
) -> Tensor:
    """Attend from packed new tokens to all that came before them, by a masked dense product.

    The i-th of m new tokens of a sequence of length l (new ones included) sees positions up to
    l - m + i. Nothing is read back to the host.

    Args:
        query_N1hd: packed queries; rows beyond the new tokens are padding.
        keys_Sgkd, values_Sgkd: of each sequence, the new tokens included.

    Returns:
        [N, 1, h * d]; zero for padding rows.
    """
    query_Shqd = _pad(query_N1hd, batch).transpose(1, 2)
    context_Shqd = F.scaled_dot_product_attention(
        query_Shqd,
        keys_Sgkd,
        values_Sgkd,
        attn_mask=batch.visible_S1qk,
        scale=softmax_scale,
        enable_gqa=query_Shqd.shape[1] != keys_Sgkd.shape[1],
    )
    return _pack(context_Shqd.transpose(1, 2).flatten(2), len(query_N1hd), batch)


def _pad(query_N1hd: Tensor, batch: RaggedBatch) -> Tensor:
    """Packed rows as [S, q, h, d]."""
    new_N1hd = query_N1hd[: batch.num_tokens]
    if batch.is_uniform:
        return new_N1hd.view(-1, batch.max_query_length, *query_N1hd.shape[2:])
    shape_Sq = (batch.query_lengths_S.numel(), batch.max_query_length)
    padded_Nhd = query_N1hd.new_zeros(math.prod(shape_Sq), *query_N1hd.shape[2:])
    padded_Nhd[batch.place_N] = new_N1hd[:, 0]
    return padded_Nhd.unflatten(0, shape_Sq)


def _pack(context_SqH: Tensor, num_rows: int, batch: RaggedBatch) -> Tensor:
    """[S, q, h * d] as packed rows [N, 1, h * d]."""
    packed_NH = context_SqH.flatten(0, 1)
    if not batch.is_uniform:
        packed_NH = packed_NH[batch.place_N]
    padding = num_rows - batch.num_tokens
    if padding > 0:
        packed_NH = F.pad(packed_NH, (0, 0, 0, padding))
    return packed_NH[:, None]
