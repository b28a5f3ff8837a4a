"""The step from a point of the path: its error is bounded as it says."""

import pytest
import torch

from tests.behavior.cases import build_family, dense_point


@pytest.mark.parametrize("name", ["flat", "peaked", "close", "two_spikes"])
def test_last_step_keeps_its_bound(name: str) -> None:
    student_NV, teacher_NV = build_family(name)
    num_tight = 0
    for blend_coef in (0.05, 0.2, 0.6):
        blend_coef_N = torch.full((16,), blend_coef)
        point, max_ratio_N = dense_point(student_NV, teacher_NV, blend_coef_N)
        for factor in (0.8, 0.97, 0.999, 1.001, 1.03, 1.3):
            target_N = point.kl * factor
            step_N, bound_N = point.step_to(target_N, max_ratio_N)
            moved = point.moved_to(point.blend_coef + step_N)
            expected, _ = dense_point(student_NV, teacher_NV, point.blend_coef + step_N)
            is_bounded_N = bound_N < 0.01 * target_N
            error_N = (expected.kl - moved.kl).abs()
            rounding_N = 1e-9 * target_N + 1e-14
            assert (error_N <= bound_N + rounding_N)[is_bounded_N].all()
            num_tight += int((error_N > 1e-2 * bound_N)[is_bounded_N].sum())
            assert torch.equal(moved.blend_coef, point.blend_coef + step_N)
            # The log-partition has no bound of its own; its slope and curvature must be right.
            change_N = expected.log_partition - point.log_partition
            missed_N = expected.log_partition - moved.log_partition
            largest_N = torch.where(is_bounded_N, change_N.abs(), 0.0).amax()
            assert (missed_N.abs() <= 0.01 * largest_N + 1e-12)[is_bounded_N].all()
    assert name != "flat" or num_tight > 0
