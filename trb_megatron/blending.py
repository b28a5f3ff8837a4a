"""The behavior policy of Trust-Region behavior Blending (TRB): solver and schedule of the budget.

p = student, q = teacher, mu = behavior policy, r = log q - log p; natural logarithms. Per prefix
mu is the distribution closest to the teacher, in KL(mu||q), within KL(mu||p) <= budget of the
student: mu ~ p^(1-b) q^b at the largest b in [0, 1] that keeps the budget (Plyusov et al., arXiv
2605.31159).

The solver knows the moments of r at both ends of the path from one look at the logits. From them
it predicts b, evaluates the blend there, and takes the remaining small step by a Taylor expansion
whose error is bounded; only where the bound is too large it looks at the logits once more.

Shapes: N rows (prefixes), M a subset of them, J candidates per row, F fields of a `_Point`, R ranks
of the tensor-parallel group, V full vocabulary, U this rank's shard. An id that is -inf in both
models does not exist.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.vocab_parallel import (
    FLOAT32_MIN,
    ShardSoftmax,
    Softmax,
    all_gather,
    combine_softmax,
    mask_invalid,
    raise_at_row,
    row_blocks,
    row_dot,
    rows_per_block,
    shard_softmax,
)

# The search aims this far below the budget, and a last step may err by as much: a row's KL ends
# between (1 - 2 * this) * budget and the budget.
_RELATIVE_TOLERANCE = 1e-5
# One predicted b per round settles almost all rows. What is left after three has a KL that climbs
# in jumps (nearly deterministic models), and gets a grid of candidates per round.
_NUM_PREDICTED_ROUNDS = 3
_NUM_GRID_ROUNDS = 4
_NUM_GRID_POINTS = 8
# Above this |r| sums over e^r overflow fp32, and rounding of r shows in the KL: such rows are done
# in float64.
_FLOAT32_MAX_RATIO = 64.0
# Keeps logarithms of a variance finite.
_LEAST_VARIANCE = 1e-290


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
    shards, are ignored whatever they hold. A budget of 0 gives the student (b = 0) and a budget of
    at least KL(q||p) the teacher (b = 1); otherwise the result is on the feasible side.

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
    pair = _gather_pair(student_logits_NU, teacher_logits_NU, tp_group)
    raise_at_row(
        {
            "kl_budget is negative, infinite or NaN": ~((budget_N >= 0) & (budget_N < torch.inf)),
            **pair.student.problems("student"),
            **pair.teacher.problems("teacher"),
            "logits are -inf in one model only": pair.is_lopsided_N,
        }
    )
    return _search(pair, budget_N, tp_group)


class _Point(NamedTuple):
    """The blend at one b per row; each field is [M] (or [M, J]) float64, packed they are [F, M].

    r is centered here: E_p r = 0. log p lacks the student's log-normalizer.
    """

    coef: Tensor
    kl: Tensor  # KL(mu||p)
    log_partition: Tensor  # log E_p e^(b*r)
    mean: Tensor  # E_mu r
    log_variance: Tensor  # log Var_mu r
    growth: Tensor  # its derivative: the third central moment over the variance
    mean_logp: Tensor  # E_mu log p
    slope_logp: Tensor  # its derivative: Cov_mu(log p, r)

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    def step_to(self, target: Tensor, max_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The step in b to KL = target by the second-order Taylor expansion, and a bound on the
        error of the KL there; not a number, or infinite, where there is none.

        KL' = b*v and KL'' = v + b*k3; the third derivative is 2*k3 + b*k4. With D = 2 max |r|, no
        value of r is farther than D from its mean, so |k3| <= D*v, |k4| <= D^2*v, and v grows at
        most by e^(D |step|).
        """
        variance, gap = self.variance, target - self.kl
        slope, curvature = self.coef * variance, variance * (1 + self.coef * self.growth)
        step = gap / slope
        for _ in range(2):
            step = gap / (slope + curvature / 2 * step)
        spread, size = 2 * max_ratio, step.abs()
        third = spread * (2 + self.coef * spread) * variance * (spread * size).exp()
        return step, third * size**3 / 6

    def moved_to(self, coef: Tensor) -> "_Point":
        """The Taylor expansion at a b near by, without the variance's."""
        step, variance = coef - self.coef, self.variance
        third = variance * self.growth
        slope, curvature = self.coef * variance, variance + self.coef * third
        return self._replace(
            coef=coef,
            kl=self.kl + step * (slope + step * curvature / 2),
            log_partition=self.log_partition
            + step * (self.mean + step * (variance / 2 + step * third / 6)),
            mean=self.mean + step * (variance + step * third / 2),
            mean_logp=self.mean_logp + step * self.slope_logp,
        )


