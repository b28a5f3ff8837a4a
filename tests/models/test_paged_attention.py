"""Paged attention over a cache against a computation head by head and token by token."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trb_megatron.models.kv_cache import PagedKVCache, PageTable, RaggedBatch
from trb_megatron.models.paged_attention import paged_attention

HEADS, GROUPS, SIZE = 4, 2, 8
PAGE_TOKENS = 4
LAYER = 2


def make_cache(table: PageTable) -> PagedKVCache:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=SIZE,
    )
    cache = PagedKVCache(config, range(1, 3), table)
    for pool in cache.pools(LAYER):
        pool.fill_(1e4)  # what no sequence wrote must not matter
    return cache


def store(cache: PagedKVCache, batch: RaggedBatch, both_2Ngd: Tensor) -> None:
    """Run the new tokens' keys and values, and anything for padding, into the cache."""
    num_rows = batch.positions_N.numel()
    rows = torch.randn(2, num_rows, 1, GROUPS, 1, SIZE)
    rows[:, : batch.num_tokens, 0, :, 0] = both_2Ngd
    cache.batch = batch
    cache.append(LAYER, *rows)


@pytest.mark.parametrize("new", [(6, 1, 3), (3, 3, 3), (1, 1, 1)], ids=str)
def test_equals_dense_causal_attention(new: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    table = PageTable(4, 12, 16, PAGE_TOKENS, torch.device("cpu"))
    slots, past = (2, 0, 3), (0, 5, 9)
    lengths = [old + count for old, count in zip(past, new, strict=True)]
    for slot, length in zip(slots, lengths, strict=True):
        table.grow(slot, length)
    cache = make_cache(table)
    both = [torch.randn(2, length, GROUPS, SIZE) for length in lengths]
    begun = table.ragged_batch(slots[1:], (0, 0), past[1:], pad_to_multiple=8)
    store(cache, begun, torch.cat([both[s][:, : past[s]] for s in (1, 2)], dim=1))
    batch = table.ragged_batch(slots, past, new, pad_to_multiple=8)
    store(cache, batch, torch.cat([both[s][:, past[s] :] for s in range(3)], dim=1))

    # Flash-attention reads the pages themselves.
    where = batch.page_N[: sum(new)], batch.offset_N[: sum(new)]
    stored = torch.stack([pool[where] for pool in cache.pools(LAYER)])
    assert torch.equal(stored, torch.cat([both[s][:, past[s] :] for s in range(3)], dim=1))

    query = torch.randn(batch.positions_N.numel(), 1, HEADS, SIZE)
    expected = torch.zeros_like(query)
    visible = [old + i + 1 for old, count in zip(past, new, strict=True) for i in range(count)]
    sequence = [s for s, count in enumerate(new) for _ in range(count)]
    for row, (s, count) in enumerate(zip(sequence, visible, strict=True)):
        keys, values = both[s][:, :count]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = keys[:, group] @ query[row, 0, head] * 0.3
            expected[row, 0, head] = scores.softmax(0) @ values[:, group]
    found = paged_attention(query, *cache.gather(LAYER), batch, 0.3)
    torch.testing.assert_close(found, expected.flatten(2), rtol=1e-5, atol=1e-5)
    assert (found[sum(new) :] == 0).all()
