"""Pages: handed out on demand, shared, given back; and the batches that say where tokens go."""

import torch

from trb_megatron.models.kv_cache import SCRATCH_PAGE, PageTable, RaggedBatch

CPU = torch.device("cpu")


def make_table(num_slots: int = 4, num_pages: int = 8, page_tokens: int = 4) -> PageTable:
    return PageTable(num_slots, num_pages, max_tokens=16, page_tokens=page_tokens, device=CPU)


def test_pages_are_handed_out_on_demand_and_given_back() -> None:
    table = make_table(num_slots=2, num_pages=3)
    assert table.num_missing(0, 5) == 2
    table.grow(0, 5)
    assert table.num_missing(0, 8) == 0 and table.num_free == 1
    table.grow(1, 2)
    assert table.block_table([0, 1], 5).tolist() == [[1, 2], [3, SCRATCH_PAGE]]
    table.truncate(0, 4)
    assert table.num_free == 1
    table.grow(1, 8)
    assert table.block_table([0, 1], 8).tolist() == [[1, SCRATCH_PAGE], [3, 2]]
    table.truncate(0, 0)
    table.truncate(1, 0)
    assert table.num_free == 3


def test_shared_pages_are_free_after_their_last_user() -> None:
    table = make_table()
    table.grow(0, 11)
    kept = table.pages(0, 9)
    assert kept == (1, 2, 3)
    table.retain(kept)
    copy = table.share(1, kept, 9)
    # Two whole pages in common, and one of its own for the ninth token.
    assert copy == (3, 4)
    assert table.block_table([0, 1], 12).tolist() == [[1, 2, 3], [1, 2, 4]]
    table.release([copy[0]])
    table.truncate(0, 0)
    assert table.num_free == 8 - 4
    table.release(kept)
    assert table.num_free == 8 - 3  # slot 1 still has its pages
    table.truncate(1, 0)
    assert table.num_free == 8


def test_whole_pages_are_shared_without_a_copy() -> None:
    table = make_table()
    table.grow(0, 8)
    assert table.share(1, table.pages(0, 8), 8) is None
    assert table.block_table([0, 1], 8).tolist() == [[1, 2], [1, 2]]


def test_ragged_batch_says_where_tokens_go() -> None:
    table = make_table()
    table.grow(2, 6)
    table.grow(0, 2)
    batch = table.ragged_batch([2, 0], [5, 0], [1, 2], pad_to_multiple=4)
    assert batch.positions_N.tolist() == [5, 0, 1, 0]
    assert batch.page_N.tolist() == [2, 3, 3, SCRATCH_PAGE]  # the last is padding
    assert batch.offset_N.tolist() == [1, 0, 1, 0]
    assert batch.kv_lengths_S.tolist() == [6, 2]
    assert (batch.num_tokens, batch.max_query_length, batch.max_kv_length) == (3, 2, 6)
    assert not batch.is_uniform
    assert batch.cu_query_lengths.tolist() == [0, 1, 3]
    assert batch.cu_kv_lengths.tolist() == [0, 6, 8]


def test_uniform_batch_equals_the_ragged_one() -> None:
    table = make_table()
    for slot, length in ((3, 9), (1, 5)):
        table.grow(slot, length)
    ragged = table.ragged_batch([3, 1], [6, 2], [3, 3], pad_to_multiple=4)
    uniform = RaggedBatch.uniform(
        torch.tensor([6, 2]), 3, table.block_table([3, 1], 9), page_tokens=4, pad_to_multiple=4
    )
    tensors = "positions_N query_lengths_S kv_lengths_S block_table_SP page_N offset_N"
    for name in tensors.split():
        assert torch.equal(getattr(ragged, name), getattr(uniform, name)), name
    assert ragged.is_uniform and uniform.is_uniform
    assert ragged.num_tokens == uniform.num_tokens == 6
    assert ragged.max_query_length == uniform.max_query_length == 3
    assert uniform.max_kv_length >= ragged.max_kv_length
