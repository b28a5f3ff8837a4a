"""The solver of Trust-Region behavior Blending (TRB): the largest β that keeps the KL budget.

p = student, q = teacher, mu = behavior policy, r = log q - log p; natural logarithms. Per prefix
mu is the distribution closest to the teacher, in KL(mu||q), within KL(mu||p) <= budget of the
student: mu ~ p^(1-β) q^β at the largest β in [0, 1] that keeps the budget (Plyusov et al., arXiv
2605.31159). In code β is `blend_coef`.

The solver knows the moments of r at both ends of the path from one look at the logits (`moments`).
From them it predicts β (`path`), evaluates the blend there, and takes the remaining small step by a
Taylor expansion whose error is bounded; only where the bound is too large it looks at the logits
once more.

Shapes: N rows (prefixes), M a subset of them, J candidates per row, F fields of a `Point`, U this
rank's vocabulary shard. An id that is -inf in both models does not exist.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.behavior.moments import (
    FLOAT32_MAX_RATIO,
    OpenRows,
    Pair,
    evaluate,
    gather_pair,
)
from trb_megatron.behavior.path import Point, grid, predict, round_between, round_down
from trb_megatron.distributed.vocab_parallel import (
    Softmax,
    mask_invalid,
    raise_at_row,
    row_blocks,
)

# The search aims this far below the budget, and a last step may err by as much: a row's KL ends
# between (1 - 2 * this) * budget and the budget.
_RELATIVE_TOLERANCE = 1e-5
# One predicted β per round settles almost all rows. What is left after three has a KL that climbs
# in jumps (nearly deterministic models), and gets a grid of candidates per round.
_NUM_PREDICTED_ROUNDS = 3
_NUM_GRID_ROUNDS = 4
# What sums in fp32 leave uncertain of KL(q||p), relative to 1 + KL.
_KL_ROUNDING = 2e-6
# A bracket of β this narrow, relative to its end, holds no fp32 number inside: 2^-23, rounded up.
_FLOAT32_SPACING = 1.2e-7


@dataclass(frozen=True)
class Behavior:
    """The behavior policy at N prefixes."""

    blend_coef: Tensor
    """[N] fp32, β in [0, 1]: 0 is the student, 1 the teacher."""
    kl_student: Tensor
    """[N] fp32, KL(mu||p) in nats."""
    student: Softmax
    teacher: Softmax
    log_partition_N: Tensor
    """[N] float64, log of the sum of p^(1-β) q^β; exactly 0 at β = 0 and β = 1."""
    wide_rows: Tensor
    """[M] int64, rows whose log-ratios are too large for fp32 arithmetic."""

    def logprobs(self) -> Tensor:
        """Return log mu on this shard, [N, U] fp32, -inf at ids that do not exist.

        Bitwise the student's log-softmax where β = 0 and the teacher's where β = 1. No
        communication, not differentiable. Besides the result it holds one block of rows.
        """
        logprobs_NU = torch.empty_like(self.student.logits_NU)
        for rows in row_blocks(logprobs_NU):
            logprobs_NU[rows] = self._blend(rows, torch.float32)
        if len(self.wide_rows) > 0:
            logprobs_NU[self.wide_rows] = self._blend(self.wide_rows, torch.float64).float()
        return logprobs_NU

    def _blend(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        blend_MU = torch.lerp(
            self.student.logprobs(rows, dtype),
            self.teacher.logprobs(rows, dtype),
            self.blend_coef[rows, None].to(dtype),
        )
        blend_MU -= self.log_partition_N[rows, None].to(dtype)
        # -inf - (-inf) is NaN at ids that do not exist.
        return blend_MU.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def solve_behavior(
    student_logits_NU: Tensor,
    teacher_logits_NU: Tensor,
    kl_budget: float | Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    num_valid: int | None = None,
) -> Behavior:
    """Find, per row, the largest blend coefficient whose KL(mu||p) is within `kl_budget` nats.

    Logits are [N, U]; `kl_budget` is a float or [N]; columns from `num_valid` on, counted over all
    shards, are ignored whatever they hold. A budget of 0 gives the student (β = 0) and a budget of
    at least KL(q||p) the teacher (β = 1); otherwise the result is on the feasible side.

    One all-gather over `tp_group` for the moments of both ends, then at most seven more for the
    rows that need a search, usually one; each reads the logits of those rows once. Logits sharded,
    budget and results replicated and bit-identical; upcast to fp32; not differentiable. Works
    through blocks of rows: beyond fp32 copies of logits that are not fp32 or have ignored columns,
    memory is a few blocks. On a GPU the host waits for the checks, for the rows to search (once
    per arithmetic, at first and after each round), and for `Behavior.wide_rows`; nowhere else.
    Raises ValueError, on all ranks alike, for a budget that is negative or not finite and for a
    NaN, a +inf or an id that is -inf in one model only, naming the row.
    """
    student_logits_NU = mask_invalid(student_logits_NU.detach(), num_valid, tp_group)
    teacher_logits_NU = mask_invalid(teacher_logits_NU.detach(), num_valid, tp_group)
    budget = torch.as_tensor(kl_budget, dtype=torch.float64, device=student_logits_NU.device)
    budget_N = budget.expand(len(student_logits_NU))
    pair = gather_pair(student_logits_NU, teacher_logits_NU, tp_group)
    raise_at_row(
        {
            "kl_budget is negative, infinite or NaN": ~((budget_N >= 0) & (budget_N < torch.inf)),
            **pair.student.problems("student"),
            **pair.teacher.problems("teacher"),
            "logits are -inf in one model only": pair.is_lopsided_N,
        }
    )
    return _search(pair, budget_N, tp_group)


def _search(pair: Pair, budget_N: Tensor, tp_group: dist.ProcessGroup | None) -> Behavior:
    """Settle what the first round decides, then narrow the bracket [low, high) of β of the others.

    A round evaluates the open rows, and those only: one pass over their logits, one all-gather.
    """
    # Rows within this of KL(q||p) = budget are looked at, at β = 1.
    slack_N = _KL_ROUNDING * (1 + pair.kl_teacher_student_N.abs())
    is_teacher_N = (pair.kl_teacher_student_N + slack_N <= budget_N) | (pair.max_ratio_N == 0)
    is_teacher_N &= budget_N > 0
    ends_FN2 = torch.stack((torch.stack(pair.at_student), torch.stack(pair.at_teacher)), dim=-1)
    settled_FN = torch.where(is_teacher_N, ends_FN2[..., 1], ends_FN2[..., 0])
    is_open_N = ~is_teacher_N & (budget_N > 0)
    is_wide_N = pair.max_ratio_N > FLOAT32_MAX_RATIO
    rows = OpenRows(
        (is_open_N & ~is_wide_N).nonzero()[:, 0], (is_open_N & is_wide_N).nonzero()[:, 0]
    )
    rows_M = rows.all_M
    ends_FM2 = ends_FN2[:, rows_M]
    is_unclear_M = (pair.kl_teacher_student_N - slack_N <= budget_N)[rows_M]
    for round_index in range(_NUM_PREDICTED_ROUNDS + _NUM_GRID_ROUNDS):
        if len(rows_M) == 0:
            break
        budget_M = budget_N[rows_M]
        target_M = budget_M * (1 - _RELATIVE_TOLERANCE)
        candidates_MJ = predict(ends_FM2, target_M)
        if round_index < _NUM_PREDICTED_ROUNDS:
            candidates_MJ = candidates_MJ[:, :1]
        else:
            candidates_MJ = torch.cat((candidates_MJ, grid(ends_FM2[0])), dim=-1)
        candidates_MJ = round_between(ends_FM2[0], candidates_MJ)
        if round_index == 0:
            candidates_MJ = torch.where(is_unclear_M[:, None], 1.0, candidates_MJ)
        found_FMJ = torch.stack(evaluate(rows, candidates_MJ, pair, tp_group))
        ends_FM2 = _narrow(ends_FM2, found_FMJ, budget_M)
        best_FM, is_settled_M = _finish(ends_FM2, target_M, pair.max_ratio_N[rows_M])
        settled_FN[:, rows_M] = best_FM
        rows, kept_M = rows.keep(~is_settled_M)
        rows_M, ends_FM2 = rows.all_M, ends_FM2[:, kept_M]
    return _build_behavior(pair, Point(*settled_FN))


def _narrow(ends_FM2: Tensor, found_FMJ: Tensor, budget_M: Tensor) -> Tensor:
    """The largest known β that keeps the budget and the smallest that does not, [F, M, 2]."""
    points_FMJ = torch.cat((ends_FM2, found_FMJ), dim=-1)
    blend_coef_MJ, kl_MJ = points_FMJ[0], points_FMJ[1]
    is_feasible_MJ = kl_MJ <= budget_M[:, None]
    # The KL of the path's own ends is not exact, but which side they are on is known.
    is_feasible_MJ[:, 0], is_feasible_MJ[:, 1] = True, False
    low_M = torch.where(is_feasible_MJ, blend_coef_MJ, -1.0).argmax(dim=-1)
    high_M = torch.where(is_feasible_MJ, 2.0, blend_coef_MJ).argmin(dim=-1)
    index_M2 = torch.stack((low_M, high_M), dim=-1)
    return points_FMJ.gather(-1, index_M2.expand(len(points_FMJ), -1, -1))


def _finish(ends_FM2: Tensor, target_M: Tensor, max_ratio_M: Tensor) -> tuple[Tensor, Tensor]:
    """The best feasible point, [F, M], and whether it is the solution, [M]."""
    step_M2, error_M2 = Point(*ends_FM2).step_to(target_M[:, None], max_ratio_M[:, None])
    blend_coef_M2 = ends_FM2[0]
    # The ends of the path are not known well enough to start from them.
    is_known_M2 = (blend_coef_M2 > 0) & (blend_coef_M2 < 1)
    error_M2 = torch.where(is_known_M2, error_M2, torch.inf).nan_to_num_(torch.inf, torch.inf)
    error_M1, near_M1 = error_M2.min(dim=-1, keepdim=True)
    near_FM = ends_FM2.gather(-1, near_M1.expand(len(ends_FM2), -1, -1))[..., 0]
    blend_coef_M = round_down(near_FM[0] + step_M2.gather(-1, near_M1)[:, 0])
    moved_FM = torch.stack(Point(*near_FM).moved_to(blend_coef_M))
    is_close_M = error_M1[:, 0] <= _RELATIVE_TOLERANCE * target_M
    low_M, high_M = blend_coef_M2.unbind(dim=-1)
    # Neighbors in fp32, or the teacher.
    is_stuck_M = (high_M - low_M <= _FLOAT32_SPACING * high_M) | (low_M == 1)
    return torch.where(is_close_M, moved_FM, ends_FM2[..., 0]), is_close_M | is_stuck_M


def _build_behavior(pair: Pair, at: Point) -> Behavior:
    blend_coef_N = at.blend_coef
    is_blend_N = (blend_coef_N > 0) & (blend_coef_N < 1)
    wide_N = is_blend_N & (pair.max_ratio_N > FLOAT32_MAX_RATIO)
    log_partition_N = at.log_partition - blend_coef_N * pair.kl_student_teacher_N
    return Behavior(
        blend_coef=blend_coef_N.float(),
        kl_student=at.kl.clamp_min(0).float(),
        student=pair.student,
        teacher=pair.teacher,
        log_partition_N=torch.where(is_blend_N, log_partition_N, 0.0),
        wide_rows=wide_N.nonzero()[:, 0],
    )
