"""A paged, ragged key/value cache, which Megatron's model takes for its inference context.

Sequences of different lengths are packed into one row of tokens. Each cache *slot* holds one
sequence; its tokens live in pages of `page_tokens` tokens, which are handed out as the sequence
grows, and which sequences that begin alike can share. Student and teacher use one `PageTable` (a
sequence has the same tokens in both) and have a `PagedKVCache` each, since their depths and widths
differ.

Shapes: S sequences of a batch, N packed new tokens, q new tokens of a sequence at most, P pages of
a sequence, k = P * page_tokens cached positions, g key/value heads of this tensor-parallel rank, d
head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trb_megatron.models.rotary import Rotation

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

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
        page_N, offset_N: where each new token is stored: the page and the place in it.
        num_tokens: new tokens without padding; rows beyond are padding.
        page_tokens: tokens of a page.
        max_query_length, max_kv_length: the largest entry, and at least the largest, as numbers.
    """

    positions_N: Tensor
    query_lengths_S: Tensor
    kv_lengths_S: Tensor
    block_table_SP: Tensor
    page_N: Tensor
    offset_N: Tensor
    num_tokens: int
    page_tokens: int
    max_query_length: int
    max_kv_length: int

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have equally many new tokens."""
        return self.query_lengths_S.numel() * self.max_query_length == self.num_tokens

    @cached_property
    def cu_query_lengths(self) -> Tensor:
        """Cumulative new-token counts [S + 1], int32."""
        return _cumulative(self.query_lengths_S)

    @cached_property
    def cu_kv_lengths(self) -> Tensor:
        """Cumulative lengths [S + 1], int32."""
        return _cumulative(self.kv_lengths_S)

    @cached_property
    def place_N(self) -> Tensor:
        """Where each new token is among S * q places, q for each sequence; no host transfer."""
        device = self.query_lengths_S.device
        first_S = torch.arange(self.query_lengths_S.numel(), device=device) * self.max_query_length
        shift_S = first_S - self.cu_query_lengths[:-1]
        return torch.arange(self.num_tokens, device=device) + shift_S.repeat_interleave(
            self.query_lengths_S, output_size=self.num_tokens
        )

    @cached_property
    def visible_S1qk(self) -> Tensor:
        """Which cached positions a new token may attend to: its own and those before."""
        num_positions = self.block_table_SP.shape[1] * self.page_tokens
        position_k = torch.arange(num_positions, device=self.block_table_SP.device)
        step_q = position_k[: self.max_query_length]
        last_Sq = (self.kv_lengths_S - self.query_lengths_S)[:, None] + step_q
        return (position_k <= last_Sq[..., None]).unsqueeze(1)

    @classmethod
    def uniform(
        cls,
        past_S: Tensor,
        num_new: int,
        block_table_SP: Tensor,
        page_tokens: int,
        pad_to_multiple: int = 1,
    ) -> RaggedBatch:
        """`num_new` tokens behind the `past_S` ones of each sequence, without a host transfer."""
        new = torch.arange(num_new, device=past_S.device)
        positions_SG = past_S[:, None] + new
        page_SG = block_table_SP.gather(1, positions_SG // page_tokens)
        return cls(
            positions_N=_pad(positions_SG.flatten(), pad_to_multiple),
            query_lengths_S=torch.full_like(past_S, num_new),
            kv_lengths_S=past_S + num_new,
            block_table_SP=block_table_SP,
            page_N=_pad(page_SG.flatten(), pad_to_multiple),
            offset_N=_pad((positions_SG % page_tokens).flatten(), pad_to_multiple),
            num_tokens=positions_SG.numel(),
            page_tokens=page_tokens,
            max_query_length=num_new,
            max_kv_length=block_table_SP.shape[1] * page_tokens,
        )


class PageTable:
    """Which pages belong to which slot, and who else uses them.

    A page returns to the free ones when its last user releases it; those released last are handed
    out first.

    Args:
        num_slots: sequences in flight at once.
        num_pages: pages of the pool, without the scratch page.
        max_tokens: of one sequence.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        max_tokens: int,
        page_tokens: int,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.max_tokens = max_tokens
        self.device = device
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))
        self._num_users = [0] * (num_pages + 1)
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]
        self._table = np.full((num_slots, self.pages_for(max_tokens)), SCRATCH_PAGE)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens of one sequence take."""
        return -(-num_tokens // self.page_tokens)

    def num_missing(self, slot: int, num_tokens: int) -> int:
        """Pages that a slot lacks for so many tokens."""
        return max(0, self.pages_for(num_tokens) - len(self._pages[slot]))

    def grow(self, slot: int, num_tokens: int) -> None:
        """Hand out the pages that the slot lacks; there must be as many free ones."""
        for _ in range(self.num_missing(slot, num_tokens)):
            self._append(slot, self._take())

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Release the pages behind the first `num_tokens` tokens; 0 empties the slot."""
        kept = self.pages_for(num_tokens)
        self.release(reversed(self._pages[slot][kept:]))
        del self._pages[slot][kept:]
        self._table[slot, kept:] = SCRATCH_PAGE

    def share(self, slot: int, pages: Sequence[int], num_tokens: int) -> tuple[int, int] | None:
        """Let an empty slot begin with the first `num_tokens` tokens of `pages`.

        Whole pages are used in common. The last one, if partly filled, gets a page of its own,
        which the caller has to fill from the result, (from, to), before it releases `from`.
        """
        num_whole, remainder = divmod(num_tokens, self.page_tokens)
        self.retain(pages[:num_whole])
        for page in pages[:num_whole]:
            self._append(slot, page)
        if remainder == 0:
            return None
        self.retain(pages[num_whole : num_whole + 1])
        self._append(slot, self._take())
        return pages[num_whole], self._pages[slot][-1]

    def pages(self, slot: int, num_tokens: int) -> tuple[int, ...]:
        """The pages that hold the slot's first tokens."""
        return tuple(self._pages[slot][: self.pages_for(num_tokens)])

    def retain(self, pages: Iterable[int]) -> None:
        """Become one more user of pages that are in use."""
        for page in pages:
            self._num_users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Stop using pages."""
        for page in pages:
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                self._free.append(page)

    def block_table(self, slots: Sequence[int], num_tokens: int) -> Tensor:
        """Pages [S, P] of the slots, for sequences of at most `num_tokens` tokens."""
        pages_SP = self._table[list(slots), : self.pages_for(num_tokens)]
        return torch.from_numpy(pages_SP).to(self.device, non_blocking=True)

    def ragged_batch(
        self,
        slots: Sequence[int],
        past_lengths: Sequence[int],
        new_lengths: Sequence[int],
        pad_to_multiple: int = 1,
    ) -> RaggedBatch:
        """Describe new tokens, of each sequence another number, for which there are pages."""
        query_S, past_S = torch.tensor(new_lengths), torch.tensor(past_lengths)
        kv_S = past_S + query_S
        num_tokens, max_kv = int(query_S.sum()), int(kv_S.max())
        row_N = torch.repeat_interleave(torch.arange(len(slots)), query_S)
        first_N = (query_S.cumsum(0) - query_S)[row_N]
        positions_N = past_S[row_N] + torch.arange(num_tokens) - first_N
        block_table_SP = torch.from_numpy(self._table[list(slots), : self.pages_for(max_kv)])
        page_N = block_table_SP[row_N, positions_N // self.page_tokens]
        offset_N = positions_N % self.page_tokens
        return RaggedBatch(
            positions_N=_pad(positions_N, pad_to_multiple).to(self.device),
            query_lengths_S=query_S.to(self.device),
            kv_lengths_S=kv_S.to(self.device),
            block_table_SP=block_table_SP.to(self.device),
            page_N=_pad(page_N, pad_to_multiple).to(self.device),
            offset_N=_pad(offset_N, pad_to_multiple).to(self.device),
            num_tokens=num_tokens,
            page_tokens=self.page_tokens,
            max_query_length=max(new_lengths),
            max_kv_length=max_kv,
        )

    def _take(self) -> int:
        page = self._free.pop()
        self._num_users[page] = 1
        return page

    def _append(self, slot: int, page: int) -> None:
        self._table[slot, len(self._pages[slot])] = page
        self._pages[slot].append(page)


class PagedKVCache:
    """Keys and values of one model's layers on this rank.

    Megatron's model takes it for its inference context (it never checks the type) and hands it to
    the layers (`layers.PagedTransformerLayer`). Memory is `kv_bytes_per_token` for each of
    (pages + 1) * page_tokens tokens. A layer's pool is [pages, 2 * g, page_tokens, d], the heads of
    the keys before those of the values: what attention reads of a head lies side by side.

    Args:
        layer_numbers: of the layers on this pipeline stage, as they count in the model.

    Attributes:
        rotation: of the new tokens of the batch that was set last.
    """

    rotation: Rotation

    def __init__(
        self, config: TransformerConfig, layer_numbers: range, page_table: PageTable
    ) -> None:
        groups, head_size = head_shape(config)
        self._pools = torch.zeros(
            len(layer_numbers),
            page_table.num_pages + 1,
            2 * groups,
            page_table.page_tokens,
            head_size,
            dtype=config.params_dtype,
            device=page_table.device,
        )
        self._first_layer = layer_numbers.start
        # Of each layer: what one head keeps of one token, and of a whole page, as rows.
        self._token_rows = self._pools.view(len(layer_numbers), -1, head_size).unbind()
        self._page_rows = self._pools.flatten(1, 2).flatten(2).unbind()
        self._head_2g = torch.arange(2 * groups, device=page_table.device)
        self.max_sequence_length = page_table.max_tokens
        self._batch: RaggedBatch | None = None

    @property
    def batch(self) -> RaggedBatch:
        assert self._batch is not None, "no batch was set before the forward pass"
        return self._batch

    @batch.setter
    def batch(self, batch: RaggedBatch) -> None:
        self._batch, self.rotation = batch, Rotation(batch.positions_N)
        num_heads = len(self._head_2g)
        page_row_N1 = batch.page_N[:, None] * num_heads + self._head_2g
        token_row_NH = page_row_N1 * batch.page_tokens + batch.offset_N[:, None]
        self._written_rows = token_row_NH.flatten()
        page_row_SHP = batch.block_table_SP[:, None] * num_heads + self._head_2g[:, None]
        self._read_rows = page_row_SHP.flatten()
        self._read_shape = (len(page_row_SHP), 2, num_heads // 2, -1, self._pools.shape[-1])

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages, in all layers."""
        self._pools[:, list(targets)] = self._pools[:, list(sources)]

    def append(self, layer: int, keys_N1gd: Tensor, values_N1gd: Tensor) -> None:
        """Store keys and values of the new tokens, in the layer of this number in the model."""
        rows = torch.cat((keys_N1gd, values_N1gd), dim=2).view(-1, keys_N1gd.shape[-1])
        self._token_rows[layer - self._first_layer].index_copy_(0, self._written_rows, rows)

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the batch's sequences in a layer, each [S, g, k, d]."""
        rows = self._page_rows[layer - self._first_layer].index_select(0, self._read_rows)
        keys_Sgkd, values_Sgkd = rows.view(self._read_shape).unbind(1)
        return keys_Sgkd, values_Sgkd

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [pages, page_tokens, g, d].

        Of these views the last dimension alone is contiguous, which is all that flash-attention
        asks for.
        """
        keys, values = self._pools[layer - self._first_layer].transpose(1, 2).chunk(2, dim=2)
        return keys, values

    # What Megatron's model asks of an inference context before it comes to the layers.
    use_flashinfer_fused_rope = False
    num_speculative_tokens = 0

    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self.batch.max_query_length == 1

    @property
    def padding_slice(self) -> slice:
        return slice(self.batch.num_tokens, None)


def head_shape(config: TransformerConfig) -> tuple[int, int]:
    """Key/value heads of each tensor-parallel rank, and their size."""
    assert config.num_query_groups is not None and config.kv_channels is not None
    groups = groups_on_rank(config.num_query_groups, config.tensor_model_parallel_size)
    return groups, config.kv_channels


def groups_on_rank(num_groups: int, tp_size: int) -> int:
    """Query groups whose keys and values each tensor-parallel rank caches.

    Ranks that are more than the groups share them, and each caches the one that it reads.
    """
    return max(1, num_groups // tp_size)


def kv_bytes_per_token(num_layers: int, num_groups: int, head_size: int, itemsize: int) -> int:
    """Bytes of one token's keys and values in the layers of a rank that has so many of the groups.

    `itemsize` is that of the weights' type.
    """
    return 2 * num_layers * num_groups * head_size * itemsize


def _pad(values_N: Tensor, multiple: int) -> Tensor:
    """With zeros at the end, so that the length is a multiple."""
    padding = -len(values_N) % multiple
    return F.pad(values_N, (0, padding)) if padding else values_N


def _cumulative(lengths_S: Tensor) -> Tensor:
    return F.pad(lengths_S.cumsum(0), (1, 0)).int()