class _Pair(NamedTuple):
    """Student and teacher normalized, and what the first round tells of the path between them."""

    student: Softmax
    teacher: Softmax
    kl_teacher_student_N: Tensor  # KL(q||p)
    kl_student_teacher_N: Tensor  # KL(p||q)
    center_N: Tensor  # mean under p of (z_T - max z_T) - (z_S - max z_S)
    variance_N: Tensor  # of r, under p
    max_ratio_N: Tensor  # at least max |r - E_p r|
    is_lopsided_N: Tensor  # whether an id is -inf in one model only
    base_6N: Tensor  # sums under exp_S, as in `_Block.sums`, at b = 0
    at_student: _Point
    at_teacher: _Point


class _FirstPartials(NamedTuple):
    """Sums over one shard; e = exp(z - its max), w = (z_T - max z_T) - (z_S - max z_S)."""

    max: Tensor
    sum: Tensor  # of e_S
    logp: Tensor  # of e_S * (z_S - max)
    max_t: Tensor
    sum_t: Tensor
    logp_t: Tensor
    mean: Tensor  # of w under e_S
    second: Tensor  # of e_S * (w - mean)^2
    third: Tensor  # of e_S * (w - mean)^3
    cross: Tensor  # of e_S * (w - mean) * (z_S - max)
    mean_t: Tensor  # of w under e_T
    second_t: Tensor
    third_t: Tensor
    least: Tensor  # smallest and largest w
    most: Tensor

    @classmethod
    def of_block(cls, student_NU: Tensor, teacher_NU: Tensor) -> Tensor:
        """[15, N] float64."""
        student, teacher = shard_softmax(student_NU), shard_softmax(teacher_NU)
        ratio_NU = teacher.shifted_NU - student.shifted_NU
        weighted_NU, scratch_NU = torch.empty_like(ratio_NU), teacher.shifted_NU
        least_N, most_N = ratio_NU.amin(dim=-1), ratio_NU.amax(dim=-1)
        # Centered on the shard's own means, the sums do not cancel where r hardly varies.
        mean_N = _center(ratio_NU, student, scratch_NU)
        torch.mul(student.exp_NU, ratio_NU, out=weighted_NU)
        cross_N = row_dot(weighted_NU, student.shifted_NU, scratch_NU)
        second_N = weighted_NU.mul_(ratio_NU).sum(dim=-1)
        third_N = row_dot(weighted_NU, ratio_NU, scratch_NU)
        mean_t_N = mean_N + _center(ratio_NU, teacher, scratch_NU)
        torch.mul(teacher.exp_NU, ratio_NU, out=weighted_NU)
        second_t_N = weighted_NU.mul_(ratio_NU).sum(dim=-1)
        third_t_N = row_dot(weighted_NU, ratio_NU, scratch_NU)
        moments = (mean_N, second_N, third_N, cross_N, mean_t_N, second_t_N, third_t_N)
        columns = torch.stack((*moments, least_N, most_N)).double()
        return torch.cat((student.partials_N3.T, teacher.partials_N3.T, columns))


def _center(ratio_NU: Tensor, shard: ShardSoftmax, scratch_NU: Tensor) -> Tensor:
    """Subtract the mean under a model from each row in place; return the mean."""
    # The sum is at least 1, or 0 in a shard without an existing id.
    sum_N = shard.partials_N3[:, 1].clamp_min(1).float()
    mean_N = row_dot(shard.exp_NU, ratio_NU, scratch_NU) / sum_N
    ratio_NU.sub_(mean_N[:, None])
    return mean_N


