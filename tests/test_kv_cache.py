"""Pages, ragged batches, and paged attention against a dense computation."""

import torch

from trb_megatron.kv_cache import SCRATCH_PAGE, PageTable, paged_attention

CPU = torch.device("cpu")


def test_pages_are_handed_out_on_demand_and_given_back() -> None:
    table = PageTable(num_slots=2, max_tokens=12, page_tokens=4, device=CPU)
    assert table.num_pages == 2 * 3 + 1
    first = table.extend([0], [0], [5])
    assert first.block_table_SP.tolist() == [[1, 2]]
    assert first.cache_index_N.tolist() == [4, 5, 6, 7, 8]
    both = table.extend([0, 1], [5, 0], [1, 2])
    assert both.block_table_SP.tolist() == [[1, 2], [3, SCRATCH_PAGE]]
    assert both.cache_index_N.tolist() == [9, 12, 13]
    assert both.positions_N.tolist() == [5, 0, 1]
    assert (both.max_query_length, both.max_kv_length, both.num_tokens) == (2, 6, 3)
    table.release(0)
    reused = table.extend([1], [2], [6])
    assert reused.block_table_SP.tolist() == [[3, 1]]


def test_every_slot_can_grow_to_its_limit() -> None:
    table = PageTable(num_slots=3, max_tokens=10, page_tokens=4, device=CPU)
    batch = table.extend([0, 1, 2], [0, 0, 0], [10, 10, 10])
    assert batch.cache_index_N.unique().numel() == 30
    assert SCRATCH_PAGE not in batch.block_table_SP


def test_padding_goes_to_the_scratch_page() -> None:
    batch = PageTable(2, 8, 4, CPU).extend([0, 1], [0, 0], [2, 3], pad_to_multiple=4)
    assert batch.num_tokens == 5
    assert batch.cache_index_N[5:].tolist() == [0, 0, 0]  # all in page 0
    assert batch.positions_N[5:].tolist() == [0, 0, 0]


def test_paged_attention_equals_dense_causal_attention() -> None:
    torch.manual_seed(0)
    heads, groups, size, page_tokens = 4, 2, 8, 4
    table = PageTable(num_slots=4, max_tokens=16, page_tokens=page_tokens, device=CPU)
    slots, past, new = [2, 0, 3], [0, 5, 9], [6, 1, 3]
    table.extend(slots, [0, 0, 0], past)
    batch = table.extend(slots, past, new, pad_to_multiple=8)
    # What no sequence wrote must not matter: NaN would spread through a masked product.
    keys = torch.full((table.num_pages, page_tokens, groups, size), 1e4)
    values = torch.full_like(keys, 1e4)
    query = torch.randn(batch.positions_N.numel(), 1, heads, size)
    expected = torch.zeros_like(query)
    row = 0
    for s, (old, count) in enumerate(zip(past, new, strict=True)):
        length = old + count
        k, v = torch.randn(2, length, groups, size)
        pages = batch.block_table_SP[s]
        for position in range(length):
            place = (pages[position // page_tokens], position % page_tokens)
            keys[place], values[place] = k[position], v[position]
        for i in range(count):
            visible = old + i + 1
            for head in range(heads):
                group = head // (heads // groups)
                scores = k[:visible, group] @ query[row, 0, head] * 0.3
                expected[row, 0, head] = scores.softmax(0) @ v[:visible, group]
            row += 1
    cumulative = torch.tensor([0, 6, 7, 10])
    found = paged_attention(
        query, keys, values, cumulative, batch.kv_lengths_S, batch.block_table_SP, 6, 0.3
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[10:] == 0).all()
