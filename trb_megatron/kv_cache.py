"""A paged, ragged key/value cache that Megatron's attention accepts as its inference context.

Sequences of different lengths are packed into one row of tokens. Each cache *slot* holds one
sequence; its tokens live in pages of `page_tokens` tokens that are handed out as the sequence
grows. The pool is allocated whole: every slot can grow to the longest sequence. Student
and teacher share one `PageTable` (a sequence has the same tokens in both) and have a `PagedKVCache`
each, since their depths and widths differ.

Shapes: S sequences of a batch, N packed new tokens, P pages of a sequence, g key/value heads of
this tensor-parallel rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

SCRATCH_PAGE = 0
"""Page that padding tokens write to; no sequence ever owns it."""


@dataclass(frozen=True)
class RaggedBatch:
    """The new tokens of S sequences, packed, and where they and their past live in the cache.

    Attributes:
        positions_N: position of each new token in its sequence.
        query_lengths_S: new tokens of each sequence; they sum to `num_tokens` <= N.
        kv_lengths_S: tokens of each sequence including the new ones.
        block_table_SP: pages of each sequence.
        cache_index_N: page * page_tokens + offset at which each new token is stored.
        num_tokens: new tokens without padding; rows beyond are padding for sequence parallelism.
        max_query_length, max_kv_length: the largest entries, as Python numbers.
    """

    positions_N: Tensor
    query_lengths_S: Tensor
    kv_lengths_S: Tensor
    block_table_SP: Tensor
    cache_index_N: Tensor
    num_tokens: int
    max_query_length: int
    max_kv_length: int


class PageTable:
    """Which pages belong to which slot.

    There are enough pages for every slot to grow to `max_tokens`, so a sequence that was admitted
    always fits. Pages are handed out on demand, those given back last first.
    """

    def __init__(
        self, num_slots: int, max_tokens: int, page_tokens: int, device: torch.device
    ) -> None:
        pages_per_slot = -(-max_tokens // page_tokens)
        self.page_tokens = page_tokens
        self.num_pages = num_slots * pages_per_slot + 1
        self.device = device
        self._free = list(range(self.num_pages - 1, SCRATCH_PAGE, -1))
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]
        self._table = torch.full((num_slots, pages_per_slot), SCRATCH_PAGE, dtype=torch.long)

    def release(self, slot: int) -> None:
        """Give the pages of a finished sequence back."""
        self._free.extend(reversed(self._owned[slot]))
        self._owned[slot].clear()
        self._table[slot] = SCRATCH_PAGE

    def extend(
        self,
        slots: list[int],
        past_lengths: list[int],
        new_lengths: list[int],
        pad_to_multiple: int = 1,
    ) -> RaggedBatch:
        """Make room for `new_lengths` more tokens of each sequence and describe where they go."""
        kv_lengths = [p + n for p, n in zip(past_lengths, new_lengths, strict=True)]
        for slot, length in zip(slots, kv_lengths, strict=True):
            owned = self._owned[slot]
            while len(owned) * self.page_tokens < length:
                self._table[slot, len(owned)] = self._free[-1]
                owned.append(self._free.pop())

        query_S, kv_S = torch.tensor(new_lengths), torch.tensor(kv_lengths)
        num_tokens, max_kv = int(query_S.sum()), max(kv_lengths)
        row_N = torch.repeat_interleave(torch.arange(len(slots)), query_S)
        first_N = (query_S.cumsum(0) - query_S)[row_N]
        positions_N = (kv_S - query_S)[row_N] + torch.arange(num_tokens) - first_N
        block_table_SP = self._table[slots, : -(-max_kv // self.page_tokens)]
        page_N = block_table_SP[row_N, positions_N // self.page_tokens]
        cache_index_N = page_N * self.page_tokens + positions_N % self.page_tokens

        padding = (0, -num_tokens % pad_to_multiple)
        return RaggedBatch(
            positions_N=F.pad(positions_N, padding).to(self.device),
            query_lengths_S=query_S.to(self.device),
            kv_lengths_S=kv_S.to(self.device),
            block_table_SP=block_table_SP.to(self.device),
            cache_index_N=F.pad(cache_index_N, padding).to(self.device),
            num_tokens=num_tokens,
            max_query_length=max(new_lengths),
            max_kv_length=max_kv,
        )


class PagedKVCache:
    """Keys and values of one model's layers on this rank: a Megatron inference context.

    Megatron's attention calls the methods below (it never checks the type). Memory is
    2 * layers * pages * page_tokens * g * d elements of the model's type.
    """

    use_flashinfer_fused_rope = False
    num_speculative_tokens = 0
    materialize_only_last_token_logits = False

    def __init__(
        self, config: TransformerConfig, num_layers: int, page_table: PageTable, max_tokens: int
    ) -> None:
        assert config.num_query_groups is not None and config.kv_channels is not None
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (num_layers, page_table.num_pages * page_table.page_tokens, groups)
        pool = (*shape, config.kv_channels)
        self._keys = torch.zeros(pool, dtype=config.params_dtype, device=page_table.device)
        self._values = torch.zeros_like(self._keys)
        self._page_tokens = page_table.page_tokens
        self.max_sequence_length = max_tokens
        self._batch: RaggedBatch | None = None

    @property
    def batch(self) -> RaggedBatch:
        assert self._batch is not None, "no batch was set before the forward pass"
        return self._batch

    @batch.setter
    def batch(self, batch: RaggedBatch) -> None:
        self._batch = batch

    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self.batch.max_query_length == 1

    @property
    def padding_slice(self) -> slice:
        return slice(self.batch.num_tokens, None)

    def apply_rotary_emb_query(
        self,
        query: Tensor,
        rotary: Tensor,
        config: TransformerConfig,
        cu_seqlens: Tensor | None,
        cp_group: Any,
        **_: Any,
    ) -> Tensor:
        """Rotate [N, 1, heads, d] by each token's position; `rotary` is [max_tokens, 1, 1, d]."""
        return apply_rotary_pos_emb(
            query, rotary[self.batch.positions_N], config=config, cp_group=cp_group
        )

    def apply_rotary_emb_key(
        self, key: Tensor, rotary: Tensor, config: TransformerConfig, cp_group: Any, **_: Any
    ) -> Tensor:
        """Rotate [N, 1, g, d] by the position of each token."""
        return self.apply_rotary_emb_query(key, rotary, config, None, cp_group)

    def append_key_value_cache(self, layer: int, key: Tensor, value: Tensor, **_: Any) -> None:
        """Store [N, 1, g, d] of the new tokens; layers count from 1 on this pipeline stage."""
        index_N = self.batch.cache_index_N
        self._keys[layer - 1].index_copy_(0, index_N, key.squeeze(1))
        self._values[layer - 1].index_copy_(0, index_N, value.squeeze(1))

    def key_value_cache(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pools [pages, page_tokens, g, d] of a layer, and the block table."""
        paged = (-1, self._page_tokens)
        keys, values = self._keys[layer - 1], self._values[layer - 1]
        return keys.unflatten(0, paged), values.unflatten(0, paged), self.batch.block_table_SP

    def cu_query_lengths(self) -> tuple[Tensor, int]:
        """Cumulative new-token counts [S + 1] and the largest count."""
        return _cumulative(self.batch.query_lengths_S), self.batch.max_query_length

    def cu_kv_lengths(self) -> tuple[Tensor, Tensor, int]:
        """Cumulative lengths [S + 1], lengths [S] and the largest length."""
        kv_S = self.batch.kv_lengths_S
        return _cumulative(kv_S), kv_S, self.batch.max_kv_length


def _cumulative(lengths_S: Tensor) -> Tensor:
    return F.pad(lengths_S.cumsum(0), (1, 0))


def paged_attention(
    query_N1hd: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_query_lengths: Tensor,
    kv_lengths_S: Tensor,
    block_table_SP: Tensor,
    max_query_length: int,
    softmax_scale: float,
) -> Tensor:
    """Causal attention of packed new tokens over each sequence's cached tokens, on any device.

    The i-th of m new tokens of a sequence of length l (new ones included) sees positions up to
    l - m + i. Queries are padded to [S, max_query_length] and keys gathered to [S, P *
    page_tokens].

    Args:
        query_N1hd: packed queries; rows beyond the last cumulative length are padding.
        keys, values: pools [pages, page_tokens, g, d] that hold the new tokens already.

    Returns:
        [N, 1, h, d]; zero for padding rows.
    """
    query_lengths_S = cu_query_lengths.diff()
    num_tokens, num_sequences = int(cu_query_lengths[-1]), query_lengths_S.numel()
    keys_Sgkd = keys[block_table_SP].flatten(1, 2).transpose(1, 2)
    values_Sgkd = values[block_table_SP].flatten(1, 2).transpose(1, 2)

    step_q = torch.arange(max_query_length, device=query_N1hd.device)
    if max_query_length == 1:
        query_Sqhd = query_N1hd[:num_tokens]
    else:
        is_new_Sq = step_q < query_lengths_S[:, None]
        query_Sqhd = query_N1hd.new_zeros(num_sequences, max_query_length, *query_N1hd.shape[2:])
        query_Sqhd[is_new_Sq] = query_N1hd[:num_tokens, 0]

    last_visible_Sq = (kv_lengths_S - query_lengths_S)[:, None] + step_q
    position_k = torch.arange(keys_Sgkd.shape[2], device=query_N1hd.device)
    visible_S1qk = (position_k <= last_visible_Sq[..., None]).unsqueeze(1)
    context_Shqd = F.scaled_dot_product_attention(
        query_Sqhd.transpose(1, 2),
        keys_Sgkd,
        values_Sgkd,
        attn_mask=visible_S1qk,
        scale=softmax_scale,
        enable_gqa=query_Sqhd.shape[2] != keys_Sgkd.shape[1],
    )
    context_Sqhd = context_Shqd.transpose(1, 2)
    context_N1hd = torch.zeros_like(query_N1hd)
    context_N1hd[:num_tokens, 0] = (
        context_Sqhd[:, 0] if max_query_length == 1 else context_Sqhd[is_new_Sq]
    )
    return context_N1hd
