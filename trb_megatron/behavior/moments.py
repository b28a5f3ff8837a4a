"""Moments of the log-ratio on vocabulary shards: at both ends of the path, and anywhere on it.

p = student, q = teacher, r = log q - log p, mu_β ~ p^(1-β) q^β = p e^(βr); natural logarithms. With

    A(β) = log E_p e^(βr)                    the log-partition function (of p e^(βr))
    A'(β) = E_mu r,  A''(β) = Var_mu r       its derivatives are the cumulants of r under mu

the divergences along the path follow from log mu - log p = βr - A and log mu - log q = (β-1)r - A:

    f(β) = KL(mu||p) = βA' - A,   f' = A' + βA'' - A' = βA'' >= 0,   f'' = A'' + βA^(3)

So f rises from f(0) = 0 to f(1) = KL(q||p), and near the student f = β² Var_p r / 2. Adding a
constant c to r adds βc to A and c to A', and leaves f and mu as they are. So r is centered by
E_p r: then A, which f is a small difference to, is small itself, and e^(βr) - 1 - βr, summed by
expm1, is what A is made of.

What crosses ranks are sums over a shard, a few numbers per row. Each rank states its own maxima, so
that the sums of all shards can be re-based to the maxima over all.

Shapes: N rows (prefixes), M a subset of them, J candidates per row, R ranks of the tensor-parallel
group, U this rank's shard. An id that is -inf in both models does not exist.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.behavior.path import LEAST_VARIANCE, Point
from trb_megatron.distributed.vocab_parallel import (
    FLOAT32_MIN,
    ShardSoftmax,
    Softmax,
    all_gather,
    combine_softmax,
    row_blocks,
    row_dot,
    rows_per_block,
    shard_softmax,
)

# Above this |r| sums over e^r overflow fp32, and rounding of r shows in the KL: such rows are done
# in float64.
FLOAT32_MAX_RATIO = 64.0
# FLOAT32_MIN stands for -inf, so that a log-ratio of its size, give or take rounding, belongs to an
# id that one model lacks.
_ONE_SIDED_RATIO = -0.99 * FLOAT32_MIN


class Pair(NamedTuple):
    """Student and teacher normalized, and what the first round tells of the path between them."""

    student: Softmax
    teacher: Softmax
    kl_teacher_student_N: Tensor  # KL(q||p)
    kl_student_teacher_N: Tensor  # KL(p||q)
    center_N: Tensor  # mean under p of (z_T - max z_T) - (z_S - max z_S)
    max_ratio_N: Tensor  # at least max |r - E_p r|
    is_lopsided_N: Tensor  # whether an id is -inf in one model only
    base_4N: Tensor  # sums under exp_S, as in `Block.sums`, at β = 0
    at_student: Point
    at_teacher: Point


class FirstPartials(NamedTuple):
    """Sums over one shard; e = exp(z - its max), w = (z_T - max z_T) - (z_S - max z_S)."""

    max: Tensor
    sum: Tensor  # of e_S
    max_t: Tensor
    sum_t: Tensor
    mean: Tensor  # of w under e_S
    second: Tensor  # of e_S * (w - mean)^2
    third: Tensor  # of e_S * (w - mean)^3
    mean_t: Tensor  # of w under e_T
    second_t: Tensor
    third_t: Tensor
    least: Tensor  # smallest and largest w
    most: Tensor

    @classmethod
    def of_block(cls, student_NU: Tensor, teacher_NU: Tensor) -> Tensor:
        """[12, N] float64."""
        student, teacher = shard_softmax(student_NU), shard_softmax(teacher_NU)
        ratio_NU = teacher.shifted_NU - student.shifted_NU
        weighted_NU, scratch_NU = torch.empty_like(ratio_NU), teacher.shifted_NU
        least_N, most_N = ratio_NU.amin(dim=-1), ratio_NU.amax(dim=-1)
        # Centered on the shard's own means, the sums do not cancel where r hardly varies.
        mean_N = _center(ratio_NU, student, scratch_NU)
        torch.mul(student.exp_NU, ratio_NU, out=weighted_NU)
        second_N = weighted_NU.mul_(ratio_NU).sum(dim=-1)
        third_N = row_dot(weighted_NU, ratio_NU, scratch_NU)
        mean_t_N = mean_N + _center(ratio_NU, teacher, scratch_NU)
        torch.mul(teacher.exp_NU, ratio_NU, out=weighted_NU)
        second_t_N = weighted_NU.mul_(ratio_NU).sum(dim=-1)
        third_t_N = row_dot(weighted_NU, ratio_NU, scratch_NU)
        moments = (mean_N, second_N, third_N, mean_t_N, second_t_N, third_t_N)
        columns = torch.stack((*moments, least_N, most_N)).double()
        return torch.cat((student.partials_N2.T, teacher.partials_N2.T, columns))


def _center(ratio_NU: Tensor, shard: ShardSoftmax, scratch_NU: Tensor) -> Tensor:
    """Subtract the mean under a model from each row in place; return the mean."""
    # The sum is at least 1, or 0 in a shard without an existing id.
    sum_N = shard.partials_N2[:, 1].clamp_min(1).float()
    mean_N = row_dot(shard.exp_NU, ratio_NU, scratch_NU) / sum_N
    ratio_NU.sub_(mean_N[:, None])
    return mean_N


def gather_pair(student_NU: Tensor, teacher_NU: Tensor, tp_group: dist.ProcessGroup | None) -> Pair:
    """Normalize both models and find the moments of r at both ends; one all-gather."""
    partials_12N = torch.cat(
        [
            FirstPartials.of_block(student_NU[rows], teacher_NU[rows])
            for rows in row_blocks(student_NU)
        ],
        dim=-1,
    )
    partials_RN12 = all_gather(partials_12N.T, tp_group)
    student = combine_softmax(student_NU, partials_RN12[..., :2])
    teacher = combine_softmax(teacher_NU, partials_RN12[..., 2:4])
    return _combine_moments(student, teacher, FirstPartials(*partials_RN12.unbind(dim=-1)))


def _combine_moments(student: Softmax, teacher: Softmax, shard: FirstPartials) -> Pair:
    """Add the partials of all shards; fields of `shard` are [R, N]."""
    # Re-base every shard to the maxima over all shards: its w moves by `shift`.
    offset_RN, offset_t_RN = shard.max - student.max_N, shard.max_t - teacher.max_N
    shift_RN = torch.where(shard.sum > 0, offset_t_RN - offset_RN, 0.0)
    mean_N, second_N, third_N = _add_moments(
        offset_RN, shift_RN, shard.sum, shard.mean, shard.second, shard.third
    )
    mean_t_N, second_t_N, third_t_N = _add_moments(
        offset_t_RN, shift_RN, shard.sum_t, shard.mean_t, shard.second_t, shard.third_t
    )
    sum_N = (offset_RN.exp() * shard.sum).sum(dim=0)
    sum_t_N = teacher.log_sum_N.exp()
    zeros_N = torch.zeros_like(mean_N)
    log_sums_N = teacher.log_sum_N - student.log_sum_N
    kl_student_teacher_N = log_sums_N - mean_N
    extremes_RN = torch.maximum(
        (shard.least + shift_RN - mean_N).abs(), (shard.most + shift_RN - mean_N).abs()
    )
    widest_RN = torch.maximum(shard.most, -shard.least)
    variance_N = (second_N / sum_N).clamp_min(LEAST_VARIANCE)
    variance_t_N = (second_t_N / sum_t_N).clamp_min(LEAST_VARIANCE)
    kl_teacher_student_N = mean_t_N - log_sums_N
    at_student = Point(
        blend_coef=zeros_N,
        kl=zeros_N,
        log_partition=zeros_N,
        mean=zeros_N,
        log_variance=variance_N.log(),
        growth=third_N / sum_N / variance_N,
    )
    at_teacher = Point(
        blend_coef=torch.ones_like(zeros_N),
        kl=kl_teacher_student_N,
        log_partition=kl_student_teacher_N,
        mean=mean_t_N - mean_N,
        log_variance=variance_t_N.log(),
        growth=third_t_N / sum_t_N / variance_t_N,
    )
    return Pair(
        student,
        teacher,
        kl_teacher_student_N=kl_teacher_student_N,
        kl_student_teacher_N=kl_student_teacher_N,
        center_N=mean_N,
        max_ratio_N=extremes_RN.amax(dim=0),
        is_lopsided_N=widest_RN.amax(dim=0) > _ONE_SIDED_RATIO,
        base_4N=torch.stack((sum_N, zeros_N, second_N, third_N)),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of w over all shards, and sums of the powers of its deviation.

    The second and third are sums over exp of the deviation of w from the mean, squared and cubed.
    """
    scale_RN = offset_RN.exp()
    mass_RN = scale_RN * sum_RN
    mean_N = (mass_RN * (mean_RN + shift_RN)).sum(dim=0) / mass_RN.sum(dim=0)
    deviation_RN = mean_RN + shift_RN - mean_N
    second_RN, third_RN = scale_RN * second_RN, scale_RN * third_RN
    third_N = (third_RN + deviation_RN * (3 * second_RN + deviation_RN.square() * mass_RN)).sum(0)
    second_N = (second_RN + deviation_RN.square() * mass_RN).sum(dim=0)
    return mean_N, second_N, third_N


