"""What the solver costs: passes over the logits of a row, rows per collective, memory."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.behavior.cases import (
    BUDGETS,
    FAMILIES,
    SPIKES,
    assert_solved,
    build_family,
    build_pair,
    build_spikes,
)
from tests.test_golden import load
from trb_megatron.behavior import moments
from trb_megatron.behavior.solver import Behavior, solve_behavior
from trb_megatron.distributed import vocab_parallel
from trb_megatron.distributed.vocab_parallel import all_gather


@dataclasses.dataclass
class Work:
    """What calls of the solver cost: passes over the logits of each row, rows per collective."""

    passes: list[Tensor] = dataclasses.field(default_factory=list)
    rows_per_collective: list[int] = dataclasses.field(default_factory=list)

    def solve(self, student_NV: Tensor, teacher_NV: Tensor, budget: float | Tensor) -> Behavior:
        self.passes.append(torch.zeros(len(student_NV), dtype=torch.long))
        self.rows_per_collective.clear()
        behavior = solve_behavior(student_NV, teacher_NV, budget)
        behavior.logprobs()
        return behavior


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Counts at the two functions that read logits, and at the collective.

    `test_nothing_else_reads_the_logits` says that there are no others.
    """
    work = Work()
    of_block, load = moments.FirstPartials.of_block, moments.Block.load

    def count_first(student_NU: Tensor, teacher_NU: Tensor) -> Tensor:
        width = student_NU.shape[-1]
        start = student_NU.storage_offset() // width
        work.passes[-1][start : start + len(student_NU)] += 1
        return of_block(student_NU, teacher_NU)

    def count_later(pair: moments.Pair, rows_M: Tensor, dtype: torch.dtype) -> moments.Block:
        work.passes[-1][rows_M] += 1
        return load(pair, rows_M, dtype)

    def count_collective(partial: Tensor, tp_group: Any) -> Tensor:
        work.rows_per_collective.append(len(partial))
        return all_gather(partial, tp_group)

    monkeypatch.setattr(moments.FirstPartials, "of_block", count_first)
    monkeypatch.setattr(moments.Block, "load", count_later)
    monkeypatch.setattr(moments, "all_gather", count_collective)
    return work


