"""Stop ids merged into one, and the gradient of that, against autograd on whole logits."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.behavior.cases import ALIGNMENTS, build_pair
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from trb_megatron.behavior.stop_alignment import (
    StopAlignment,
    align_stop_ids,
    merge_stop_ids_,
    spread_stop_columns,
    spread_stop_gradient_,
)
from trb_megatron.distributed.vocab_parallel import all_gather

NUM_ROWS, NUM_IDS = 5, 32


def test_stop_alignment() -> None:
    alignment = StopAlignment((18, 2), (2, 9))
    assert alignment.stop_id == 18
    assert alignment.removed_ids == (2, 9)
    assert not alignment.is_trivial
    assert StopAlignment((7,), (7,)).is_trivial
    for ids in (((), (1,)), ((1,), ())):
        with pytest.raises(ValueError, match="no end-of-sequence id"):
            StopAlignment(*ids)
    logits_NV, _ = build_pair(1, 1)
    assert align_stop_ids(logits_NV, (7,), StopAlignment((7,), (7,)), tp_group=None) is logits_NV
    with pytest.raises(ValueError, match="150"):
        align_stop_ids(logits_NV, (7,), StopAlignment((7,), (150,)), tp_group=None)


class Case(NamedTuple):
    """One model's logits, and the gradient of the loss with respect to them once merged."""

    alignment: StopAlignment
    own_ids: tuple[int, ...]
    logits_NV: Tensor
    weights_NV: Tensor


def build_cases() -> list[Case]:
    weights_NV, _ = build_pair(1, 1, NUM_ROWS, NUM_IDS, seed=4)
    logits = build_pair(2, 2, NUM_ROWS, NUM_IDS)
    return [
        Case(alignment, own_ids, logits_NV, weights_NV)
        for alignment in ALIGNMENTS
        for own_ids, logits_NV in zip(
            (alignment.student_ids, alignment.teacher_ids), logits, strict=True
        )
    ]


class Aligned(NamedTuple):
    """Aligned logits and the gradient of a weighted sum of them, [N, V]."""

    logits_NV: Tensor
    grad_NV: Tensor


def align_by_definition(case: Case) -> Aligned:
    """By torch operations that autograd differentiates, in float64."""
    logits_NV = case.logits_NV.double().requires_grad_()
    merged_N = logits_NV[:, list(case.own_ids)].logsumexp(-1)
    columns = list(logits_NV.unbind(-1))
    for removed_id in case.alignment.removed_ids:
        columns[removed_id] = torch.full_like(merged_N, -torch.inf)
    columns[case.alignment.stop_id] = merged_N
    aligned_NV = torch.stack(columns, dim=-1)
    finite_NV = torch.where(aligned_NV > -torch.inf, aligned_NV * case.weights_NV, 0.0)
    (grad_NV,) = torch.autograd.grad(finite_NV.sum(), logits_NV)
    return Aligned(aligned_NV.detach(), grad_NV)


def align_on_shards() -> list[Aligned]:
    """Every case on this rank's shard, gathered; the gradient is made as the fused loss makes it.

    A removed id's own gradient is not zero before it is spread, which must not matter.
    """
    group = current_group()
    results = []
    for alignment, own_ids, logits_NV, weights_NV in build_cases():
        shard_NU = vocab_shard(logits_NV, group)
        aligned_NU = align_stop_ids(shard_NU, own_ids, alignment, tp_group=group)
        assert torch.equal(shard_NU, vocab_shard(logits_NV, group))
        shares_NK = merge_stop_ids_(shard_NU, own_ids, alignment, tp_group=group)
        assert torch.equal(shard_NU, aligned_NU)
        grad_NU = vocab_shard(weights_NV, group)
        spread_stop_gradient_(grad_NU, shares_NK, own_ids, alignment, tp_group=group)
        whole = (all_gather(x, group).transpose(0, 1).flatten(1) for x in (aligned_NU, grad_NU))
        results.append(Aligned(*whole))
    return results


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_alignment_and_its_gradient(tp_size: int) -> None:
    expected = [align_by_definition(case) for case in build_cases()]
    for result in on_ranks(align_on_shards, tp_size):
        for found, (expected_NV, expected_grad_NV) in zip(result, expected, strict=True):
            torch.testing.assert_close(found.logits_NV, expected_NV.float())
            torch.testing.assert_close(found.grad_NV, expected_grad_NV.float())


@pytest.mark.parametrize("case", build_cases())
def test_gradient_given_by_columns(case: Case) -> None:
    """Columns of which one may be the stop id; they name no removed id."""
    alignment, own_ids, logits_NV, weights_NV = case
    shares_NK = merge_stop_ids_(logits_NV.clone(), own_ids, alignment, tp_group=None)
    for ids in ([0, alignment.stop_id, 19], [0, 11, 19]):
        ids_NK = torch.tensor(ids).expand(NUM_ROWS, -1)
        grad_NK = weights_NV.gather(-1, ids_NK)
        expected_NV = torch.zeros_like(weights_NV).scatter_(-1, ids_NK, grad_NK)
        spread_stop_gradient_(expected_NV, shares_NK, own_ids, alignment, tp_group=None)
        columns = spread_stop_columns(ids_NK, grad_NK, shares_NK, own_ids, alignment)
        found_NV = torch.zeros_like(weights_NV).scatter_add_(-1, *columns)
        torch.testing.assert_close(found_NV, expected_NV)