class Block(NamedTuple):
    """Some rows of this shard: log p up to its normalizer, its exp, and the centered r."""

    logp_MU: Tensor
    exp_MU: Tensor
    ratio_MU: Tensor

    @classmethod
    def load(cls, pair: Pair, rows_M: Tensor, dtype: torch.dtype) -> "Block":
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

    def sums(self, blend_coef_M: Tensor) -> Tensor:
        """This shard's sums at one β per row, [6, M] float64.

        With x = βr: the sums of p e^x times 1, r, r² and r³, over e^m; then m and the sum of p. In
        fp32 these are differences to the sums at β = 0, and m = 0.
        """
        weight = self._sums_fp32 if self.ratio_MU.dtype == torch.float32 else self._sums_fp64
        return weight(blend_coef_M.to(self.ratio_MU.dtype)[:, None])

    def _sums_fp32(self, blend_coef_M1: Tensor) -> Tensor:
        x_MU = self.ratio_MU * blend_coef_M1
        weight_MU = x_MU.expm1()
        # Sum(p r) = 0 up to rounding, and that rounding would show in the KL: leave it out.
        torch.sub(weight_MU, x_MU, out=x_MU)
        excess_M = x_MU.mul_(self.exp_MU).sum(dim=-1)
        moments = self._moments(weight_MU.mul_(self.exp_MU), scratch_MU=x_MU)
        zeros_M = torch.zeros_like(excess_M)
        return torch.stack((excess_M, *moments, zeros_M, zeros_M)).double()

    def _sums_fp64(self, blend_coef_M1: Tensor) -> Tensor:
        weight_MU = torch.addcmul(self.logp_MU, self.ratio_MU, blend_coef_M1)
        max_M = weight_MU.amax(dim=-1).clamp_min_(0)
        weight_MU.sub_(max_M[:, None]).exp_()
        sum_M = weight_MU.sum(dim=-1)
        moments = self._moments(weight_MU, scratch_MU=torch.empty_like(weight_MU))
        return torch.stack((sum_M, *moments, max_M, self.exp_MU.sum(dim=-1)))

    def _moments(self, weight_MU: Tensor, scratch_MU: Tensor) -> tuple[Tensor, ...]:
        """Sums of weight times r, r² and r³; overwrites the weights."""
        first_M = weight_MU.mul_(self.ratio_MU).sum(dim=-1)
        second_M = weight_MU.mul_(self.ratio_MU).sum(dim=-1)
        return first_M, second_M, row_dot(weight_MU, self.ratio_MU, scratch_MU)


