"""Vocabulary-shard maths against dense torch, at TP 1 to 16, with ties, -inf and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import ShardWidthGuard, vocab_shard
from trb_megatron.distributed.vocab_parallel import (
    all_gather,
    gather_at,
    mask_invalid,
    softmax,
    topk,
    vocab_range,
)

NUM_ROWS, NUM_VALID, TOP_K = 40, 97, 30


def build_logits() -> Tensor:
    """Rows with many ties, removed ids, and mass in the first or last shard alone."""
    generator = torch.Generator().manual_seed(1)
    logits_NV = torch.randint(-3, 4, (NUM_ROWS, NUM_VALID), generator=generator).float()
    logits_NV[:, [0, 5, 60]] = -torch.inf
    logits_NV[3:5, :90] = -1e4
    logits_NV[5, 10:] = -1e4
    return logits_NV


def measure() -> dict[str, Any]:
    """Everything on this rank's shard, gathered where it is sharded."""
    group = current_group()
    shard_NU = mask_invalid(vocab_shard(build_logits(), group), NUM_VALID, group)
    logprobs_NU = softmax(shard_NU, tp_group=group).logprobs()
    values_NK, ids_NK = topk(shard_NU, TOP_K, tp_group=group)
    return {
        "logprobs": all_gather(logprobs_NU, group).transpose(0, 1).flatten(1)[:, :NUM_VALID],
        "values": values_NK,
        "ids": ids_NK,
        "gathered": gather_at(shard_NU, ids_NK, tp_group=group),
        "gathered_row": gather_at(shard_NU, ids_NK[:, 0], tp_group=group),
    }


@pytest.fixture(scope="module", params=TP_SIZES)
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(measure, request.param)


def test_replicated_results_are_bit_identical(results: list[dict[str, Any]]) -> None:
    for other in results[1:]:
        for key in results[0]:
            assert torch.equal(results[0][key], other[key]), key


def find_range() -> tuple[int, int]:
    return vocab_range(10, current_group())


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_shards_follow_each_other(tp_size: int) -> None:
    ranges = on_ranks(find_range, tp_size)
    num_groups = len(ranges) // tp_size
    assert ranges == [(10 * rank, 10 * rank + 10) for rank in range(tp_size)] * num_groups


def test_log_softmax(results: list[dict[str, Any]]) -> None:
    expected_NV = build_logits().double().log_softmax(-1)
    torch.testing.assert_close(results[0]["logprobs"].double(), expected_NV, rtol=1e-6, atol=1e-6)


def test_topk_breaks_ties_by_id(results: list[dict[str, Any]]) -> None:
    rows = build_logits().tolist()
    expected = [sorted(range(NUM_VALID), key=lambda i: (-row[i], i))[:TOP_K] for row in rows]
    assert results[0]["ids"].tolist() == expected
    expected_NK = build_logits().gather(-1, torch.tensor(expected))
    assert torch.equal(results[0]["values"], expected_NK.double())


@pytest.mark.parametrize("num_columns", [700, 64 * 50, 64 * 50 + 13])
def test_topk_of_a_large_vocabulary(num_columns: int) -> None:
    """Found by segments where there are many; few values, so that ties cross segments."""
    generator = torch.Generator().manual_seed(4)
    for num_values in (2, 40, 600, 10**6):
        logits_NV = torch.randint(num_values, (20, num_columns), generator=generator).float()
        logits_NV[:3, 5 * num_columns // 7 :] = -torch.inf
        expected_NK = logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :7]
        values_NK, ids_NK = topk(logits_NV, 7, tp_group=None)
        assert torch.equal(ids_NK, expected_NK)
        assert torch.equal(values_NK, logits_NV.gather(-1, expected_NK).double())


def test_gather_at(results: list[dict[str, Any]]) -> None:
    expected_NK = build_logits().gather(-1, results[0]["ids"])
    assert torch.equal(results[0]["gathered"], expected_NK)
    assert torch.equal(results[0]["gathered_row"], expected_NK[:, 0])


def test_mask_invalid_upcasts_and_leaves_its_input() -> None:
    logits_NU = torch.full((2, 6), float("nan"), dtype=torch.bfloat16)
    logits_NU[:, :4] = 1
    masked_NU = mask_invalid(logits_NU, 4, None)
    assert masked_NU.dtype == torch.float32
    assert masked_NU[0].tolist() == [1, 1, 1, 1, -torch.inf, -torch.inf]
    assert logits_NU[:, 4:].isnan().all()
    for num_valid in (0, 7):
        with pytest.raises(ValueError, match="num_valid"):
            mask_invalid(logits_NU, num_valid, None)


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no id")]
)
def test_bad_rows_are_named(value: float, message: str) -> None:
    logits_NU = torch.zeros(3, 5)
    logits_NU[2] = value
    with pytest.raises(ValueError, match=f"{message}.* row 2"):
        softmax(logits_NU, tp_group=None)


def test_topk_refuses_more_than_exist() -> None:
    logits_NU = torch.zeros(3, 5)
    logits_NU[1, 3:] = -torch.inf
    for k in (0, 4, 6):
        with pytest.raises(ValueError, match="top_k"):
            topk(logits_NU, k, tp_group=None)


def test_width_guard_sees_a_gathered_vocabulary() -> None:
    shard_NU = torch.zeros(4, 8)
    with ShardWidthGuard(shard_NU):
        shard_NU.exp()
    for widen in (lambda x: torch.cat((x, x), -1), lambda x: torch.stack((x, x))):
        with pytest.raises(AssertionError, match="exceeds the shard"), ShardWidthGuard(shard_NU):
            widen(shard_NU)
