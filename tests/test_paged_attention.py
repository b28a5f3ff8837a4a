"""Paged attention against a computation head by head and token by token."""

import pytest
import torch

from trb_megatron.kv_cache import PageTable
from trb_megatron.paged_attention import paged_attention


@pytest.mark.parametrize("new", [(6, 1, 3), (3, 3, 3), (1, 1, 1)], ids=str)
def test_equals_dense_causal_attention(new: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    heads, groups, size, page_tokens = 4, 2, 8, 4
    table = PageTable(4, 12, 16, page_tokens, torch.device("cpu"))
    slots, past = (2, 0, 3), (0, 5, 9)
    lengths = [old + count for old, count in zip(past, new, strict=True)]
    for slot, length in zip(slots, lengths, strict=True):
        table.grow(slot, length)
    batch = table.ragged_batch(slots, past, new, pad_to_multiple=8)
    # What no sequence wrote must not matter.
    keys = torch.full((table.num_pages + 1, page_tokens, groups, size), 1e4)
    values = torch.full_like(keys, 1e4)
    query = torch.randn(batch.positions_N.numel(), 1, heads, size)
    expected = torch.zeros_like(query)
    row = 0
    for s, (old, count) in enumerate(zip(past, new, strict=True)):
        k, v = torch.randn(2, old + count, groups, size)
        for position in range(old + count):
            page = batch.block_table_SP[s][position // page_tokens]
            keys[page, position % page_tokens] = k[position]
            values[page, position % page_tokens] = v[position]
        for i in range(count):
            visible = old + i + 1
            for head in range(heads):
                group = head // (heads // groups)
                scores = k[:visible, group] @ query[row, 0, head] * 0.3
                expected[row, 0, head] = scores.softmax(0) @ v[:visible, group]
            row += 1
    found = paged_attention(query, keys, values, batch, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[sum(new) :] == 0).all()
