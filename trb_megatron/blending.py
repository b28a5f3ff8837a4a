"""The behavior policy of Trust-Region behavior Blending (TRB): solver, schedule, stop ids, draw.

p = student, q = teacher, mu = behavior policy, r = log q - log p; natural logarithms. Per prefix
mu is the distribution closest to the teacher, in KL(mu||q), within KL(mu||p) <= budget of the
student: mu ~ p^(1-b) q^b at the largest b in [0, 1] that keeps the budget (Plyusov et al., arXiv
2605.31159).

Shapes: N rows (prefixes), M a subset of them, J candidates per row, K ids of a row, R ranks of the
tensor-parallel group, V full vocabulary, U this rank's shard. An id that is -inf in both models
does not exist.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.vocab_parallel import (
    FLOAT32_MIN,
    ShardSoftmax,
    Softmax,
    all_gather,
    combine_softmax,
    gather_at,
    mask_invalid,
    raise_at_row,
    sample_inverse_cdf,
    shard_softmax,
    vocab_range,
    vocab_size,
)

# A row is settled when its KL is between (1 - 2 * this) * budget and the budget.
_RELATIVE_TOLERANCE = 1e-5
# fp32 evaluates the KL of a blend to about this times its square root.
_FLOAT32_NOISE = 3e-8
# Newton settles typical rows in two or three rounds. The others (a nearly deterministic model) have
# a KL that jumps from almost 0 to large values, and get a grid of candidates per round instead.
_NUM_NEWTON_ROUNDS = 3
_NUM_GRID_ROUNDS = 4
_NUM_GRID_POINTS = 8
# Beyond this |r| the rounding of fp32 log-weights shows in the KL: such rows are done in float64.
_FLOAT32_MAX_RATIO = 256.0
# A residual mass below this is rounding of fp32 log-probabilities.
_RESIDUAL_FLOOR = 1e-6


@dataclass(frozen=True)
class Behavior:
    """The behavior policy at N prefixes."""

    blend_coef: Tensor
    """[N] fp32, b in [0, 1]: 0 is the student, 1 the teacher."""
    kl_student: Tensor
    """[N] fp32, KL(mu||p) in nats."""
    kl_teacher: Tensor
    """[N] fp32, KL(mu||q) in nats."""
    entropy: Tensor
    """[N] fp32, of mu, in nats."""
    student: Softmax
    teacher: Softmax
    log_partition_N: Tensor
    """[N] float64, log of the sum of p^(1-b) q^b; exactly 0 at b = 0 and b = 1."""
    wide_rows: Tensor
    """[M] int64, rows whose log-ratios are too large for fp32 arithmetic."""

    def logprobs(self) -> Tensor:
        """Return log mu on this shard, [N, U] fp32, -inf at ids that do not exist.

        Bitwise the student's log-softmax where b = 0 and the teacher's where b = 1. No
        communication, not differentiable.
        """
        coef_N1, log_partition_N1 = self.blend_coef[:, None], self.log_partition_N[:, None]
        logprobs_NU = _blend(
            self.student.logprobs(), self.teacher.logprobs(), coef_N1, log_partition_N1
        )
        if len(self.wide_rows) > 0:
            rows = self.wide_rows
            logprobs_NU[rows] = _blend(
                self.student.logprobs(rows, torch.float64),
                self.teacher.logprobs(rows, torch.float64),
                coef_N1[rows],
                log_partition_N1[rows],
            ).float()
        return logprobs_NU


def _blend(
    student_NU: Tensor, teacher_NU: Tensor, coef_N1: Tensor, log_partition_N1: Tensor
) -> Tensor:
    coef_N1 = coef_N1.to(student_NU.dtype)
    blend_NU = (1 - coef_N1) * student_NU + coef_N1 * teacher_NU
    blend_NU -= log_partition_N1.to(student_NU.dtype)
    # 0 * -inf is NaN at ids that do not exist.
    return blend_NU.masked_fill_(student_NU == -torch.inf, -torch.inf)


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
    shards, are ignored whatever they hold. A budget of 0 gives the student (b = 0) and a budget of
    at least KL(q||p) the teacher (b = 1); otherwise the result is on the feasible side.

    One all-gather over `tp_group` for the moments, then at most seven more for the rows that need a
    search; logits sharded, budget and results replicated and bit-identical; upcast to fp32; not
    differentiable. Raises ValueError, on all ranks alike, for a budget that is negative or not
    finite and for a NaN, a +inf or an id that is -inf in one model only, naming the row.
    """
    student_logits_NU = mask_invalid(student_logits_NU.detach(), num_valid, tp_group)
    teacher_logits_NU = mask_invalid(teacher_logits_NU.detach(), num_valid, tp_group)
    budget_N = _validate_budget(kl_budget, student_logits_NU)
    pair = _gather_pair(student_logits_NU, teacher_logits_NU, tp_group)
    state = _SolverState(pair, budget_N)
    search_M = state.rows_to_search()
    if len(search_M) > 0:
        _search(state, pair, search_M, tp_group)
    return state.behavior()