class ReadCounter(TorchDispatchMode):
    """Counts the operations that read each row of a contiguous tensor, views apart."""

    def __init__(self, watched_NV: Tensor) -> None:
        super().__init__()
        self.watched_NV = watched_NV
        self.reads_N = torch.zeros(len(watched_NV), dtype=torch.long)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            if not self._is_watched(value) or self._is_watched(result):
                continue
            if func is torch.ops.aten.index_select.default:
                self.reads_N[args[2]] += 1
            else:
                start = value.storage_offset() // self.watched_NV.shape[-1]
                self.reads_N[start : start + len(value)] += 1
        return result

    def _is_watched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (
            value.untyped_storage().data_ptr() == self.watched_NV.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("model", [0, 1])
def test_nothing_else_reads_the_logits(model: int, work: Work) -> None:
    logits = build_family("scale_30")
    with ReadCounter(logits[model]) as counter:
        work.passes.append(torch.zeros(16, dtype=torch.long))
        solve_behavior(*logits, torch.tensor(BUDGETS))
    # The first pass finds the maximum of a block before it subtracts it.
    assert torch.equal(counter.reads_N, work.passes[0] + 1)


def test_random_cases_need_few_passes(work: Work) -> None:
    generator = torch.Generator().manual_seed(5)
    num_open = 0
    for _ in range(300):
        size = int(50 * 400 ** torch.rand((), generator=generator))
        scale = (1, 3, 6)[int(torch.randint(3, (), generator=generator))]
        student_NV, other_NV = (scale * torch.randn(10, size, generator=generator) for _ in "ab")
        is_near = torch.rand((), generator=generator) < 0.5
        teacher_NV = student_NV + other_NV / 2 if is_near else other_NV
        budget_N = 1e-4 * 500 ** torch.rand(10, generator=generator, dtype=torch.float64)
        blend_coef_N = work.solve(student_NV, teacher_NV, budget_N).blend_coef
        assert len(work.rows_per_collective) <= 8
        assert_solved(student_NV, teacher_NV, budget_N, blend_coef_N)
        num_open += int((blend_coef_N < 1).sum())
    passes_N = torch.cat(work.passes)
    assert num_open > 2900
    assert passes_N.max() <= 5
    assert passes_N.double().mean() < 2.1


@pytest.mark.parametrize("height", SPIKES)
def test_nearly_deterministic_rows_need_at_most_eight_passes(height: float, work: Work) -> None:
    budget_N = torch.tensor(BUDGETS, dtype=torch.float64)
    for seed in range(3):
        for student_NV, teacher_NV in build_spikes(height, seed):
            blend_coef_N = work.solve(student_NV, teacher_NV, budget_N).blend_coef
            assert len(work.rows_per_collective) <= 8
            assert_solved(student_NV, teacher_NV, budget_N, blend_coef_N)
    passes_N = torch.cat(work.passes)
    assert passes_N.max() <= 8
    assert passes_N.double().mean() < 2.6


def test_golden_vectors_need_few_passes(work: Work) -> None:
    cases, golden = load("blend")
    for case in cases:
        i, num_valid = case["case"], case["vocab"]
        student_NV, teacher_NV = (
            golden[f"{i}_{model}_logits"][:, :num_valid].float().contiguous()
            for model in ("student", "teacher")
        )
        work.solve(student_NV, teacher_NV, golden[f"{i}_kl_budget"])
        assert len(work.rows_per_collective) <= 8
    passes_N = torch.cat(work.passes)
    assert passes_N.max() <= 8
    assert passes_N.double().mean() < 4


@pytest.mark.parametrize("name", FAMILIES)
def test_settled_rows_cost_nothing(name: str, work: Work) -> None:
    student_NV, teacher_NV = build_family(name)
    work.solve(student_NV, teacher_NV, torch.tensor(BUDGETS))
    assert len(work.rows_per_collective) <= 8
    assert work.passes[0].max() <= 8
    # Later rounds carry the rows that are not settled, and those only.
    open_rows = [int((work.passes[0] > i).sum()) for i in range(int(work.passes[0].max()))]
    assert work.rows_per_collective == open_rows
    work.solve(student_NV, teacher_NV, torch.tensor([0.0, 1e9] * 8))
    assert work.rows_per_collective == [16]
    assert (work.passes[1] == 1).all()


class LiveBytes(TorchDispatchMode):
    """The most bytes of storage alive at one time of those that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {
            value.untyped_storage().data_ptr()
            for value in tree_leaves((args, kwargs))
            if isinstance(value, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not any(value is leaf for leaf in tree_leaves(args)):
                storage = value.untyped_storage()
                key = storage.data_ptr()
                if key in known and key not in self.sizes:
                    continue
                self.sizes[key] = storage.nbytes()
                self.owners[key] = self.owners.get(key, 0) + 1
                weakref.finalize(value, self._release, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def _release(self, key: int) -> None:
        self.owners[key] -= 1
        if self.owners[key] == 0:
            del self.owners[key], self.sizes[key]


def test_memory_is_a_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vocab_parallel, moments):
        monkeypatch.setattr(module, "rows_per_block", lambda logits_NU: 2)
    student_NV, teacher_NV = build_pair(3, 4, num_rows=64, size=8192)
    with LiveBytes() as live:
        behavior = solve_behavior(student_NV, teacher_NV, 0.01)
    assert (behavior.blend_coef < 1).all()
    assert 4 * 2 * 8192 * 3 < live.peak < 0.5 * student_NV.nbytes
    with LiveBytes() as live:
        behavior.logprobs()
    assert live.peak < 1.5 * student_NV.nbytes
