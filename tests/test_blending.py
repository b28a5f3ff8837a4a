"""The behavior policy: solver against bisection, limits, stop ids, and the law of the draw."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import ShardWidthGuard, run_distributed, vocab_shard
from tests.reference import blend_logprobs, dense_blend, kl
from tests.test_golden import load
from trb_megatron import blending, vocab_parallel
from trb_megatron.blending import Behavior, kl_budget_at, solve_behavior
from trb_megatron.coupling import Draw, accept_tokens, draw_tokens, propose_tokens
from trb_megatron.stop_alignment import StopAlignment, align_stop_ids
from trb_megatron.uniforms import Purpose, counter_uniforms
from trb_megatron.vocab_parallel import (
    all_gather,
    argmax,
    gather_at,
    log_softmax_NU,
    mask_invalid,
    sample_inverse_cdf,
    topk,
)

NUM_VALID, NUM_DRAWS = 21, 30_000
ALIGNMENTS = [
    StopAlignment((3,), (15,)),
    StopAlignment((18, 2), (2, 9)),
    StopAlignment((4, 5), (4,)),
]


def build_pair(
    student_scale: float, teacher_scale: float, num_rows: int = 8, size: int = 150, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_NV = student_scale * torch.randn(num_rows, size, generator=generator)
    return student_NV, teacher_scale * torch.randn(num_rows, size, generator=generator)


def add_spikes(logits_NV: Tensor, height: float, seed: int) -> Tensor:
    """Logits of almost deterministic rows."""
    generator = torch.Generator().manual_seed(seed)
    ids_N1 = torch.randint(logits_NV.shape[-1], (len(logits_NV), 1), generator=generator)
    return logits_NV.scatter_add(-1, ids_N1, torch.full_like(ids_N1, height, dtype=torch.float32))


def build_family(name: str) -> tuple[Tensor, Tensor]:
    student_NV, teacher_NV = build_pair(1, 1, num_rows=16, size=700)
    return {
        "flat": lambda: (student_NV, teacher_NV),
        "peaked": lambda: (3 * student_NV, 5 * teacher_NV),
        "scale_30": lambda: (30 * student_NV, 30 * teacher_NV),
        "scale_1000": lambda: (1e3 * student_NV, 1e3 * teacher_NV),
        "close": lambda: (5 * student_NV, 5 * student_NV + 0.1 * teacher_NV),
        "very_close": lambda: (5 * student_NV, 5 * student_NV + 1e-3 * teacher_NV + 20),
        "student_spike": lambda: (add_spikes(student_NV, 1e4, 1), teacher_NV),
        "teacher_spike": lambda: (student_NV, add_spikes(teacher_NV, 1e4, 2)),
        "two_spikes": lambda: (add_spikes(student_NV, 60, 1), add_spikes(teacher_NV, 40, 2)),
    }[name]()


FAMILIES = [
    *("flat", "peaked", "scale_30", "scale_1000", "close", "very_close"),
    *("student_spike", "teacher_spike", "two_spikes"),
]
BUDGETS = [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3, 1, 3, 10, 100, 1e9]


@pytest.mark.parametrize("name", FAMILIES)
def test_solver_agrees_with_bisection(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    budget_N = torch.tensor(BUDGETS, dtype=torch.float64)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    expected = dense_blend(student_NV, teacher_NV, budget_N)
    tolerance_N = (1e-3 * expected.blend_coef).clamp_min(1e-6)
    assert ((behavior.blend_coef - expected.blend_coef).abs() <= tolerance_N).all()
    limit_N = budget_N + (1e-3 * budget_N).clamp_min(2e-9)
    logp_NV = student_NV.double().log_softmax(-1)
    from_coef_NV = blend_logprobs(student_NV, teacher_NV, behavior.blend_coef)
    from_logprobs_NV = behavior.logprobs().double().log_softmax(-1)
    assert (kl(from_coef_NV, logp_NV) <= limit_N).all()
    assert (kl(from_logprobs_NV, logp_NV) <= limit_N).all()
    torch.testing.assert_close(behavior.logprobs().double(), from_coef_NV, rtol=1e-6, atol=1e-5)
    # A coefficient in fp32 moves the KL by up to 1e-2 of itself where logits differ by thousands.
    for result_N, expected_N in (
        (behavior.kl_student, expected.kl_student),
        (behavior.kl_teacher, expected.kl_teacher),
        (behavior.entropy, expected.entropy),
    ):
        torch.testing.assert_close(result_N.double(), expected_N, rtol=1e-2, atol=3e-6)


def test_zero_budget_is_the_student_and_a_large_one_the_teacher_bit_for_bit() -> None:
    student_NV, teacher_NV = build_pair(3, 5)
    budget_N = torch.tensor([0, 1e9] * 4)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    assert behavior.blend_coef.tolist() == [0, 1] * 4
    assert torch.equal(behavior.logprobs()[::2], log_softmax_NU(student_NV, tp_group=None)[::2])
    assert torch.equal(behavior.logprobs()[1::2], log_softmax_NU(teacher_NV, tp_group=None)[1::2])
    assert (behavior.kl_student[::2] == 0).all() and (behavior.kl_teacher[1::2] == 0).all()


def test_equal_models() -> None:
    student_NV, _ = build_pair(3, 5)
    assert (solve_behavior(student_NV, student_NV.clone(), 1e-9).blend_coef == 1).all()
    assert (solve_behavior(student_NV, student_NV.clone(), 0.0).blend_coef == 0).all()


def test_rows_do_not_depend_on_their_batch() -> None:
    student_NV, teacher_NV = build_family("peaked")
    student_NV[3], teacher_NV[3] = (logits_NV[3] for logits_NV in build_family("scale_1000"))
    behavior = solve_behavior(student_NV, teacher_NV, 0.01)
    for row in range(len(student_NV)):
        alone = solve_behavior(student_NV[row : row + 1], teacher_NV[row : row + 1], 0.01)
        assert torch.equal(alone.blend_coef, behavior.blend_coef[row : row + 1])
        assert torch.equal(alone.logprobs(), behavior.logprobs()[row : row + 1])


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
    of_block, load = blending._FirstPartials.of_block, blending._Block.load

    def count_first(student_NU: Tensor, teacher_NU: Tensor) -> Tensor:
        width = student_NU.shape[-1]
        start = student_NU.storage_offset() // width
        work.passes[-1][start : start + len(student_NU)] += 1
        return of_block(student_NU, teacher_NU)

    def count_later(pair: Any, rows_M: Tensor, dtype: torch.dtype) -> Any:
        work.passes[-1][rows_M] += 1
        return load(pair, rows_M, dtype)

    def count_collective(partial: Tensor, tp_group: Any) -> Tensor:
        work.rows_per_collective.append(len(partial))
        return all_gather(partial, tp_group)

    monkeypatch.setattr(blending._FirstPartials, "of_block", count_first)
    monkeypatch.setattr(blending._Block, "load", count_later)
    monkeypatch.setattr(blending, "all_gather", count_collective)
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


def assert_solved(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, coef_N: Tensor) -> None:
    """The KL, recomputed in float64, is within the budget and 2e-5 of it, or b fp32's last one."""
    logp_NV = student_NV.double().log_softmax(-1)
    kl_N = kl(blend_logprobs(student_NV, teacher_NV, coef_N), logp_NV)
    assert (kl_N <= budget_N + (1e-3 * budget_N).clamp_min(2e-9)).all()
    next_N = coef_N.nextafter(torch.ones_like(coef_N))
    kl_next_N = kl(blend_logprobs(student_NV, teacher_NV, next_N), logp_NV)
    rounding_N = 3e-8 * (2 * budget_N).sqrt()
    is_close_N = kl_N >= budget_N * (1 - 2e-5) - rounding_N
    is_last_N = kl_next_N > budget_N * (1 - 2e-5)
    assert (is_close_N | is_last_N | (coef_N == 1) | (budget_N == 0)).all()


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
        coef_N = work.solve(student_NV, teacher_NV, budget_N).blend_coef
        assert len(work.rows_per_collective) <= 8
        assert_solved(student_NV, teacher_NV, budget_N, coef_N)
        num_open += int((coef_N < 1).sum())
    passes_N = torch.cat(work.passes)
    assert num_open > 2900
    assert passes_N.max() <= 5
    assert passes_N.double().mean() < 2.1