def _gather_pair(
    student_NU: Tensor, teacher_NU: Tensor, tp_group: dist.ProcessGroup | None
) -> _Pair:
    """Normalize both models and find the moments of r at both ends; one all-gather."""
    partials_15N = torch.cat(
        [
            _FirstPartials.of_block(student_NU[rows], teacher_NU[rows])
            for rows in row_blocks(student_NU)
        ],
        dim=-1,
    )
    partials_RN15 = all_gather(partials_15N.T, tp_group)
    student = combine_softmax(student_NU, partials_RN15[..., :3])
    teacher = combine_softmax(teacher_NU, partials_RN15[..., 3:6])
    return _combine_moments(student, teacher, _FirstPartials(*partials_RN15.unbind(dim=-1)))


def _combine_moments(student: Softmax, teacher: Softmax, shard: _FirstPartials) -> _Pair:
    """Add the partials of all shards; fields of `shard` are [R, N]."""
    # Re-base every shard to the maxima over all shards: its w moves by `shift`.
    offset_RN, offset_t_RN = shard.max - student.max_N, shard.max_t - teacher.max_N
    shift_RN = torch.where(shard.sum > 0, offset_t_RN - offset_RN, 0.0)
    mean_N, deviation_RN, second_N, third_N = _add_moments(
        offset_RN, shift_RN, shard.sum, shard.mean, shard.second, shard.third
    )
    mean_t_N, _, second_t_N, third_t_N = _add_moments(
        offset_t_RN, shift_RN, shard.sum_t, shard.mean_t, shard.second_t, shard.third_t
    )
    logp_RN = shard.logp + offset_RN * shard.sum
    scale_RN = offset_RN.exp()
    sum_N = (scale_RN * shard.sum).sum(dim=0)
    logp_N = (scale_RN * logp_RN).sum(dim=0)
    cross_N = (scale_RN * (shard.cross + deviation_RN * logp_RN)).sum(dim=0)
    sum_t_N = teacher.log_sum_N.exp()
    zeros_N = torch.zeros_like(mean_N)
    log_sums_N = teacher.log_sum_N - student.log_sum_N
    kl_student_teacher_N = log_sums_N - mean_N
    extremes_RN = torch.maximum(
        (shard.least + shift_RN - mean_N).abs(), (shard.most + shift_RN - mean_N).abs()
    )
    widest_RN = torch.maximum(shard.most, -shard.least)
    variance_N = (second_N / sum_N).clamp_min(_LEAST_VARIANCE)
    variance_t_N = (second_t_N / sum_t_N).clamp_min(_LEAST_VARIANCE)
    kl_teacher_student_N = mean_t_N - log_sums_N
    at_student = _Point(
        coef=zeros_N,
        kl=zeros_N,
        log_partition=zeros_N,
        mean=zeros_N,
        log_variance=variance_N.log(),
        growth=third_N / sum_N / variance_N,
        mean_logp=logp_N / sum_N,
        slope_logp=cross_N / sum_N,
    )
    # What is not needed at this end is 0.
    at_teacher = _Point(
        coef=torch.ones_like(zeros_N),
        kl=kl_teacher_student_N,
        log_partition=kl_student_teacher_N,
        mean=mean_t_N - mean_N,
        log_variance=variance_t_N.log(),
        growth=third_t_N / sum_t_N / variance_t_N,
        mean_logp=zeros_N,
        slope_logp=zeros_N,
    )
    return _Pair(
        student,
        teacher,
        kl_teacher_student_N=kl_teacher_student_N,
        kl_student_teacher_N=kl_student_teacher_N,
        center_N=mean_N,
        variance_N=variance_N,
        max_ratio_N=extremes_RN.amax(dim=0),
        is_lopsided_N=widest_RN.amax(dim=0) > -0.99 * FLOAT32_MIN,
        base_6N=torch.stack((sum_N, zeros_N, second_N, third_N, logp_N, cross_N)),
        at_student=at_student,
        at_teacher=at_teacher,
    )


