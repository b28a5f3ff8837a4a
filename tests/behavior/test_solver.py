"""The solver: against bisection, at its limits, and on shards."""

import pytest
import torch

from tests.behavior.cases import (
    ALIGNMENTS,
    BUDGETS,
    FAMILIES,
    NUM_VALID,
    assert_solved,
    build_family,
    build_pair,
)
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import ShardWidthGuard, vocab_shard
from tests.reference import blend_logprobs, dense_blend, entropy, kl
from trb_megatron.behavior import moments
from trb_megatron.behavior.coupling import draw_tokens
from trb_megatron.behavior.sampling import most_likely, sample_softmax
from trb_megatron.behavior.solver import solve_behavior
from trb_megatron.behavior.stop_alignment import align_stop_ids
from trb_megatron.distributed import vocab_parallel
from trb_megatron.distributed.vocab_parallel import softmax, topk
from trb_megatron.uniforms import Purpose, position_keys, rollout_key


@pytest.mark.parametrize("name", FAMILIES)
def test_solver_agrees_with_bisection(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    budget_N = torch.tensor(BUDGETS, dtype=torch.float64)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    expected = dense_blend(student_NV, teacher_NV, budget_N)
    tolerance_N = (1e-3 * expected.blend_coef).clamp_min(1e-6)
    assert ((behavior.blend_coef - expected.blend_coef).abs() <= tolerance_N).all()
    limit_N = budget_N + (1e-3 * budget_N).clamp_min(2e-9)
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    from_coef_NV = blend_logprobs(student_NV, teacher_NV, behavior.blend_coef)
    from_logprobs_NV = behavior.logprobs().double().log_softmax(-1)
    assert (kl(from_coef_NV, logp_NV) <= limit_N).all()
    assert (kl(from_logprobs_NV, logp_NV) <= limit_N).all()
    torch.testing.assert_close(behavior.logprobs().double(), from_coef_NV, rtol=1e-6, atol=1e-5)
    # A coefficient in fp32 moves the KL by up to 1e-2 of itself where logits differ by thousands.
    for result_N, expected_N in (
        (behavior.kl_student, expected.kl_student),
        (kl(from_logprobs_NV, logq_NV), expected.kl_teacher),
        (entropy(from_logprobs_NV), expected.entropy),
    ):
        torch.testing.assert_close(result_N.double(), expected_N, rtol=1e-2, atol=3e-6)


def test_zero_budget_is_the_student_and_a_large_one_the_teacher_bit_for_bit() -> None:
    student_NV, teacher_NV = build_pair(3, 5)
    budget_N = torch.tensor([0, 1e9] * 4)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    assert behavior.blend_coef.tolist() == [0, 1] * 4
    logp_NV, logq_NV = (softmax(x, tp_group=None).logprobs() for x in (student_NV, teacher_NV))
    assert torch.equal(behavior.logprobs()[::2], logp_NV[::2])
    assert torch.equal(behavior.logprobs()[1::2], logq_NV[1::2])
    assert (behavior.kl_student[::2] == 0).all()


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


@pytest.mark.parametrize("distance", [0.02, 0.3, 2.0])
def test_solutions_near_the_teacher(distance: float) -> None:
    student_NV, noise_NV = build_pair(2, 1, num_rows=16, size=700)
    teacher_NV = student_NV + distance * noise_NV
    limit_N = kl(*(x.double().log_softmax(-1) for x in (teacher_NV, student_NV)))
    for factor in (0.5, 0.9, 0.99, 0.999, 0.9999):
        blend_coef_N = solve_behavior(student_NV, teacher_NV, factor * limit_N).blend_coef
        assert (blend_coef_N < 1).all()
        assert_solved(student_NV, teacher_NV, factor * limit_N, blend_coef_N)
    assert (solve_behavior(student_NV, teacher_NV, 1.0001 * limit_N).blend_coef == 1).all()


def test_rows_in_blocks_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student_NV, teacher_NV = build_family("peaked")
    student_NV[3], teacher_NV[3] = (logits_NV[3] for logits_NV in build_family("scale_1000"))
    budget_N = torch.tensor(BUDGETS)
    expected = solve_behavior(student_NV, teacher_NV, budget_N)
    expected_NV = expected.logprobs()
    monkeypatch.setattr(vocab_parallel, "rows_per_block", lambda logits_NU: 3)
    monkeypatch.setattr(moments, "rows_per_block", lambda logits_NU: 3)
    behavior = solve_behavior(student_NV, teacher_NV, budget_N)
    for key in ("blend_coef", "kl_student", "log_partition_N", "wide_rows"):
        assert torch.equal(getattr(behavior, key), getattr(expected, key)), key
    assert torch.equal(behavior.logprobs(), expected_NV)


def test_ids_that_do_not_exist_are_ignored() -> None:
    student_NV, teacher_NV = build_pair(3, 5)
    keep = [i for i in range(150) if i not in (0, 77)][:140]
    expected = solve_behavior(student_NV[:, keep], teacher_NV[:, keep], 0.02)
    student_NV[:, [0, 77]], teacher_NV[:, [0, 77]] = -torch.inf, -torch.inf
    student_NV[:, 142:], teacher_NV[:, 142:] = torch.nan, torch.inf
    behavior = solve_behavior(student_NV, teacher_NV, 0.02, num_valid=142)
    torch.testing.assert_close(behavior.blend_coef, expected.blend_coef, rtol=1e-5, atol=0)
    torch.testing.assert_close(behavior.kl_student, expected.kl_student)
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


# The checks below run on one rank and on several.


def collect_errors() -> list[str]:
    """Messages of bad input in the last shard, which every rank must raise."""
    group = current_group()
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


def guard_widths() -> None:
    """Solve, align, draw, top-k and most likely id without any tensor beyond the shard."""
    group = current_group()
    for name in FAMILIES:
        student_NU, teacher_NU = (vocab_shard(full_NV, group) for full_NV in build_family(name))
        key_N = position_keys(rollout_key(0, 0, 0, 0), torch.arange(len(student_NU)))
        with ShardWidthGuard(student_NU):
            student_NU = align_stop_ids(student_NU, (18, 2), ALIGNMENTS[1], tp_group=group)
            teacher_NU = align_stop_ids(teacher_NU, (2, 9), ALIGNMENTS[1], tp_group=group)
            behavior = solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group, num_valid=690)
            logp_NU = behavior.student.logprobs()
            proposed_N = sample_softmax(logp_NU, key_N, Purpose.DRAFT, tp_group=group).token_ids
            draw_tokens(logp_NU, behavior.logprobs(), proposed_N, key_N, tp_group=group)
            topk(student_NU, 16, tp_group=group)
            most_likely(student_NU, tp_group=group)


def run_checks() -> list[str]:
    # With more ranks the candidates' partials outgrow a shard as narrow as this test's.
    group = current_group()
    if group is not None and group.size() == 2:
        guard_widths()
    return collect_errors()


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_on_ranks_errors_name_the_row_and_nothing_exceeds_the_shard(tp_size: int) -> None:
    for messages in on_ranks(run_checks, tp_size):
        assert messages == [
            "student logits hold a NaN in row 4",
            "teacher logits hold a NaN in row 4",
            "student logits hold a +inf in row 4",
            "logits are -inf in one model only in row 4",
            "logits are -inf in one model only in row 4",
        ]
