"""Moments of the log-ratio, at the ends of the path and on it, against dense float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.behavior.cases import (
    build_family,
    build_pair,
    build_shifted_halves,
    dense_point,
)
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from tests.reference import dense_blend, kl
from trb_megatron.behavior.moments import FLOAT32_MAX_RATIO, OpenRows, evaluate, gather_pair
from trb_megatron.behavior.path import Point
from trb_megatron.behavior.solver import solve_behavior

NUM_IDS = 48


@pytest.mark.parametrize("name", ["flat", "peaked", "scale_30", "two_spikes"])
def test_moments_of_the_later_rounds(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    pair = gather_pair(student_NV, teacher_NV, None)
    is_wide_N = pair.max_ratio_N > FLOAT32_MAX_RATIO
    rows = OpenRows((~is_wide_N).nonzero()[:, 0], is_wide_N.nonzero()[:, 0])
    blend_coef_M2 = torch.tensor([0.04, 0.3]).expand(16, 2).double()
    found = evaluate(rows, blend_coef_M2, pair, None)
    for j in range(2):
        logits = student_NV[rows.all_M], teacher_NV[rows.all_M]
        expected, _ = dense_point(*logits, blend_coef_M2[:, j])
        for key in Point._fields:
            scale = (getattr(expected, key).abs()).clamp_min(1).amax()
            error = (getattr(found, key)[:, j] - getattr(expected, key)).abs().amax() / scale
            assert error < 1e-5, key


class FirstRound(NamedTuple):
    """What one rank knows after the first round, each [N] float64."""

    kl_teacher_student_N: Tensor
    kl_student_teacher_N: Tensor
    at_student: Point
    at_teacher: Point
    blend_coef_N: Tensor
    """Of the solver, where the shards of the models differ most."""


def measure_moments() -> FirstRound:
    """Both KLs and the ends of the path, whose partials are re-based, and β for extreme shards."""
    group = current_group()
    student_NU, teacher_NU = (vocab_shard(x, group) for x in build_pair(2, 3, 6, NUM_IDS))
    pair = gather_pair(student_NU, teacher_NU, group)
    student_NU, teacher_NU = (vocab_shard(full_NV, group) for full_NV in build_shifted_halves())
    blend_coef_N = solve_behavior(student_NU, teacher_NU, 0.01, tp_group=group).blend_coef
    return FirstRound(
        pair.kl_teacher_student_N,
        pair.kl_student_teacher_N,
        pair.at_student,
        pair.at_teacher,
        blend_coef_N,
    )


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_moments_of_the_first_round(tp_size: int) -> None:
    logits = build_pair(2, 3, 6, NUM_IDS)
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in logits)
    at_student, at_teacher = (dense_point(*logits, torch.full((6,), end))[0] for end in (0.0, 1.0))
    budget_N = torch.full((4,), 0.01, dtype=torch.float64)
    blend_coef_N = dense_blend(*build_shifted_halves(), budget_N).blend_coef
    for found in on_ranks(measure_moments, tp_size):
        pairs = [
            (found.kl_teacher_student_N, kl(logq_NV, logp_NV)),
            (found.kl_student_teacher_N, kl(logp_NV, logq_NV)),
            (found.at_student.variance, at_student.variance),
            *zip(found.at_student, at_student, strict=True),
            *zip(found.at_teacher, at_teacher, strict=True),
        ]
        for moment_N, expected_N in pairs:
            torch.testing.assert_close(moment_N, expected_N, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.blend_coef_N.double(), blend_coef_N, rtol=1e-3, atol=0)
