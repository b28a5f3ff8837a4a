"""Ranks that are threads of one process: they find what processes find, and fail as these do."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests import test_golden
from tests.behavior import test_coupling, test_sampling, test_stop_alignment
from tests.distributed import test_vocab_parallel
from tests.local_ranks import current_group, run_locally
from tests.loss import cases as loss_cases
from tests.ranks import run_distributed
from trb_megatron.loss.losses import LOSSES


def evaluate_losses() -> list[loss_cases.Result]:
    """The losses from hidden states, whose gradients are summed over the ranks."""
    return [
        loss_cases.evaluate(
            loss_cases.settings_of(name, alignment=loss_cases.ALIGNMENTS[1]),
            loss_cases.build_layers(),
            ids_N=loss_cases.sampled_ids(),
        )
        for name in LOSSES
    ]


MEASURES: tuple[Callable[[], Any], ...] = (
    test_vocab_parallel.measure,
    test_golden.measure,
    test_stop_alignment.align_on_shards,
    test_sampling.sample_all,
    test_coupling.measure_draws,
    evaluate_losses,
)


def measure_all() -> list[Any]:
    return [measure() for measure in MEASURES]


def test_threads_find_the_bits_of_real_processes() -> None:
    for of_process, of_thread in zip(
        run_distributed(measure_all, 2), run_locally(measure_all, 2), strict=True
    ):
        for one, other in zip(tree_leaves(of_process), tree_leaves(of_thread), strict=True):
            assert type(one) is type(other)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def sum_ranks() -> float:
    """Of the numbers of all ranks in the world, added over the own group."""
    rank = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(rank, group=current_group())
    return float(rank)


def test_each_group_hears_itself_alone() -> None:
    assert run_locally(sum_ranks, 3) == [3.0] * 3
    assert run_locally(sum_ranks, 3, num_groups=2) == [3.0] * 3 + [12.0] * 3


def fail_on_one(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("broken")
    sum_ranks()


def leave_out(rank: int) -> None:
    if dist.get_rank() != rank:
        sum_ranks()


@pytest.mark.parametrize("rank", [0, 3])
def test_the_first_exception_ends_all_ranks(rank: int) -> None:
    hook = sys.excepthook
    with pytest.raises(ValueError, match="broken") as error:
        run_locally(fail_on_one, 4, rank)
    assert f"on rank {rank}:\nTraceback" in error.value.__notes__[0]
    assert sys.excepthook is hook and not dist.is_initialized()
    assert run_locally(sum_ranks, 4) == [6.0] * 4


def test_a_missing_rank_is_noticed() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1, 3\] not done after 0.2 s"):
        run_locally(leave_out, 4, 2, timeout_s=0.2)
    assert run_locally(sum_ranks, 4) == [6.0] * 4