class OpenRows(NamedTuple):
    """Rows that are searched, by the arithmetic that they need."""

    fp32_M: Tensor
    fp64_M: Tensor

    @property
    def all_M(self) -> Tensor:
        return torch.cat(self)

    def keep(self, is_open_M: Tensor) -> tuple["OpenRows", Tensor]:
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
        return OpenRows(*rows), kept_M


def evaluate(
    rows: OpenRows, candidates_MJ: Tensor, pair: Pair, tp_group: dist.ProcessGroup | None
) -> Point:
    """Evaluate the blend at every candidate, fields [M, J]; one all-gather over `tp_group`."""
    num_rows = rows_per_block(pair.student.logits_NU)
    partials = []
    by_dtype = candidates_MJ.split([len(rows_M) for rows_M in rows])
    for rows_M, coefs_MJ, dtype in zip(rows, by_dtype, (torch.float32, torch.float64), strict=True):
        for block_M, coefs in zip(rows_M.split(num_rows), coefs_MJ.split(num_rows), strict=True):
            if len(block_M) > 0:
                block = Block.load(pair, block_M, dtype)
                partials.append(torch.stack([block.sums(c) for c in coefs.unbind(-1)], dim=-1))
    partials_RMJ6 = all_gather(torch.cat(partials, dim=1).permute(1, 2, 0), tp_group)
    max_MJ = partials_RMJ6[..., 4].amax(dim=0)
    scale_RMJ = (partials_RMJ6[..., 4] - max_MJ).exp()
    sums_6MJ = (partials_RMJ6 * scale_RMJ[..., None]).sum(dim=0).permute(2, 0, 1)
    is_fp32_M1 = torch.arange(len(candidates_MJ), device=max_MJ.device)[:, None] < len(rows.fp32_M)
    base_4M1 = pair.base_4N[:, rows.all_M, None]
    total_MJ, *moments = sums_6MJ[:4] + base_4M1 * is_fp32_M1
    mean_MJ, second_MJ, third_MJ = (moment / total_MJ for moment in moments)
    sum_MJ = partials_RMJ6[..., 5].sum(dim=0)
    log_partition_MJ = torch.where(
        is_fp32_M1,
        (sums_6MJ[0] / base_4M1[0]).log1p(),
        max_MJ + (total_MJ / sum_MJ).log(),
    )
    variance_MJ = (second_MJ - mean_MJ.square()).clamp_min(LEAST_VARIANCE)
    third_central_MJ = third_MJ - mean_MJ * (3 * second_MJ - 2 * mean_MJ.square())
    return Point(
        blend_coef=candidates_MJ,
        kl=candidates_MJ * mean_MJ - log_partition_MJ,
        log_partition=log_partition_MJ,
        mean=mean_MJ,
        log_variance=variance_MJ.log(),
        growth=third_central_MJ / variance_MJ,
    )