def _validate_budget(kl_budget: float | Tensor, logits_NU: Tensor) -> Tensor:
    budget = torch.as_tensor(kl_budget, dtype=torch.float64, device=logits_NU.device)
    budget_N = budget.expand(len(logits_NU))
    raise_at_row(
        ~((budget_N >= 0) & (budget_N < torch.inf)), "kl_budget is negative, infinite or NaN"
    )
    return budget_N


class _Pair(NamedTuple):
    """Student and teacher normalized, with the moments of r that the first round gives."""

    student: Softmax
    teacher: Softmax
    kl_teacher_student_N: Tensor  # KL(q||p)
    kl_student_teacher_N: Tensor  # KL(p||q)
    center_N: Tensor  # mean under p of (z_T - max z_T) - (z_S - max z_S)
    variance_N: Tensor  # of r, under p
    max_ratio_N: Tensor  # at least max |r - E_p r|


def _gather_pair(
    student_NU: Tensor, teacher_NU: Tensor, tp_group: dist.ProcessGroup | None
) -> _Pair:
    student, teacher = shard_softmax(student_NU), shard_softmax(teacher_NU)
    partials_N10 = torch.cat(
        (student.partials_N3, teacher.partials_N3, _ratio_partials(student, teacher)), dim=-1
    )
    partials_RN10 = all_gather(partials_N10, tp_group)
    pair = [
        combine_softmax(student, partials_RN10[..., :3], "student"),
        combine_softmax(teacher, partials_RN10[..., 3:6], "teacher"),
    ]
    raise_at_row(
        partials_RN10[..., 9].amax(dim=0) == torch.inf, "logits are -inf in one model only"
    )
    return _combine_moments(pair[0], pair[1], partials_RN10)


def _ratio_partials(student: ShardSoftmax, teacher: ShardSoftmax) -> Tensor:
    """Sums over the shard of w, w^2 under exp_S, of w under exp_T, and max |w|; [N, 4] float64.

    w = (z_T - max z_T) - (z_S - max z_S) with the shard's own maxima.
    """
    # -inf - (-inf) is NaN at ids that do not exist; -inf on one side stays infinite.
    ratio_NU = (teacher.shifted_NU - student.shifted_NU).nan_to_num_(
        nan=0.0, posinf=torch.inf, neginf=-torch.inf
    )
    first_NU = student.exp_NU * ratio_NU
    columns = (
        first_NU.sum(dim=-1),
        first_NU.mul_(ratio_NU).sum(dim=-1),
        (teacher.exp_NU * ratio_NU).sum(dim=-1),
        torch.linalg.vector_norm(ratio_NU, torch.inf, dim=-1),
    )
    return torch.stack(columns, dim=-1).double()