def _add_moments(
    offset_RN: Tensor,
    shift_RN: Tensor,
    sum_RN: Tensor,
    mean_RN: Tensor,
    second_RN: Tensor,
    third_RN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of w over all shards, each shard's deviation from it, and sums of its powers.

    The second and third are sums over exp of the deviation of w from the mean, squared and cubed.
    """
    scale_RN = offset_RN.exp()
    mass_RN = scale_RN * sum_RN
    mean_N = (mass_RN * (mean_RN + shift_RN)).sum(dim=0) / mass_RN.sum(dim=0)
    deviation_RN = mean_RN + shift_RN - mean_N
    second_RN, third_RN = scale_RN * second_RN, scale_RN * third_RN
    third_N = (third_RN + deviation_RN * (3 * second_RN + deviation_RN.square() * mass_RN)).sum(0)
    second_N = (second_RN + deviation_RN.square() * mass_RN).sum(dim=0)
    return mean_N, deviation_RN, second_N, third_N


class _Block(NamedTuple):
    """Some rows of this shard: log p up to its normalizer, its exp, and the centered r."""

    logp_MU: Tensor
    exp_MU: Tensor
    ratio_MU: Tensor

    @classmethod
    def load(cls, pair: _Pair, rows_M: Tensor, dtype: torch.dtype) -> "_Block":
        """Read the logits of the rows: one pass over them."""
        # Ids that do not exist become finite: no mass, and a finite r that it multiplies to 0.
        logp_MU, ratio_MU = (
            softmax.logits_NU.index_select(0, rows_M)
            .to(dtype)
            .sub_(softmax.max_N[rows_M, None].to(dtype))
            .clamp_min_(FLOAT32_MIN)
            for softmax in (pair.student, pair.teacher)
        )
        ratio_MU.sub_(logp_MU).sub_(pair.center_N[rows_M, None].to(dtype))
        return cls(logp_MU, logp_MU.exp(), ratio_MU)

    def sums(self, coef_M: Tensor) -> Tensor:
        """This shard's sums at one b per row, [8, M] float64.

        With x = b*r: the sums of p e^x times 1, r, r^2, r^3, log p and r log p, over e^m; then m
        and the sum of p. In fp32 these are differences to the sums at b = 0, and m = 0.
        """
        weight = self._sums_fp32 if self.ratio_MU.dtype == torch.float32 else self._sums_fp64
        return weight(coef_M.to(self.ratio_MU.dtype)[:, None])

    def _sums_fp32(self, coef_M1: Tensor) -> Tensor:
        x_MU = self.ratio_MU * coef_M1
        weight_MU = x_MU.expm1()
        # Sum(p r) = 0 up to rounding, and that rounding would show in the KL: leave it out.
        torch.sub(weight_MU, x_MU, out=x_MU)
        excess_M = x_MU.mul_(self.exp_MU).sum(dim=-1)
        moments = self._moments(weight_MU.mul_(self.exp_MU), scratch_MU=x_MU)
        zeros_M = torch.zeros_like(excess_M)
        return torch.stack((excess_M, *moments, zeros_M, zeros_M)).double()

    def _sums_fp64(self, coef_M1: Tensor) -> Tensor:
        weight_MU = torch.addcmul(self.logp_MU, self.ratio_MU, coef_M1)
        max_M = weight_MU.amax(dim=-1).clamp_min_(0)
        weight_MU.sub_(max_M[:, None]).exp_()
        sum_M = weight_MU.sum(dim=-1)
        moments = self._moments(weight_MU, scratch_MU=torch.empty_like(weight_MU))
        return torch.stack((sum_M, *moments, max_M, self.exp_MU.sum(dim=-1)))

    def _moments(self, weight_MU: Tensor, scratch_MU: Tensor) -> tuple[Tensor, ...]:
        """Sums of weight times r, r^2, r^3, log p, r log p; overwrites the weights."""
        logp_M = row_dot(weight_MU, self.logp_MU, scratch_MU)
        first_M = weight_MU.mul_(self.ratio_MU).sum(dim=-1)
        cross_M = row_dot(weight_MU, self.logp_MU, scratch_MU)
        second_M = weight_MU.mul_(self.ratio_MU).sum(dim=-1)
        return first_M, second_M, row_dot(weight_MU, self.ratio_MU, scratch_MU), logp_M, cross_M


class _OpenRows(NamedTuple):
    """Rows that are searched, by the arithmetic that they need."""

    fp32_M: Tensor
    fp64_M: Tensor

    @property
    def all_M(self) -> Tensor:
        return torch.cat(self)

    def keep(self, is_open_M: Tensor) -> tuple["_OpenRows", Tensor]:
        """The rows that are left, and their places among the present ones."""
        places = [
            mask_M.nonzero()[:, 0] + start
            for mask_M, start in zip(
                is_open_M.split([len(rows_M) for rows_M in self]),
                (0, len(self.fp32_M)),
                strict=True,
            )
        ]
        kept_M = torch.cat(places)
        rows = self.all_M[kept_M].split([len(places_M) for places_M in places])
        return _OpenRows(*rows), kept_M


def _search(pair: _Pair, budget_N: Tensor, tp_group: dist.ProcessGroup | None) -> Behavior:
    """Settle what the first round decides, then narrow the bracket [low, high) of b of the others.

    A round evaluates the open rows, and those only: one pass over their logits, one all-gather.
    """
    # Sums in fp32 leave this uncertainty in KL(q||p); rows within it are looked at, at b = 1.
    slack_N = 2e-6 * (1 + pair.kl_teacher_student_N.abs())
    is_teacher_N = (pair.kl_teacher_student_N + slack_N <= budget_N) | (pair.max_ratio_N == 0)
    is_teacher_N &= budget_N > 0
    ends_FN2 = torch.stack((torch.stack(pair.at_student), torch.stack(pair.at_teacher)), dim=-1)
    settled_FN = torch.where(is_teacher_N, ends_FN2[..., 1], ends_FN2[..., 0])
    is_open_N = ~is_teacher_N & (budget_N > 0)
    is_wide_N = pair.max_ratio_N > _FLOAT32_MAX_RATIO
    rows = _OpenRows(
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
        candidates_MJ = _predict(ends_FM2, target_M)
        if round_index < _NUM_PREDICTED_ROUNDS:
            candidates_MJ = candidates_MJ[:, :1]
        else:
            candidates_MJ = torch.cat((candidates_MJ, _grid(ends_FM2[0])), dim=-1)
        candidates_MJ = _round_between(ends_FM2[0], candidates_MJ)
        if round_index == 0:
            candidates_MJ = torch.where(is_unclear_M[:, None], 1.0, candidates_MJ)
        found_FMJ = torch.stack(_evaluate(rows, candidates_MJ, pair, tp_group))
        ends_FM2 = _narrow(ends_FM2, found_FMJ, budget_M)
        best_FM, is_settled_M = _finish(ends_FM2, target_M, pair.max_ratio_N[rows_M])
        settled_FN[:, rows_M] = best_FM
        rows, kept_M = rows.keep(~is_settled_M)
        rows_M, ends_FM2 = rows.all_M, ends_FM2[:, kept_M]
    return _build_behavior(pair, _Point(*settled_FN))


def _evaluate(
    rows: _OpenRows, candidates_MJ: Tensor, pair: _Pair, tp_group: dist.ProcessGroup | None
) -> _Point:
    """Evaluate the blend at every candidate, fields [M, J]; one all-gather over `tp_group`."""
    num_rows = rows_per_block(pair.student.logits_NU)
    partials = []
    by_dtype = candidates_MJ.split([len(rows_M) for rows_M in rows])
    for rows_M, coefs_MJ, dtype in zip(rows, by_dtype, (torch.float32, torch.float64), strict=True):
        for block_M, coefs in zip(rows_M.split(num_rows), coefs_MJ.split(num_rows), strict=True):
            if len(block_M) > 0:
                block = _Block.load(pair, block_M, dtype)
                partials.append(torch.stack([block.sums(c) for c in coefs.unbind(-1)], dim=-1))
    partials_RMJ8 = all_gather(torch.cat(partials, dim=1).permute(1, 2, 0), tp_group)
    max_MJ = partials_RMJ8[..., 6].amax(dim=0)
    scale_RMJ = (partials_RMJ8[..., 6] - max_MJ).exp()
    sums_8MJ = (partials_RMJ8 * scale_RMJ[..., None]).sum(dim=0).permute(2, 0, 1)
    is_fp32_M1 = torch.arange(len(candidates_MJ), device=max_MJ.device)[:, None] < len(rows.fp32_M)
    base_6M1 = pair.base_6N[:, rows.all_M, None]
    total_MJ, *moments = sums_8MJ[:6] + base_6M1 * is_fp32_M1
    mean_MJ, second_MJ, third_MJ, logp_MJ, cross_MJ = (moment / total_MJ for moment in moments)
    sum_MJ = partials_RMJ8[..., 7].sum(dim=0)
    log_partition_MJ = torch.where(
        is_fp32_M1,
        (sums_8MJ[0] / base_6M1[0]).log1p(),
        max_MJ + (total_MJ / sum_MJ).log(),
    )
    variance_MJ = (second_MJ - mean_MJ.square()).clamp_min(_LEAST_VARIANCE)
    third_central_MJ = third_MJ - mean_MJ * (3 * second_MJ - 2 * mean_MJ.square())
    return _Point(
        coef=candidates_MJ,
        kl=candidates_MJ * mean_MJ - log_partition_MJ,
        log_partition=log_partition_MJ,
        mean=mean_MJ,
        log_variance=variance_MJ.log(),
        growth=third_central_MJ / variance_MJ,
        mean_logp=logp_MJ,
        slope_logp=cross_MJ - mean_MJ * logp_MJ,
    )


def _narrow(ends_FM2: Tensor, found_FMJ: Tensor, budget_M: Tensor) -> Tensor:
    """The largest known b that keeps the budget and the smallest that does not, [F, M, 2]."""
    points_FMJ = torch.cat((ends_FM2, found_FMJ), dim=-1)
    coef_MJ, kl_MJ = points_FMJ[0], points_FMJ[1]
    is_feasible_MJ = kl_MJ <= budget_M[:, None]
    # The KL of the path's own ends is not exact, but which side they are on is known.
    is_feasible_MJ[:, 0], is_feasible_MJ[:, 1] = True, False
    low_M = torch.where(is_feasible_MJ, coef_MJ, -1.0).argmax(dim=-1)
    high_M = torch.where(is_feasible_MJ, 2.0, coef_MJ).argmin(dim=-1)
    index_M2 = torch.stack((low_M, high_M), dim=-1)
    return points_FMJ.gather(-1, index_M2.expand(len(points_FMJ), -1, -1))


def _finish(ends_FM2: Tensor, target_M: Tensor, max_ratio_M: Tensor) -> tuple[Tensor, Tensor]:
    """The best feasible point, [F, M], and whether it is the solution, [M]."""
    step_M2, error_M2 = _Point(*ends_FM2).step_to(target_M[:, None], max_ratio_M[:, None])
    coef_M2 = ends_FM2[0]
    # The ends of the path are not known well enough to start from them.
    is_known_M2 = (coef_M2 > 0) & (coef_M2 < 1)
    error_M2 = torch.where(is_known_M2, error_M2, torch.inf).nan_to_num_(torch.inf, torch.inf)
    error_M1, near_M1 = error_M2.min(dim=-1, keepdim=True)
    near_FM = ends_FM2.gather(-1, near_M1.expand(len(ends_FM2), -1, -1))[..., 0]
    coef_M = _round_down(near_FM[0] + step_M2.gather(-1, near_M1)[:, 0])
    moved_FM = torch.stack(_Point(*near_FM).moved_to(coef_M))
    is_close_M = error_M1[:, 0] <= _RELATIVE_TOLERANCE * target_M
    low_M, high_M = coef_M2.unbind(dim=-1)
    # Neighbors in fp32, or the teacher.
    is_stuck_M = (high_M - low_M <= 1.2e-7 * high_M) | (low_M == 1)
    return torch.where(is_close_M, moved_FM, ends_FM2[..., 0]), is_close_M | is_stuck_M


def _build_behavior(pair: _Pair, at: _Point) -> Behavior:
    coef_N = at.coef
    is_blend_N = (coef_N > 0) & (coef_N < 1)
    log_sum_N = pair.student.log_sum_N
    entropy_N = at.log_partition - coef_N * at.mean + log_sum_N - at.mean_logp
    entropy_N = torch.where(coef_N == 0, pair.student.entropy_N, entropy_N)
    entropy_N = torch.where(coef_N == 1, pair.teacher.entropy_N, entropy_N)
    kl_teacher_N = at.kl - at.mean + pair.kl_student_teacher_N
    wide_N = is_blend_N & (pair.max_ratio_N > _FLOAT32_MAX_RATIO)
    log_partition_N = at.log_partition - coef_N * pair.kl_student_teacher_N
    return Behavior(
        blend_coef=coef_N.float(),
        kl_student=at.kl.clamp_min(0).float(),
        kl_teacher=torch.where(coef_N == 1, 0.0, kl_teacher_N).clamp_min(0).float(),
        entropy=entropy_N.clamp_min(0).float(),
        student=pair.student,
        teacher=pair.teacher,
        log_partition_N=torch.where(is_blend_N, log_partition_N, 0.0),
        wide_rows=wide_N.nonzero()[:, 0],
    )


# Gauss-Radau quadrature on [0, 1] with five nodes, of which the last is 1.
_NODES = (0.05710419611451768, 0.27684301363812383, 0.5835904323689168, 0.8602401356562195, 1.0)
_WEIGHTS = (
    *(0.14371356079122594, 0.28135601514946206, 0.31182652297574126, 0.22310390108357075),
    0.04,
)
_NUM_NEWTON_STEPS = 2


class _KLPath:
    """KL(mu||p) over u in [0, 1], which is b from low to high: the integral of b Var_mu r.

    The logarithm of that variance is smooth: constant where r is normally distributed, linear
    where rare ids take over. Here it is the cubic that has its values and slopes at both ends
    (Hermite), or where `is_straight`, the line that has those of the low end.
    """

    def __init__(self, low: _Point, high: _Point) -> None:
        width_M = high.coef - low.coef
        rise_M = high.log_variance - low.log_variance
        slope_low_M, slope_high_M = low.growth * width_M, high.growth * width_M
        self.low_coef_M1, self.width_M1 = low.coef[:, None], width_M[:, None]
        # With the width, because dKL/du = width * dKL/db.
        self.value_M1 = (low.log_variance + width_M.log())[:, None]
        self.slope_M1 = slope_low_M[:, None]
        self.bend_M1 = (3 * rise_M - 2 * slope_low_M - slope_high_M)[:, None]
        self.twist_M1 = (slope_low_M + slope_high_M - 2 * rise_M)[:, None]
        self.nodes_5 = torch.tensor(_NODES, dtype=torch.float64, device=rise_M.device)
        self.weights_5 = torch.tensor(_WEIGHTS, dtype=torch.float64, device=rise_M.device)

    def straighten(self, is_straight_M: Tensor) -> None:
        self.bend_M1 = self.bend_M1.masked_fill(is_straight_M[:, None], 0.0)
        self.twist_M1 = self.twist_M1.masked_fill(is_straight_M[:, None], 0.0)

    def change(self, start_M: Tensor, stop_M: Tensor) -> tuple[Tensor, Tensor]:
        """KL at u = stop minus KL at u = start, and dKL/du at the stop, [M]."""
        span_M = stop_M - start_M
        u_M5 = torch.addcmul(start_M[:, None], span_M[:, None], self.nodes_5)
        log_M5 = torch.addcmul(self.bend_M1, self.twist_M1, u_M5)
        log_M5 = torch.addcmul(self.slope_M1, log_M5, u_M5)
        log_M5 = torch.addcmul(self.value_M1, log_M5, u_M5)
        slope_M5 = log_M5.clamp_(-600, 600).exp_()
        slope_M5 *= torch.addcmul(self.low_coef_M1, self.width_M1, u_M5)
        return span_M * (slope_M5 @ self.weights_5), slope_M5[:, -1]


def _predict(ends_FM2: Tensor, target_M: Tensor) -> Tensor:
    """Where in the bracket KL = target, judged by both ends: [M, 2], the better one first.

    Newton along `_KLPath`. Where that does not have the KL of both ends, the blend goes from one
    set of ids to another between them. There the first prediction follows the low end's straight
    line, or, when that comes first, `_switch`, which is the second.
    """
    low, high = (_Point(*end_FM) for end_FM in ends_FM2.unbind(dim=-1))
    path = _KLPath(low, high)
    zeros_M = torch.zeros_like(target_M)
    rise_M, _ = path.change(zeros_M, zeros_M + 1)
    # Not a number: no fit.
    fits_M = (rise_M / (high.kl - low.kl)).log().abs() < 0.5
    path.straighten(~fits_M)
    # The path is followed from the end with the nearer KL.
    from_high_M = fits_M & (2 * target_M.sqrt() > low.kl.sqrt() + high.kl.sqrt())
    start_FM = torch.where(from_high_M, ends_FM2[..., 1], ends_FM2[..., 0])
    start, start_u_M = _Point(*start_FM), from_high_M.double()
    width_M = high.coef - low.coef
    # As if the variance were constant.
    square_M = start.coef.square() + 2 * (target_M - start.kl) / start.variance
    coef_M = square_M.clamp_min_(0).sqrt_()
    for _ in range(_NUM_NEWTON_STEPS):
        u_M = ((coef_M - low.coef) / width_M).nan_to_num_(nan=0.5).clamp_(0, 1)
        coef_M = torch.addcmul(low.coef, u_M, width_M)
        change_M, slope_M = path.change(start_u_M, u_M)
        kl_M = (start.kl + change_M).clamp_min_(_LEAST_VARIANCE)
        # Newton on log KL as a function of log b: a line near the student, where KL ~ b^2.
        exponent_M = (target_M / kl_M).log_() * kl_M * width_M / (coef_M * slope_M)
        coef_M = coef_M * exponent_M.clamp_(-600, 600).exp_()
    switch_M = _switch(low, high, target_M)
    is_switch_M = ~fits_M & (switch_M > low.coef) & (switch_M < coef_M)
    return torch.stack((torch.where(is_switch_M, switch_M, coef_M), switch_M), dim=-1)


def _switch(low: _Point, high: _Point, target_M: Tensor) -> Tensor:
    """b where KL = target if the blend mixes two points of r, one of which is the low end, [M].

    The log-odds of the other are linear in b, with slope `gap`. The high end gives a point of that
    line by its variance, or, if it is past the switch, the tangents of log_partition at both ends,
    which meet in the middle of it.
    """
    rise_M, variance_M = high.mean - low.mean, high.variance
    is_past_M = variance_M < 1e-5 * rise_M.square()
    gap_M = torch.where(is_past_M, rise_M, rise_M + variance_M / rise_M)
    coef_M = torch.where(is_past_M, (high.kl - low.kl) / rise_M, high.coef)
    log_odds_M = torch.where(is_past_M, 0.0, (rise_M.square() / variance_M).log())
    share_M = (target_M - low.kl) / (coef_M * gap_M - 1)
    return coef_M + (share_M.logit(eps=1e-12) - log_odds_M) / gap_M


def _grid(coef_M2: Tensor) -> Tensor:
    """Evenly spaced points of the bracket, [M, J]."""
    fractions_J = torch.arange(1, _NUM_GRID_POINTS + 1, device=coef_M2.device).double()
    return torch.lerp(coef_M2[:, :1], coef_M2[:, 1:], fractions_J / (_NUM_GRID_POINTS + 1))


def _round_between(coef_M2: Tensor, candidates_MJ: Tensor) -> Tensor:
    """Round candidates to fp32 numbers inside the bracket; those outside become its middle.

    The result is stated in fp32, so that is where the KL has to be known. A step that rounds to an
    end of the bracket becomes that end's neighbor.
    """
    low_M1, high_M1 = coef_M2[:, :1], coef_M2[:, 1:]
    is_inside_MJ = (candidates_MJ > low_M1) & (candidates_MJ < high_M1)
    rounded_MJ = torch.where(is_inside_MJ, candidates_MJ, (low_M1 + high_M1) / 2).float()
    low_M1, high_M1 = low_M1.float(), high_M1.float()
    least_M1, most_M1 = low_M1.nextafter(high_M1), high_M1.nextafter(low_M1)
    return rounded_MJ.clamp(least_M1, most_M1).double()


def _round_down(coef_M: Tensor) -> Tensor:
    """The largest fp32 number that is not above."""
    rounded_M = coef_M.float()
    below_M = rounded_M.nextafter(torch.zeros_like(rounded_M))
    return torch.where(rounded_M.double() > coef_M, below_M, rounded_M).double()


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
