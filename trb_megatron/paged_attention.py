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


def paged_attention(
    query_N1hd: Tensor,
    keys: Tensor,
    values: Tensor,
    query_lengths_S: Tensor,
    kv_lengths_S: Tensor,
    block_table_SP: Tensor,
    max_query_length: int,
    softmax_scale: float,
) -> Tensor:
    """Attend from packed new tokens to all that came before them, by a masked dense product.

    The i-th of m new tokens of a sequence of length l (new ones included) sees positions up to
    l - m + i. Keys are gathered to [S, g, k, d]. Where all sequences have equally many new tokens,
    S * max_query_length <= N, nothing is read back to the host.

    Args:
        query_N1hd: packed queries; rows beyond the new tokens are padding.
        keys, values: pools [pages, page_tokens, g, d] that hold the new tokens already.

    Returns:
        [N, 1, h, d]; zero for padding rows.
    """
    num_sequences = len(query_lengths_S)
    num_rows = num_sequences * max_query_length
    is_uniform = num_rows <= len(query_N1hd)
    step_q = torch.arange(max_query_length, device=query_N1hd.device)
    if is_uniform:
        query_Sqhd = query_N1hd[:num_rows].view(num_sequences, -1, *query_N1hd.shape[2:])
    else:
        is_new_Sq = step_q < query_lengths_S[:, None]
        num_new = int(query_lengths_S.sum())
        query_Sqhd = query_N1hd.new_zeros(num_sequences, max_query_length, *query_N1hd.shape[2:])
        query_Sqhd[is_new_Sq] = query_N1hd[:num_new, 0]

    keys_Sgkd = keys[block_table_SP].flatten(1, 2).transpose(1, 2)
    values_Sgkd = values[block_table_SP].flatten(1, 2).transpose(1, 2)
    last_visible_Sq = (kv_lengths_S - query_lengths_S)[:, None] + step_q
    position_k = torch.arange(keys_Sgkd.shape[2], device=query_N1hd.device)
    visible_S1qk = (position_k <= last_visible_Sq[..., None]).unsqueeze(1)
    context_Sqhd = F.scaled_dot_product_attention(
        query_Sqhd.transpose(1, 2),
        keys_Sgkd,
        values_Sgkd,
        attn_mask=visible_S1qk,
        scale=softmax_scale,
        enable_gqa=query_Sqhd.shape[2] != keys_Sgkd.shape[1],
    ).transpose(1, 2)
    if is_uniform:
        context_N1hd = context_Sqhd.flatten(0, 1).unsqueeze(1)
        return F.pad(context_N1hd, (0, 0, 0, 0, 0, 0, 0, len(query_N1hd) - num_rows))
    context_N1hd = torch.zeros_like(query_N1hd)
    context_N1hd[:num_new, 0] = context_Sqhd[is_new_Sq]
    return context_N1hd