def _combine_moments(student: Softmax, teacher: Softmax, partials_RN10: Tensor) -> _Pair:
    max_s_RN, sum_s_RN, _, max_t_RN, sum_t_RN, _, first_RN, second_RN, first_t_RN, norm_RN = (
        partials_RN10.unbind(dim=-1)
    )
    # Re-base every shard's w to the maxima over all shards: it moves by `shift`.
    offset_s_RN, offset_t_RN = max_s_RN - student.max_N, max_t_RN - teacher.max_N
    shift_RN = torch.where(sum_s_RN > 0, offset_t_RN - offset_s_RN, 0.0)
    sum_s_RN, first_RN, second_RN = (x * offset_s_RN.exp() for x in (sum_s_RN, first_RN, second_RN))
    sum_t_RN, first_t_RN = (x * offset_t_RN.exp() for x in (sum_t_RN, first_t_RN))
    second_RN = second_RN + 2 * shift_RN * first_RN + shift_RN.square() * sum_s_RN
    mean_N = (first_RN + shift_RN * sum_s_RN).sum(dim=0) / sum_s_RN.sum(dim=0)
    mean_t_N = (first_t_RN + shift_RN * sum_t_RN).sum(dim=0) / sum_t_RN.sum(dim=0)
    log_sums_N = teacher.log_sum_N - student.log_sum_N
    return _Pair(
        student,
        teacher,
        kl_teacher_student_N=mean_t_N - log_sums_N,
        kl_student_teacher_N=log_sums_N - mean_N,
        center_N=mean_N,
        variance_N=second_RN.sum(dim=0) / sum_s_RN.sum(dim=0) - mean_N.square(),
        max_ratio_N=(norm_RN + shift_RN.abs()).amax(dim=0) + mean_N.abs(),
    )


class _Evaluation(NamedTuple):
    """The blend at candidates b; each field is [M, J] float64."""

    coef: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    entropy: Tensor
    log_partition: Tensor  # log of the sum of p^(1-b) q^b
    variance: Tensor  # of b*r under the blend


