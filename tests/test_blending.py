"""The behavior policy: solver against bisection, limits, stop ids, and the law of the draw."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import ShardWidthGuard, run_distributed, vocab_shard
from tests.reference import blend_logprobs, dense_blend, kl
from trb_megatron import blending
from trb_megatron.blending import (
    Draw,
    StopAlignment,
    accept_tokens,
    align_stop_ids,
    draw_tokens,
    kl_budget_at,
    propose_tokens,
    solve_behavior,
)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_collectives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def count(partial: Tensor, tp_group: Any) -> Tensor:
        shapes.append(partial.shape)
        return all_gather(partial, tp_group)

    monkeypatch.setattr(blending, "all_gather", count)
    student_NV, teacher_NV = build_family(name)
    solve_behavior(student_NV, teacher_NV, torch.tensor(BUDGETS)).logprobs()
    assert len(shapes) <= 8
    # Later rounds carry the rows that are not settled, and those only.
    num_rows = [shape[0] for shape in shapes]
    assert num_rows == sorted(num_rows, reverse=True)
    shapes.clear()
    settled_N = torch.tensor([0.0, 1e9] * 8)
    solve_behavior(student_NV, teacher_NV, settled_N).logprobs()
    assert len(shapes) == 1


def test_typical_rows_need_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    evaluate = blending._evaluate

    def count(shards: Any, candidates_MJ: Tensor, *rest: Any) -> Any:
        rounds.append(len(candidates_MJ))
        return evaluate(shards, candidates_MJ, *rest)

    monkeypatch.setattr(blending, "_evaluate", count)
    for seed in range(20):
        student_NV, noise_NV = build_pair(4, 1, num_rows=32, size=500, seed=seed)
        solve_behavior(student_NV, student_NV + noise_NV, 0.01)
    assert sum(rounds) / (20 * 32) < 3.5


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


def measure_moments(group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both KLs and the variance of r, whose partials are re-based, and b for extreme shards."""
    student_NU, teacher_NU = (vocab_shard(x, group) for x in build_pair(2, 3, 6, NUM_VALID + 3))
    pair = blending._gather_pair(student_NU, teacher_NU, group)
    student_NU, teacher_NU = (vocab_shard(full_NV, group) for full_NV in build_shifted_halves())
    coef_N = solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group).blend_coef
    return pair.kl_teacher_student_N, pair.kl_student_teacher_N, pair.variance_N, coef_N


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
    expected = (kl(logq_NV, logp_NV), kl(logp_NV, logq_NV), variance_N)
    budget_N = torch.full((4,), 0.01, dtype=torch.float64)
    coef_N = dense_blend(*build_shifted_halves(), budget_N).blend_coef
    for result in ranks:
        for moment_N, expected_N in zip(result["moments"][:3], expected, strict=True):
            torch.testing.assert_close(moment_N, expected_N, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["moments"][3].double(), coef_N, rtol=1e-3, atol=0)


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