@pytest.mark.parametrize("distance", [0.02, 0.3, 2.0])
def test_solutions_near_the_teacher(distance: float) -> None:
    student_NV, noise_NV = build_pair(2, 1, num_rows=16, size=700)
    teacher_NV = student_NV + distance * noise_NV
    limit_N = kl(*(x.double().log_softmax(-1) for x in (teacher_NV, student_NV)))
    for factor in (0.5, 0.9, 0.99, 0.999, 0.9999):
        coef_N = solve_behavior(student_NV, teacher_NV, factor * limit_N).blend_coef
        assert (coef_N < 1).all()
        assert_solved(student_NV, teacher_NV, factor * limit_N, coef_N)
    assert (solve_behavior(student_NV, teacher_NV, 1.0001 * limit_N).blend_coef == 1).all()


SPIKES = [8, 12, 16, 20, 30, 100]


def build_spikes(height: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Models of which one or both are nearly deterministic."""
    for scale in (1, 3):
        student_NV, teacher_NV = build_pair(scale, scale, num_rows=16, size=700, seed=seed)
        spiked_NV = add_spikes(student_NV, height, seed)
        yield spiked_NV, teacher_NV
        yield student_NV, add_spikes(teacher_NV, height, seed)
        yield spiked_NV, add_spikes(teacher_NV, height, seed + 50)
        yield spiked_NV, spiked_NV + teacher_NV


@pytest.mark.parametrize("height", SPIKES)
def test_nearly_deterministic_rows_need_at_most_eight_passes(height: float, work: Work) -> None:
    budget_N = torch.tensor(BUDGETS, dtype=torch.float64)
    for seed in range(3):
        for student_NV, teacher_NV in build_spikes(height, seed):
            coef_N = work.solve(student_NV, teacher_NV, budget_N).blend_coef
            assert len(work.rows_per_collective) <= 8
            assert_solved(student_NV, teacher_NV, budget_N, coef_N)
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


def dense_point(
    student_NV: Tensor, teacher_NV: Tensor, coef_N: Tensor
) -> tuple[blending._Point, Tensor]:
    """The blend at b by definition, and max |r|; float64."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    ratio_NV = logq_NV - logp_NV
    ratio_NV = ratio_NV - (logp_NV.exp() * ratio_NV).sum(-1, keepdim=True)
    logmu_NV = blend_logprobs(student_NV, teacher_NV, coef_N)
    shifted_NV = student_NV.double() - student_NV.double().amax(-1, keepdim=True)

    def mean(values_NV: Tensor) -> Tensor:
        return (logmu_NV.exp() * values_NV).sum(-1)

    first_N = mean(ratio_NV)
    deviation_NV = ratio_NV - first_N[:, None]
    variance_N = mean(deviation_NV**2)
    point = blending._Point(
        coef=coef_N.double(),
        kl=kl(logmu_NV, logp_NV),
        log_partition=(logp_NV + coef_N[:, None] * ratio_NV).logsumexp(-1),
        mean=first_N,
        log_variance=variance_N.log(),
        growth=mean(deviation_NV**3) / variance_N,
        mean_logp=mean(shifted_NV),
        slope_logp=mean(deviation_NV * shifted_NV),
    )
    return point, ratio_NV.abs().amax(-1)


@pytest.mark.parametrize("name", ["flat", "peaked", "scale_30", "two_spikes"])
def test_moments_of_the_later_rounds(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    pair = blending._gather_pair(student_NV, teacher_NV, None)
    is_wide_N = pair.max_ratio_N > blending._FLOAT32_MAX_RATIO
    rows = blending._OpenRows((~is_wide_N).nonzero()[:, 0], is_wide_N.nonzero()[:, 0])
    coef_M2 = torch.tensor([0.04, 0.3]).expand(16, 2).double()
    found = blending._evaluate(rows, coef_M2, pair, None)
    for j in range(2):
        expected, _ = dense_point(student_NV[rows.all_M], teacher_NV[rows.all_M], coef_M2[:, j])
        for key in blending._Point._fields:
            scale = (getattr(expected, key).abs()).clamp_min(1).amax()
            error = (getattr(found, key)[:, j] - getattr(expected, key)).abs().amax() / scale
            assert error < 1e-5, key


@pytest.mark.parametrize("name", ["flat", "peaked", "close", "two_spikes"])
def test_last_step_keeps_its_bound(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    num_tight = 0
    for coef in (0.05, 0.2, 0.6):
        point, max_ratio_N = dense_point(student_NV, teacher_NV, torch.full((16,), coef))
        for factor in (0.8, 0.97, 0.999, 1.001, 1.03, 1.3):
            target_N = point.kl * factor
            step_N, bound_N = point.step_to(target_N, max_ratio_N)
            moved = point.moved_to(point.coef + step_N)
            expected, _ = dense_point(student_NV, teacher_NV, point.coef + step_N)
            is_bounded_N = bound_N < 0.01 * target_N
            error_N = (expected.kl - moved.kl).abs()
            rounding_N = 1e-9 * target_N + 1e-14
            assert (error_N <= bound_N + rounding_N)[is_bounded_N].all()
            num_tight += int((error_N > 1e-2 * bound_N)[is_bounded_N].sum())
            # The other fields have no bound of their own; their slopes must be right.
            for key in ("log_partition", "mean", "mean_logp"):
                change_N = getattr(expected, key) - getattr(point, key)
                missed_N = getattr(expected, key) - getattr(moved, key)
                largest_N = torch.where(is_bounded_N, change_N.abs(), 0.0).amax()
                assert (missed_N.abs() <= 0.2 * largest_N + 1e-12)[is_bounded_N].all(), key
    assert name != "flat" or num_tight > 0


def test_rows_in_blocks_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student_NV, teacher_NV = build_family("peaked")
    student_NV[3], teacher_NV[3] = (logits_NV[3] for logits_NV in build_family("scale_1000"))
    budget_N = torch.tensor(BUDGETS)
    expected = solve_behavior(student_NV, teacher_NV, budget_N)
    expected_NV = expected.logprobs()
    monkeypatch.setattr(vocab_parallel, "rows_per_block", lambda logits_NU: 3)
    monkeypatch.setattr(blending, "rows_per_block", lambda logits_NU: 3)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    for key in ("blend_coef", "kl_student", "kl_teacher", "entropy"):
        assert torch.equal(getattr(behavior, key), getattr(expected, key)), key
    assert torch.equal(behavior.logprobs(), expected_NV)


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
    for module in (vocab_parallel, blending):
        monkeypatch.setattr(module, "rows_per_block", lambda logits_NU: 2)
    student_NV, teacher_NV = build_pair(3, 4, num_rows=64, size=8192)
    with LiveBytes() as live:
        behavior = solve_behavior(student_NV, teacher_NV, 0.01)
    assert (behavior.blend_coef < 1).all()
    assert 4 * 2 * 8192 * 3 < live.peak < 0.5 * student_NV.nbytes
    with LiveBytes() as live:
        behavior.logprobs()
    assert live.peak < 1.5 * student_NV.nbytes


def test_ids_that_do_not_exist_are_ignored() -> None:
    student_NV, teacher_NV = build_pair(3, 5)
    keep = [i for i in range(150) if i not in (0, 77)][:140]
    expected = solve_behavior(student_NV[:, keep], teacher_NV[:, keep], 0.02)
    student_NV[:, [0, 77]], teacher_NV[:, [0, 77]] = -torch.inf, -torch.inf
    student_NV[:, 142:], teacher_NV[:, 142:] = torch.nan, torch.inf
    behavior = solve_behavior(student_NV, teacher_NV, 0.02, num_valid=142)
    torch.testing.assert_close(behavior.blend_coef, expected.blend_coef, rtol=1e-5, atol=0)
    torch.testing.assert_close(behavior.entropy, expected.entropy)
    torch.testing.assert_close(behavior.logprobs()[:, keep], expected.logprobs())
    absent = [0, 77, *range(142, 150)]
    assert (behavior.logprobs()[:, absent] == -torch.inf).all()
    assert student_NV[:, 142:].isnan().all()


@pytest.mark.parametrize("budget", [-1e-9, float("inf"), float("nan")])
def test_bad_budgets_are_refused(budget: float) -> None:
    student_NV, teacher_NV = build_pair(1, 1)
    with pytest.raises(ValueError, match=r"kl_budget .* row 0"):
        solve_behavior(student_NV, teacher_NV, budget)
    with pytest.raises(ValueError, match=r"kl_budget .* row 5"):
        solve_behavior(student_NV, teacher_NV, torch.tensor([0.1] * 5 + [budget] + [0.1] * 2))


def test_schedule() -> None:
    assert [kl_budget_at(k, 0.02, 4) for k in range(6)] == [0.02, 0.015, 0.01, 0.005, 0, 0]
    assert [kl_budget_at(k, 0.02, 2, "constant") for k in range(4)] == [0.02, 0.02, 0, 0]
    assert kl_budget_at(0, 0.02, 0) == 0
    for arguments in ((0, -1.0, 4), (0, float("nan"), 4), (-1, 0.1, 4), (0, 0.1, -4)):
        with pytest.raises(ValueError):
            kl_budget_at(*arguments)
    with pytest.raises(ValueError, match="cosine"):
        kl_budget_at(0, 0.1, 4, "cosine")


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


# The checks below run on one, two and four ranks.


def align_by_definition(logits_NV: Tensor, own_ids: tuple[int, ...], stop: StopAlignment) -> Tensor:
    """The aligned logits by torch operations that autograd differentiates."""
    merged_N = logits_NV[:, list(own_ids)].logsumexp(-1)
    columns = list(logits_NV.unbind(-1))
    for removed_id in stop.removed_ids:
        columns[removed_id] = torch.full_like(merged_N, -torch.inf)
    columns[stop.stop_id] = merged_N
    return torch.stack(columns, dim=-1)


def measure_alignment(group: dist.ProcessGroup | None) -> list[tuple[Tensor, Tensor]]:
    """Aligned logits and the gradient of a weighted sum of them, gathered, for both models."""
    results = []
    for alignment in ALIGNMENTS:
        for own_ids, full_NV in zip(
            (alignment.student_ids, alignment.teacher_ids), build_pair(2, 2, 5, 20), strict=True
        ):
            shard_NU = vocab_shard(full_NV, group).requires_grad_()
            aligned_NU = align_stop_ids(shard_NU, own_ids, alignment, tp_group=group)
            weights_NU = vocab_shard(build_pair(1, 1, 5, 20, seed=4)[0], group)
            finite_NU = torch.where(aligned_NU > -torch.inf, aligned_NU * weights_NU, 0.0)
            (grad_NU,) = torch.autograd.grad(finite_NU.sum(), shard_NU)
            results.append((_gather(aligned_NU.detach(), group), _gather(grad_NU, group)))
    return results


def _gather(shard_NU: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return all_gather(shard_NU, group).transpose(0, 1).flatten(1)


def build_draw_inputs(
    group: dist.ProcessGroup | None, kl_budget: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One prefix repeated: log p, log mu on this shard, and the three uniforms of each draw."""
    student_NU, teacher_NU = (
        mask_invalid(vocab_shard(full_NV, group), NUM_VALID, group)
        for full_NV in build_pair(1.5, 2, 1, NUM_VALID, seed=7)
    )
    behavior = solve_behavior(student_NU, teacher_NU, kl_budget, tp_group=group)
    logp_NU = log_softmax_NU(student_NU, tp_group=group).expand(NUM_DRAWS, -1)
    uniforms = counter_uniforms(5, 0, 0, 0, torch.arange(NUM_DRAWS)[:, None], torch.arange(3))
    return logp_NU, behavior.logprobs().expand(NUM_DRAWS, -1), list(uniforms.unbind(-1))


def measure_draws(group: dist.ProcessGroup | None) -> dict[float, Draw]:
    results = {}
    for kl_budget in (0.0, 0.05, 0.5, 1e9):
        logp_NU, logmu_NU, uniforms = build_draw_inputs(group, kl_budget)
        results[kl_budget] = draw_tokens(logp_NU, logmu_NU, *uniforms, tp_group=group)
    return results


def collect_errors(group: dist.ProcessGroup | None) -> list[str]:
    """Messages of bad input in the last shard, which every rank must raise."""
    messages = []
    bad = ((0, torch.nan), (1, torch.nan), (0, torch.inf), (0, -torch.inf), (1, -torch.inf))
    for model, value in bad:
        logits = build_pair(1, 1, 6, NUM_VALID)
        logits[model][4, NUM_VALID - 1] = value
        student_NU, teacher_NU = (vocab_shard(logits_NV, group) for logits_NV in logits)
        with pytest.raises(ValueError) as error:
            solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group, num_valid=NUM_VALID)
        messages.append(str(error.value))
    return messages


def build_shifted_halves() -> tuple[Tensor, Tensor]:
    """Models that agree on each shard of two seen alone, and are far apart across the shards."""
    student_NV = torch.cat((add_spikes(torch.zeros(4, 10), 500.0, 1), torch.zeros(4, 10)), dim=-1)
    return student_NV, student_NV + torch.tensor([0.0, 600.0]).repeat_interleave(10)


def measure_moments(group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Both KLs and moments of r, whose partials are re-based, and b for extreme shards."""
    student_NU, teacher_NU = (vocab_shard(x, group) for x in build_pair(2, 3, 6, NUM_VALID + 3))
    pair = blending._gather_pair(student_NU, teacher_NU, group)
    student_NU, teacher_NU = (vocab_shard(full_NV, group) for full_NV in build_shifted_halves())
    coef_N = solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group).blend_coef
    growths = pair.at_student.growth, pair.at_teacher.growth
    return pair.kl_teacher_student_N, pair.kl_student_teacher_N, pair.variance_N, *growths, coef_N


def guard_widths() -> None:
    """Solve, align, draw, top-k and argmax without any tensor beyond the shard."""
    group = dist.group.WORLD
    for name in FAMILIES:
        student_NU, teacher_NU = (vocab_shard(full_NV, group) for full_NV in build_family(name))
        uniforms = counter_uniforms(
            0, 0, 0, 0, torch.arange(len(student_NU)), torch.arange(3)[:, None]
        )
        with ShardWidthGuard(student_NU):
            student_NU = align_stop_ids(student_NU, (18, 2), ALIGNMENTS[1], tp_group=group)
            teacher_NU = align_stop_ids(teacher_NU, (2, 9), ALIGNMENTS[1], tp_group=group)
            behavior = solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group, num_valid=690)
            logp_NU = behavior.student.logprobs()
            draw_tokens(logp_NU, behavior.logprobs(), *uniforms, tp_group=group)
            topk(student_NU, 16, tp_group=group)
            argmax(student_NU, tp_group=group)


def run_checks() -> dict[str, Any]:
    group = dist.group.WORLD if dist.is_initialized() else None
    # With more ranks the candidates' partials outgrow a shard as narrow as this test's.
    if group is not None and dist.get_world_size(group) == 2:
        guard_widths()
    return {
        "alignment": measure_alignment(group),
        "draws": measure_draws(group),
        "errors": collect_errors(group),
        "moments": measure_moments(group),
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [run_checks()] if request.param == 1 else run_distributed(run_checks, request.param)


def test_errors_name_the_row_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["errors"] == [
            "student logits hold a NaN in row 4",
            "teacher logits hold a NaN in row 4",
            "student logits hold a +inf in row 4",
            "logits are -inf in one model only in row 4",
            "logits are -inf in one model only in row 4",
        ]


def test_moments_of_the_first_round(ranks: list[dict[str, Any]]) -> None:
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in build_pair(2, 3, 6, NUM_VALID + 3))
    mean_N1 = (logp_NV.exp() * (logq_NV - logp_NV)).sum(-1, keepdim=True)
    variance_N = (logp_NV.exp() * (logq_NV - logp_NV - mean_N1) ** 2).sum(-1)
    logits = build_pair(2, 3, 6, NUM_VALID + 3)
    growths = [dense_point(*logits, torch.full((6,), coef))[0].growth for coef in (0.0, 1.0)]
    expected = (kl(logq_NV, logp_NV), kl(logp_NV, logq_NV), variance_N, *growths)
    budget_N = torch.full((4,), 0.01, dtype=torch.float64)
    coef_N = dense_blend(*build_shifted_halves(), budget_N).blend_coef
    for result in ranks:
        for moment_N, expected_N in zip(result["moments"][:-1], expected, strict=True):
            torch.testing.assert_close(moment_N, expected_N, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["moments"][-1].double(), coef_N, rtol=1e-3, atol=0)


def test_alignment_and_its_gradient(ranks: list[dict[str, Any]]) -> None:
    expected = []
    for alignment in ALIGNMENTS:
        for own_ids, full_NV in zip(
            (alignment.student_ids, alignment.teacher_ids), build_pair(2, 2, 5, 20), strict=True
        ):
            logits_NV = full_NV.double().requires_grad_()
            aligned_NV = align_by_definition(logits_NV, own_ids, alignment)
            weights_NV = build_pair(1, 1, 5, 20, seed=4)[0]
            finite_NV = torch.where(aligned_NV > -torch.inf, aligned_NV * weights_NV, 0.0)
            expected.append((aligned_NV, torch.autograd.grad(finite_NV.sum(), logits_NV)[0]))
    for result in ranks:
        for (aligned_NV, grad_NV), (expected_NV, expected_grad_NV) in zip(
            result["alignment"], expected, strict=True
        ):
            torch.testing.assert_close(aligned_NV, expected_NV.float())
            torch.testing.assert_close(grad_NV, expected_grad_NV.float())


def chi_square_p_value(ids_N: Tensor, logprobs_V: Tensor) -> float:
    expected_V = logprobs_V.exp() * len(ids_N)
    counts_V = torch.bincount(ids_N, minlength=len(logprobs_V))[: len(logprobs_V)]
    assert (expected_V > 10).all()
    chi_square = ((counts_V - expected_V) ** 2 / expected_V).sum()
    degrees = torch.tensor(len(expected_V) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, chi_square / 2))


def exact_behavior(kl_budget: float) -> tuple[Tensor, Tensor]:
    """log p and log mu of the drawn prefix, [V] float64."""
    student_NV, teacher_NV = build_pair(1.5, 2, 1, NUM_VALID, seed=7)
    budget_N = torch.tensor([kl_budget], dtype=torch.float64)
    logmu_NV = dense_blend(student_NV, teacher_NV, budget_N).logprobs
    return student_NV.double().log_softmax(-1)[0], logmu_NV[0]


@pytest.mark.parametrize("kl_budget", [0.05, 0.5, 1e9])
def test_draws_follow_the_behavior_policy(kl_budget: float, ranks: list[dict[str, Any]]) -> None:
    logp_V, logmu_V = exact_behavior(kl_budget)
    draw = ranks[0]["draws"][kl_budget]
    assert chi_square_p_value(draw.token_ids, logmu_V) > 1e-3
    assert chi_square_p_value(draw.proposed_ids, logp_V) > 1e-3
    assert chi_square_p_value(draw.proposed_ids, logmu_V) < 1e-3
    acceptance = 1 - 0.5 * float((logp_V.exp() - logmu_V.exp()).abs().sum())
    deviation = (acceptance * (1 - acceptance) / NUM_DRAWS) ** 0.5
    assert abs(float(draw.accepted.double().mean()) - acceptance) < 4 * deviation
    assert torch.equal(draw.token_ids == draw.proposed_ids, draw.accepted)


def test_draws_do_not_depend_on_tp(ranks: list[dict[str, Any]]) -> None:
    single = measure_draws(None)
    for result in ranks:
        for kl_budget, draw in result["draws"].items():
            for field, expected in zip(draw, single[kl_budget], strict=True):
                assert torch.equal(field, expected)


def test_draws_do_not_depend_on_their_batch() -> None:
    student_NV, teacher_NV = build_pair(2, 3, num_rows=60, size=400)
    behavior = solve_behavior(student_NV, teacher_NV, 0.3)
    logprobs = behavior.student.logprobs(), behavior.logprobs()
    uniforms = counter_uniforms(3, 0, 0, 0, torch.arange(60), torch.arange(3)[:, None])
    draw = draw_tokens(*logprobs, *uniforms, tp_group=None)
    assert not draw.accepted.all()
    for row in range(60):
        rows = slice(row, row + 1)
        alone = draw_tokens(*(x[rows] for x in logprobs), *uniforms[:, rows], tp_group=None)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, draw, strict=True))