class _SolverState:
    """Per row: the bracket [low, high) of the search and the blend at its feasible end."""

    def __init__(self, pair: _Pair, budget_N: Tensor) -> None:
        self.pair, self.budget_N = pair, budget_N
        zeros_N = torch.zeros_like(budget_N)
        self.low = _Evaluation(
            zeros_N.clone(),
            zeros_N.clone(),
            pair.kl_student_teacher_N.clone(),
            pair.student.entropy_N.clone(),
            zeros_N.clone(),
            zeros_N.clone(),
        )
        self.high = _Evaluation(*(zeros_N.clone() for _ in _Evaluation._fields))
        self.high.coef.fill_(1.0)

    def rows_to_search(self) -> Tensor:
        """Settle the rows that the first round decides and return the others, [M] int64."""
        teacher_N, budget_N = self.pair.kl_teacher_student_N, self.budget_N
        # Sums in fp32 leave this uncertainty; rows within it are looked at again, at b = 1.
        slack_N = 2e-6 * (1 + teacher_N.abs())
        is_teacher_N = (teacher_N + slack_N <= budget_N) | (self.pair.max_ratio_N == 0)
        is_teacher_N &= budget_N > 0
        at_teacher = (
            torch.ones_like(budget_N),
            teacher_N,
            torch.zeros_like(budget_N),
            self.pair.teacher.entropy_N,
            torch.zeros_like(budget_N),
        )
        for low_N, value_N in zip(self.low, at_teacher, strict=False):
            low_N[is_teacher_N] = value_N[is_teacher_N]
        self.unclear_N = (teacher_N - slack_N <= budget_N) & ~is_teacher_N
        return (~is_teacher_N & (budget_N > 0)).nonzero(as_tuple=True)[0]

    def first_candidates(self, rows_M: Tensor) -> Tensor:
        """b where the quadratic expansion of the KL around the student meets the budget, [M, 1]."""
        start_M = (2 * self.budget_N[rows_M] / self.pair.variance_N[rows_M]).sqrt()
        start_M = torch.where((start_M < 1) & ~self.unclear_N[rows_M], start_M, 1.0)
        return start_M.float().double()[:, None]

    def narrow(self, rows_M: Tensor, found: _Evaluation) -> Tensor:
        """Move the bracket to the candidates found, and return which rows are not settled, [M]."""
        budget_M1 = self.budget_N[rows_M, None]
        feasible_MJ = found.kl_student <= budget_M1
        best = torch.where(feasible_MJ, found.coef, -1.0).max(dim=-1, keepdim=True)
        least = torch.where(feasible_MJ, 2.0, found.coef).min(dim=-1, keepdim=True)
        raised_M = best.values[:, 0] > self.low.coef[rows_M]
        lowered_M = least.values[:, 0] <= self.high.coef[rows_M]
        for low_N, high_N, found_MJ in zip(self.low, self.high, found, strict=True):
            low_N[rows_M[raised_M]] = found_MJ.gather(-1, best.indices)[raised_M, 0]
            high_N[rows_M[lowered_M]] = found_MJ.gather(-1, least.indices)[lowered_M, 0]
        return self._is_open(rows_M)

    def _is_open(self, rows_M: Tensor) -> Tensor:
        low_M, high_M = self.low.coef[rows_M], self.high.coef[rows_M]
        budget_M = self.budget_N[rows_M]
        gap_M = budget_M - self.low.kl_student[rows_M]
        tolerance_M = 2 * _RELATIVE_TOLERANCE * budget_M + _FLOAT32_NOISE * (2 * budget_M).sqrt()
        return (gap_M > tolerance_M) & (high_M - low_M > 1.2e-7 * high_M)

    def newton_candidates(self, rows_M: Tensor, last: _Evaluation) -> Tensor:
        """One Newton step from the last evaluation, inside the bracket, [M, 1]."""
        low_M1, high_M1 = self.low.coef[rows_M, None], self.high.coef[rows_M, None]
        in_root_M1, in_log_M1 = _newton_steps(last, self.budget_N[rows_M, None])
        middle_M1 = (low_M1 + high_M1) / 2
        fallback_M1 = _round_between(low_M1, high_M1, in_log_M1, middle_M1)
        return _round_between(low_M1, high_M1, in_root_M1, fallback_M1)

    def grid_candidates(self, rows_M: Tensor) -> Tensor:
        """Evenly spaced points of the bracket and Newton steps from its two ends, [M, J]."""
        low, high = (
            _Evaluation(*(field[rows_M, None] for field in end)) for end in (self.low, self.high)
        )
        fractions_J = torch.arange(1, _NUM_GRID_POINTS + 1, device=rows_M.device).double()
        even_MJ = low.coef + (high.coef - low.coef) * fractions_J / (_NUM_GRID_POINTS + 1)
        budget_M1 = self.budget_N[rows_M, None]
        steps = (*_newton_steps(low, budget_M1), *_newton_steps(high, budget_M1))
        candidates_MJ = torch.cat((even_MJ, *steps), dim=-1)
        middle_M1 = (low.coef + high.coef) / 2
        return _round_between(low.coef, high.coef, candidates_MJ, middle_M1)

    def behavior(self) -> Behavior:
        """Return the feasible ends as the result."""
        coef_N = self.low.coef
        is_blend_N = (coef_N > 0) & (coef_N < 1)
        wide_N = is_blend_N & (self.pair.max_ratio_N > _FLOAT32_MAX_RATIO)
        return Behavior(
            blend_coef=coef_N.float(),
            kl_student=self.low.kl_student.clamp_min(0).float(),
            kl_teacher=self.low.kl_teacher.clamp_min(0).float(),
            entropy=self.low.entropy.clamp_min(0).float(),
            student=self.pair.student,
            teacher=self.pair.teacher,
            log_partition_N=torch.where(is_blend_N, self.low.log_partition, 0.0),
            wide_rows=wide_N.nonzero(as_tuple=True)[0],
        )


