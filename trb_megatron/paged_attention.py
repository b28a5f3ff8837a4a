"""Causal attention of new tokens over a paged cache, on any device, from torch alone.

Where flash-attention is installed Megatron's own kernel is used in its place (see
`models.PagedSelfAttention`).

Shapes: S sequences, N packed new tokens, q new tokens of a sequence at most, P pages of a sequence,
k = P * page_tokens cached positions, h heads, g key/value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trb_megatron.kv_cache import RaggedBatch


def paged_attention(
    query_N1hd: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch, softmax_scale: float
) -> Tensor:
    """Attend from packed new tokens to all that came before them, by a masked dense product.

    The i-th of m new tokens of a sequence of length l (new ones included) sees positions up to
    l - m + i. Keys and values are gathered to [S, g, k, d]. Nothing is read back to the host when
    the batch is uniform.

    Args:
        query_N1hd: packed queries; rows beyond the new tokens are padding.
        keys, values: pools [pages, page_tokens, g, d] that hold the new tokens already.

    Returns:
        [N, 1, h, d]; zero for padding rows.
    """
    keys_Sgkd, values_Sgkd = _gather(keys, batch), _gather(values, batch)
    context_Sqhd = F.scaled_dot_product_attention(
        _pad(query_N1hd, batch).transpose(1, 2),
        keys_Sgkd,
        values_Sgkd,
        attn_mask=batch.visible_S1qk,
        scale=softmax_scale,
        enable_gqa=query_N1hd.shape[2] != keys_Sgkd.shape[1],
    ).transpose(1, 2)
    return _pack(context_Sqhd, len(query_N1hd), batch)


def _gather(pool: Tensor, batch: RaggedBatch) -> Tensor:
    """Pages of each sequence in a row, [S, g, k, d]."""
    pages = pool.index_select(0, batch.block_table_SP.flatten())
    return pages.view(len(batch.block_table_SP), -1, *pool.shape[2:]).transpose(1, 2)


def _pad(query_N1hd: Tensor, batch: RaggedBatch) -> Tensor:
    """Packed rows as [S, q, h, d]."""
    new_N1hd = query_N1hd[: batch.num_tokens]
    if batch.is_uniform:
        return new_N1hd.view(-1, batch.max_query_length, *query_N1hd.shape[2:])
    padded_Sqhd = query_N1hd.new_zeros(*batch.is_new_Sq.shape, *query_N1hd.shape[2:])
    padded_Sqhd[batch.is_new_Sq] = new_N1hd[:, 0]
    return padded_Sqhd


def _pack(context_Sqhd: Tensor, num_rows: int, batch: RaggedBatch) -> Tensor:
    """[S, q, h, d] as packed rows [N, 1, h, d]."""
    packed_Nhd = context_Sqhd.flatten(0, 1) if batch.is_uniform else context_Sqhd[batch.is_new_Sq]
    padding = num_rows - batch.num_tokens
    if padding > 0:
        padding_rows = packed_Nhd.new_zeros(padding, *packed_Nhd.shape[1:])
        packed_Nhd = torch.cat([packed_Nhd, padding_rows])
    return packed_Nhd.unsqueeze(1)