def test_without_a_budget_the_student_is_sampled(ranks: list[dict[str, Any]]) -> None:
    logp_NU, logmu_NU, (u_draft_N, _, _) = build_draw_inputs(None, 0.0)
    assert torch.equal(logp_NU, logmu_NU)
    plain_N = sample_inverse_cdf(logp_NU.exp(), u_draft_N, tp_group=None)
    for result in ranks:
        draw = result["draws"][0.0]
        assert draw.accepted.all()
        assert torch.equal(draw.token_ids, plain_N)


def keep_every_proposal(logp_NU: Tensor, logmu_NU: Tensor, u: list[Tensor]) -> Tensor:
    return propose_tokens(logp_NU, u[0], tp_group=None)


def redraw_from_behavior(logp_NU: Tensor, logmu_NU: Tensor, u: list[Tensor]) -> Tensor:
    proposed_N = propose_tokens(logp_NU, u[0], tp_group=None)
    logp_N, logmu_N = (gather_at(x, proposed_N, tp_group=None) for x in (logp_NU, logmu_NU))
    fresh_N = sample_inverse_cdf(logmu_NU.exp(), u[2], tp_group=None)
    return torch.where(accept_tokens(logp_N, logmu_N, u[1]), proposed_N, fresh_N)


def reuse_one_uniform(logp_NU: Tensor, logmu_NU: Tensor, u: list[Tensor]) -> Tensor:
    return draw_tokens(logp_NU, logmu_NU, u[0], u[0], u[0], tp_group=None).token_ids


@pytest.mark.parametrize("rule", [keep_every_proposal, redraw_from_behavior, reuse_one_uniform])
def test_a_wrong_rule_is_noticed(
    rule: Callable[[Tensor, Tensor, list[Tensor]], Tensor],
) -> None:
    logp_NU, logmu_NU, uniforms = build_draw_inputs(None, 0.5)
    tokens_N = rule(logp_NU, logmu_NU, uniforms)
    assert chi_square_p_value(tokens_N, exact_behavior(0.5)[1]) < 1e-3


def test_uniforms_of_the_draw_are_the_purposes_in_order() -> None:
    _, _, uniforms = build_draw_inputs(None, 0.5)
    for purpose, u_N in zip(
        (Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL), uniforms, strict=True
    ):
        assert torch.equal(u_N, counter_uniforms(5, 0, 0, 0, torch.arange(NUM_DRAWS), purpose))