def _newton_steps(at: _Evaluation, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Newton steps toward the budget on sqrt(2 KL), almost linear in b near the student, and on
    log KL, almost linear where the blend is nearly deterministic. Not finite where undefined."""
    target = budget * (1 - _RELATIVE_TOLERANCE)
    # d KL / d b = Var(b*r) / b
    scale = at.coef * at.kl_student / at.variance
    root_step = 2 * (1 - (target / at.kl_student).sqrt()) * scale
    log_step = (at.kl_student / target).log() * scale
    return at.coef - root_step, at.coef - log_step


def _round_between(low: Tensor, high: Tensor, candidates: Tensor, otherwise: Tensor) -> Tensor:
    """Replace candidates that are outside (low, high) and round all to fp32 numbers inside it.

    The result is stated in fp32, so that is where the KL has to be known. A step that rounds to an
    end of the bracket becomes that end's neighbor.
    """
    is_inside = (candidates > low) & (candidates < high)
    rounded = torch.where(is_inside, candidates, otherwise).float()
    above, below = torch.ones_like(low.float()), torch.zeros_like(high.float())
    least, most = torch.nextafter(low.float(), above), torch.nextafter(high.float(), below)
    return rounded.clamp(least, most).double()


def _search(
    state: _SolverState, pair: _Pair, rows_M: Tensor, tp_group: dist.ProcessGroup | None
) -> None:
    """Narrow the bracket of `rows_M`, one all-gather per round, dropping rows as they settle."""
    wide_M = pair.max_ratio_N[rows_M] > _FLOAT32_MAX_RATIO
    shards = [
        _RatioShard.build(pair, rows_M[~wide_M], torch.float32),
        _RatioShard.build(pair, rows_M[wide_M], torch.float64),
    ]
    rows_M = torch.cat([shard.rows_M for shard in shards])
    candidates_MJ = state.first_candidates(rows_M)
    for round_index in range(1, _NUM_NEWTON_ROUNDS + _NUM_GRID_ROUNDS + 1):
        found = _evaluate(shards, candidates_MJ, pair, tp_group)
        open_M = state.narrow(rows_M, found)
        if not open_M.any():
            return
        split = torch.split(open_M, [len(shard.rows_M) for shard in shards])
        shards = [shard.keep(mask_M) for shard, mask_M in zip(shards, split, strict=True)]
        rows_M = rows_M[open_M]
        if round_index < _NUM_NEWTON_ROUNDS:
            last = _Evaluation(*(field[open_M] for field in found))
            candidates_MJ = state.newton_candidates(rows_M, last)
        else:
            candidates_MJ = state.grid_candidates(rows_M)


class _RatioShard(NamedTuple):
    """log p and r - E_p[r] of the rows that are searched, in the precision that they need."""

    rows_M: Tensor
    logp_MU: Tensor
    ratio_MU: Tensor

    @classmethod
    def build(cls, pair: _Pair, rows_M: Tensor, dtype: torch.dtype) -> "_RatioShard":
        student_MU, teacher_MU = (
            softmax.logits_NU[rows_M].to(dtype) - softmax.max_N[rows_M, None].to(dtype)
            for softmax in (pair.student, pair.teacher)
        )
        ratio_MU = teacher_MU.sub_(student_MU).sub_(pair.center_N[rows_M, None].to(dtype))
        logp_MU = student_MU.sub_(pair.student.log_sum_N[rows_M, None].to(dtype))
        # An id that does not exist: no mass, and a finite logarithm that multiplies it to 0.
        return cls(rows_M, logp_MU.clamp_min_(FLOAT32_MIN), ratio_MU.nan_to_num_(nan=0.0))

    def keep(self, mask_M: Tensor) -> "_RatioShard":
        return self if mask_M.all() else _RatioShard(*(field[mask_M] for field in self))

    def partials(self, coef_M: Tensor) -> Tensor:
        """This shard's sums at one b per row, [M, 6] float64.

        With x = b * (r - E_p r), scaled by exp(-m): sums of p x, p (e^x - 1 - x), p x (e^x - 1),
        p e^x x^2 and p e^x log p; first m, the shard's largest log p + x, at least 0.
        """
        x_MU = self.ratio_MU * coef_M[:, None].to(self.ratio_MU.dtype)
        logw_MU = self.logp_MU + x_MU
        max_M = logw_MU.amax(dim=-1).clamp_min(0)
        weight_MU = logw_MU.sub_(max_M[:, None]).exp_()
        p_MU = (self.logp_MU - max_M[:, None]).exp_()
        # Small x: the differences cancel unless expm1 takes them. Large x: e^x overflows alone.
        expm1_MU = x_MU.expm1()
        is_small_MU = x_MU.abs() < 1
        first_MU = torch.where(is_small_MU, p_MU * expm1_MU, weight_MU - p_MU)
        second_MU = torch.where(
            is_small_MU, p_MU * (expm1_MU - x_MU), weight_MU - p_MU * (1 + x_MU)
        )
        columns = (
            max_M,
            (p_MU * x_MU).sum(dim=-1),
            second_MU.sum(dim=-1),
            first_MU.mul_(x_MU).sum(dim=-1),
            x_MU.square_().mul_(weight_MU).sum(dim=-1),
            weight_MU.mul_(self.logp_MU).sum(dim=-1),
        )
        return torch.stack([column.double() for column in columns], dim=-1)


def _evaluate(
    shards: list[_RatioShard],
    candidates_MJ: Tensor,
    pair: _Pair,
    tp_group: dist.ProcessGroup | None,
) -> _Evaluation:
    """Evaluate the blend at every candidate; one all-gather over `tp_group`."""
    rows_M = torch.cat([shard.rows_M for shard in shards])
    by_shard = torch.split(candidates_MJ, [len(shard.rows_M) for shard in shards])
    partials_MJ6 = torch.cat(
        [
            torch.stack([shard.partials(coef_M) for coef_M in coefs_MJ.unbind(-1)], dim=1)
            for shard, coefs_MJ in zip(shards, by_shard, strict=True)
        ]
    )
    partials_RMJ6 = all_gather(partials_MJ6, tp_group)
    max_MJ = partials_RMJ6[..., 0].amax(dim=0)
    scale_RMJ = (partials_RMJ6[..., 0] - max_MJ).exp()
    sums_MJ5 = (partials_RMJ6[..., 1:] * scale_RMJ[..., None]).sum(dim=0)
    # `centering` is 0 up to rounding, because r is centered.
    centering_MJ, curvature_MJ, mixed_MJ, second_MJ, logp_MJ = sums_MJ5.unbind(dim=-1)
    excess_MJ = torch.expm1(-max_MJ) + centering_MJ + curvature_MJ
    z_MJ, log_z_MJ = 1 + excess_MJ, max_MJ + excess_MJ.log1p()
    mean_x_MJ = (centering_MJ + mixed_MJ) / z_MJ
    kl_student_MJ = mean_x_MJ - log_z_MJ
    kl_student_teacher_M1 = pair.kl_student_teacher_N[rows_M, None]
    return _Evaluation(
        coef=candidates_MJ,
        kl_student=kl_student_MJ,
        kl_teacher=kl_student_MJ - mean_x_MJ / candidates_MJ + kl_student_teacher_M1,
        entropy=log_z_MJ - mean_x_MJ - logp_MJ / z_MJ,
        log_partition=log_z_MJ - candidates_MJ * kl_student_teacher_M1,
        variance=second_MJ / z_MJ - mean_x_MJ.square(),
    )


def kl_budget_at(step: int, kl_budget: float, warmup_steps: int, schedule: str = "linear") -> float:
    """Return the KL budget in nats of optimizer step `step`, counted from 0.

    "linear" is kl_budget * (1 - step / warmup_steps), "constant" is kl_budget; both are 0 from
    step `warmup_steps` on. Raises ValueError for a negative or non-finite budget, a negative step
    or number of steps, or another schedule.
    """
    if schedule not in ("linear", "constant"):
        raise ValueError(f"schedule {schedule!r} is neither 'linear' nor 'constant'")
    if not (math.isfinite(kl_budget) and kl_budget >= 0):
        raise ValueError(f"kl_budget={kl_budget} must be finite and at least 0")
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step={step} and warmup_steps={warmup_steps} must be at least 0")
    if step >= warmup_steps:
        return 0.0
    return kl_budget * (1 - step / warmup_steps) if schedule == "linear" else kl_budget


@dataclass(frozen=True)
class StopAlignment:
    """The end-of-sequence ids of both models, in the order of their generation configs.

    Raises ValueError when a model has none.
    """

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, ids in (("student", self.student_ids), ("teacher", self.teacher_ids)):
            if not ids:
                raise ValueError(f"the {name} has no end-of-sequence id")

    @property
    def stop_id(self) -> int:
        """The one id that stands for stopping: the student's first."""
        return self.student_ids[0]

    @property
    def removed_ids(self) -> tuple[int, ...]:
        """The ids that no longer exist after the merge, ascending."""
        return tuple(sorted({*self.student_ids, *self.teacher_ids} - {self.stop_id}))

    @property
    def is_trivial(self) -> bool:
        """Whether both models stop with the same single id, so that there is nothing to merge."""
        return not self.removed_ids


def align_stop_ids(
    logits_NU: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Make stopping one id: a model's own stop ids merge into `alignment.stop_id`.

    Column stop_id becomes the logsumexp over `own_ids` (this model's stop ids) and the removed ids
    become -inf. Divide by the temperature before. Returns `logits_NU` itself when trivial.

    One all-gather over `tp_group` forward and one backward (explicit); logits and result sharded,
    [N, U], dtype kept. Differentiable: the merged column's gradient spreads over `own_ids` by
    softmax, removed ids that are not among them get zero. Raises ValueError for an id beyond the
    vocabulary.
    """
    if alignment.is_trivial:
        return logits_NU
    return _MergeStopIds.apply(logits_NU, own_ids, alignment, tp_group)


class _MergeStopIds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NU: Tensor,
        own_ids: tuple[int, ...],
        alignment: StopAlignment,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        merged_NU = logits_NU.clone()
        shares_NK = merge_stop_ids_(merged_NU, own_ids, alignment, tp_group=tp_group)
        ctx.save_for_backward(shares_NK)
        ctx.own_ids, ctx.alignment, ctx.tp_group = own_ids, alignment, tp_group
        return merged_NU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (shares_NK,) = ctx.saved_tensors
        grad_NU = grads[0].clone()
        spread_stop_gradient_(grad_NU, shares_NK, ctx.own_ids, ctx.alignment, tp_group=ctx.tp_group)
        return grad_NU, None, None, None


def merge_stop_ids_(
    logits_NU: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """`align_stop_ids` in place and outside of autograd.

    Returns the shares [N, K] fp32 of the merged logit's gradient that go to the distinct
    `own_ids`. One all-gather over `tp_group`; logits sharded, shares replicated.
    """
    num_columns = vocab_size(logits_NU.shape[-1], tp_group)
    for stop_id in (*own_ids, alignment.stop_id, *alignment.removed_ids):
        if not 0 <= stop_id < num_columns:
            raise ValueError(f"end-of-sequence id {stop_id} is beyond the vocabulary")
    ids_K = torch.tensor(_distinct(own_ids), device=logits_NU.device)
    ids_NK = ids_K.expand(len(logits_NU), -1)
    own_NK = gather_at(logits_NU, ids_NK, tp_group=tp_group).float()
    start, stop = vocab_range(logits_NU.shape[-1], tp_group)
    logits_NU[:, _columns(alignment.removed_ids, start, stop)] = -torch.inf
    if start <= alignment.stop_id < stop:
        logits_NU[:, alignment.stop_id - start] = own_NK.logsumexp(dim=-1).to(logits_NU.dtype)
    return own_NK.softmax(dim=-1)


def spread_stop_gradient_(
    grad_NU: Tensor,
    shares_NK: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """Turn the gradient of merged logits into that of the logits before, in place.

    `shares_NK` are those that `merge_stop_ids_` returned. One all-gather over `tp_group`; gradient
    sharded, shares replicated.
    """
    stop_N = torch.full((len(grad_NU),), alignment.stop_id, device=grad_NU.device)
    merged_N1 = gather_at(grad_NU, stop_N, tp_group=tp_group)[:, None].float()
    own_NK = (merged_N1 * shares_NK).to(grad_NU.dtype)
    start, stop = vocab_range(grad_NU.shape[-1], tp_group)
    grad_NU[:, _columns((alignment.stop_id, *alignment.removed_ids), start, stop)] = 0
    own_ids = _distinct(own_ids)
    local = [k for k, own_id in enumerate(own_ids) if start <= own_id < stop]
    grad_NU[:, [own_ids[k] - start for k in local]] = own_NK[:, local]


def spread_stop_columns(
    ids_NK: Tensor,
    grad_NK: Tensor,
    shares_NJ: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
) -> tuple[Tensor, Tensor]:
    """`spread_stop_gradient_` for a gradient of K columns per row, given by global ids.

    Returns ids and values [N, K + J] for J distinct `own_ids`. `ids_NK` name no removed id and none
    twice; the result may name one twice, whose values add up. No communication.
    """
    is_stop_NK = ids_NK == alignment.stop_id
    merged_N1 = torch.where(is_stop_NK, grad_NK, 0.0).sum(dim=-1, keepdim=True)
    own_NJ = torch.tensor(_distinct(own_ids), device=ids_NK.device).expand(len(ids_NK), -1)
    kept_NK = torch.where(is_stop_NK, 0.0, grad_NK)
    return torch.cat((ids_NK, own_NJ), -1), torch.cat((kept_NK, merged_N1 * shares_NJ), -1)


def _distinct(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids in their order, each once."""
    return tuple(dict.fromkeys(ids))


def _columns(ids: tuple[int, ...], start: int, stop: int) -> list[int]:
    """The local columns of those `ids` that this shard owns."""
    return [i - start for i in ids if start <= i < stop]


class Draw(NamedTuple):
    """Tokens drawn from the behavior policy; each field is [N] and replicated."""

    token_ids: Tensor
    """int64, distributed as the behavior policy."""
    proposed_ids: Tensor
    """int64, the student's proposal."""
    accepted: Tensor
    """bool, whether the proposal was accepted (where rounding leaves no residual it stays, too)."""


def propose_tokens(
    student_logprobs_NU: Tensor, u_draft_N: Tensor, *, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Sample the student: the proposal of each position, [N] int64.

    Two all-gathers over `tp_group`; log-probabilities sharded, uniforms and result replicated.
    """
    return sample_inverse_cdf(student_logprobs_NU.exp(), u_draft_N, tp_group=tp_group)


def accept_tokens(
    student_logprob_N: Tensor, behavior_logprob_N: Tensor, u_accept_N: Tensor
) -> Tensor:
    """Accept a proposal when u < mu(y) / p(y), given its log-probabilities; [N] bool."""
    return u_accept_N < (behavior_logprob_N - student_logprob_N).double().exp()


def sample_residual(
    student_logprobs_NU: Tensor,
    behavior_logprobs_NU: Tensor,
    proposed_ids_N: Tensor,
    u_residual_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Sample (mu - p)+ normalized, for proposals that were not accepted, [N] int64.

    Where its mass is below rounding the proposal stays. Three all-gathers over `tp_group`;
    log-probabilities sharded, the rest replicated.
    """
    residual_NU = (behavior_logprobs_NU.exp() - student_logprobs_NU.exp()).clamp_min_(0)
    mass_N = all_gather(residual_NU.sum(dim=-1, dtype=torch.float64), tp_group).sum(dim=0)
    (rows_M,) = (mass_N > _RESIDUAL_FLOOR).nonzero(as_tuple=True)
    token_ids_N = proposed_ids_N.clone()
    token_ids_N[rows_M] = sample_inverse_cdf(
        residual_NU[rows_M], u_residual_N[rows_M], tp_group=tp_group
    )
    return token_ids_N


def draw_tokens(
    student_logprobs_NU: Tensor,
    behavior_logprobs_NU: Tensor,
    u_draft_N: Tensor,
    u_accept_N: Tensor,
    u_residual_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Draw:
    """Draw a token per position from the behavior policy, starting from the student's proposal.

    y ~ p is kept when u_accept < mu(y) / p(y); otherwise the token comes from (mu - p)+ (maximal
    coupling, as in speculative sampling, Leviathan et al., arXiv 2211.17192, section 2.3). The law
    is exactly mu. Where both are bitwise equal the proposal is always kept.

    At most six all-gathers over `tp_group`; log-probabilities sharded [N, U], uniforms ([N] in
    [0, 1)) and results replicated; not differentiable.
    """
    proposed_N = propose_tokens(student_logprobs_NU, u_draft_N, tp_group=tp_group)
    student_N, behavior_N = (
        gather_at(logprobs_NU, proposed_N, tp_group=tp_group)
        for logprobs_NU in (student_logprobs_NU, behavior_logprobs_NU)
    )
    accepted_N = accept_tokens(student_N, behavior_N, u_accept_N)
    token_ids_N = proposed_N.clone()
    (rows_M,) = (~accepted_N).nonzero(as_tuple=True)
    if len(rows_M) > 0:
        token_ids_N[rows_M] = sample_residual(
            student_logprobs_NU[rows_M],
            behavior_logprobs_NU[rows_M],
            proposed_N[rows_M],
            u_residual_N[rows_M],
            tp_group=tp_group,
        )
    return Draw(token_ids_N, proposed_N, accepted_N)
