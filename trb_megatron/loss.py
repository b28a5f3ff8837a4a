"""The losses, per visited prefix: pure functions of student and teacher logits.

p = student, q = teacher, S = the student's top-k ids, p_S and q_S = p and q renormalized on S.
Only the student gets a gradient. Masking, summation and normalization over tokens happen outside.

Shapes: N rows (packed tokens), K ids of S, R ranks of the tensor-parallel group, V full vocabulary,
U this rank's shard. An id that is -inf in both models does not exist and gets no gradient.

Each loss states its value and its gradient with respect to the logits; autograd never sees the
arithmetic in between, because it would differentiate the sums over shards wrongly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb_megatron.vocab_parallel import (
    Softmax,
    all_gather,
    combine_softmax,
    gather_at,
    mask_invalid,
    raise_at_row,
    shard_softmax,
    softmax,
    topk,
    vocab_range,
    vocab_size,
)


class LossOutput(NamedTuple):
    """A loss at N prefixes."""

    per_token: Tensor
    """[N] fp32 in nats, differentiable with respect to the student's logits, unweighted."""
    metrics: dict[str, Tensor]
    """Each [N] fp32, detached."""


@dataclass(frozen=True)
class _Inputs:
    """What a distillation loss is made of. Log-probabilities on S are float64 and replicated."""

    student_logits_NU: Tensor  # as given, for autograd
    student: Softmax
    teacher: Softmax
    support_NK: Tensor
    student_logprobs_NK: Tensor
    teacher_logprobs_NK: Tensor
    tp_group: dist.ProcessGroup | None
    temperature: float
    jsd_weight: float
    veto_coef: float
    sampled_ids: Tensor | None

    def metrics(self) -> dict[str, Tensor]:
        return {
            "student_topk_mass": self.student_logprobs_NK.exp().sum(dim=-1).float(),
            "teacher_topk_mass": self.teacher_logprobs_NK.exp().sum(dim=-1).float(),
            "student_entropy": self.student.entropy_N.float(),
            "teacher_entropy": self.teacher.entropy_N.float(),
        }

    def log_ratio_NU(self) -> Tensor:
        """log p - log q on this shard, 0 at ids that do not exist."""
        student, teacher = self.student, self.teacher
        student_NU = student.logits_NU - student.max_N.float()[:, None]
        teacher_NU = teacher.logits_NU - teacher.max_N.float()[:, None]
        # Subtracting before normalizing is exact where the models are close.
        log_sums_N = (student.log_sum_N - teacher.log_sum_N).float()
        return student_NU.sub_(teacher_NU).sub_(log_sums_N[:, None]).nan_to_num_(nan=0.0)

    def attach(self, value_N: Tensor, grad_NU: Tensor) -> Tensor:
        """Give `value_N` the gradient `grad_NU` (of scaled logits) on this shard."""
        grad_NU = (grad_NU / self.temperature).to(self.student_logits_NU.dtype)
        return _WithGradient.apply(self.student_logits_NU, value_N.float(), grad_NU)

    def attach_on_support(self, value_N: Tensor, grad_NK: Tensor) -> Tensor:
        """Give `value_N` the gradient `grad_NK` (of scaled logits) on S, and 0 elsewhere."""
        start, _ = vocab_range(self.student_logits_NU.shape[-1], self.tp_group)
        local_NK, grad_NK = self.support_NK - start, (grad_NK / self.temperature).float()
        return _WithSparseGradient.apply(self.student_logits_NU, value_N.float(), local_NK, grad_NK)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to the logits is already known."""

    @staticmethod
    def forward(ctx: Any, logits_NU: Tensor, value_N: Tensor, grad_NU: Tensor) -> Tensor:
        ctx.save_for_backward(grad_NU)
        return value_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NU,) = ctx.saved_tensors
        # Multiply in fp32 and round once, without an fp32 copy of the shard.
        return torch.mul(grad_NU, grads[0][:, None], out=torch.empty_like(grad_NU)), None, None


class _WithSparseGradient(torch.autograd.Function):
    """Like `_WithGradient` with K columns; those outside [0, U) belong to other shards."""

    @staticmethod
    def forward(
        ctx: Any, logits_NU: Tensor, value_N: Tensor, local_NK: Tensor, grad_NK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(local_NK, grad_NK)
        ctx.width, ctx.dtype = logits_NU.shape[-1], logits_NU.dtype
        return value_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local_NK, grad_NK = ctx.saved_tensors
        result_NU = grad_NK.new_zeros(len(grad_NK), ctx.width, dtype=ctx.dtype)
        _add_columns(result_NU, local_NK, grad_NK * grads[0][:, None])
        return result_NU, None, None, None


def _add_columns(result_NU: Tensor, local_NK: Tensor, values_NK: Tensor) -> None:
    """Add values at the columns of this shard, in place."""
    width = result_NU.shape[-1]
    values_NK = torch.where((local_NK >= 0) & (local_NK < width), values_NK, 0.0)
    result_NU.scatter_add_(-1, local_NK.clamp(0, width - 1), values_NK.to(result_NU.dtype))


def _sum_vocab(*terms_NU: Tensor, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum each term over all shards; one all-gather, results [N] float64 and replicated."""
    sums_NC = torch.stack([term_NU.sum(dim=-1).double() for term_NU in terms_NU], dim=-1)
    return list(all_gather(sums_NC, tp_group).sum(dim=0).unbind(dim=-1))


def _reverse_kl_topk(inputs: _Inputs) -> Tensor:
    """KL(p_S||q_S). Needs k logits of each model (Li et al., arXiv 2604.13016, eq. 5)."""
    return _support_kl(inputs, inputs.teacher_logprobs_NK)


def _veto(inputs: _Inputs) -> Tensor:
    """KL(p_S||Q) with Q = softmax on S of log q + coef * log p, p constant (arXiv 2601.07155)."""
    target_NK = inputs.teacher_logprobs_NK + inputs.veto_coef * inputs.student_logprobs_NK
    return _support_kl(inputs, target_NK)


def _support_kl(inputs: _Inputs, target_NK: Tensor) -> Tensor:
    """KL(p_S||t) for t = softmax on S of a constant target; gradient p_S (log p_S/t - KL)."""
    logp_NK = inputs.student_logprobs_NK.log_softmax(dim=-1)
    ratio_NK = logp_NK - target_NK.log_softmax(dim=-1)
    p_NK = logp_NK.exp()
    kl_N = (p_NK * ratio_NK).sum(dim=-1)
    return inputs.attach_on_support(kl_N, p_NK * (ratio_NK - kl_N[:, None]))


def _reverse_kl_topk_policy_gradient(inputs: _Inputs) -> Tensor:
    """Mean under p_S of log p - log q, weights and log-ratios detached (arXiv 2604.13016's code).

    Gradient: p_S (log p - log q) on S, minus value * p everywhere.
    """
    ratio_NK = inputs.student_logprobs_NK - inputs.teacher_logprobs_NK
    weighted_NK = inputs.student_logprobs_NK.softmax(dim=-1) * ratio_NK
    value_N = weighted_NK.sum(dim=-1)
    grad_NU = inputs.student.logprobs().exp_().mul_(-value_N.float()[:, None])
    start, _ = vocab_range(grad_NU.shape[-1], inputs.tp_group)
    _add_columns(grad_NU, inputs.support_NK - start, weighted_NK)
    return inputs.attach(value_N, grad_NU)


def _reverse_kl_full(inputs: _Inputs) -> Tensor:
    """KL(p||q); gradient p (log p - log q - KL)."""
    ratio_NU, p_NU = inputs.log_ratio_NU(), inputs.student.logprobs().exp_()
    sum_N, mass_N = _sum_vocab(p_NU * ratio_NU, p_NU, tp_group=inputs.tp_group)
    # The rounded p sums to `mass`: only divided by it is the mean exact where p is deterministic.
    kl_N = sum_N / mass_N
    return inputs.attach(kl_N, p_NU.mul_(ratio_NU.sub_(kl_N.float()[:, None])))


def _reverse_kl_sampled(inputs: _Inputs) -> Tensor:
    """log p(y) - log q(y) as a detached policy-gradient reward: gradient value * grad log p(y)."""
    student_N = _sampled_logprobs(inputs.student, inputs.sampled_ids, inputs.tp_group)
    value_N = student_N - _sampled_logprobs(inputs.teacher, inputs.sampled_ids, inputs.tp_group)
    grad_NU = _nll_gradient(inputs.student, inputs.sampled_ids, inputs.tp_group)
    return inputs.attach(value_N, grad_NU.mul_(-value_N.float()[:, None]))


def _forward_kl_full(inputs: _Inputs) -> Tensor:
    """KL(q||p); gradient p - q."""
    ratio_NU = inputs.log_ratio_NU()
    p_NU, q_NU = inputs.student.logprobs().exp_(), inputs.teacher.logprobs().exp_()
    # p - q by difference loses all digits where the models are close; -p expm1(-ratio) does not.
    is_close_NU = ratio_NU.abs() < 1
    grad_NU = torch.where(is_close_NU, p_NU * (-ratio_NU).expm1_().neg_(), p_NU - q_NU)
    minus_kl_N, excess_N = _sum_vocab(q_NU.mul_(ratio_NU), grad_NU, tp_group=inputs.tp_group)
    # Exactly, p - q sums to 0: what is left is the rounding of the two normalizers.
    return inputs.attach(-minus_kl_N, grad_NU.sub_(p_NU.mul_(excess_N.float()[:, None])))


def _jsd(inputs: _Inputs) -> Tensor:
    """b KL(q||m) + (1-b) KL(p||m) with m = b q + (1-b) p; gradient (1-b) p (log p/m - KL(p||m))."""
    weight, ratio_NU = inputs.jsd_weight, inputs.log_ratio_NU()
    p_NU, q_NU = inputs.student.logprobs().exp_(), inputs.teacher.logprobs().exp_()
    p_ratio_NU, q_ratio_NU = _mixture_log_ratios(ratio_NU, weight)
    sum_p_N, sum_q_N, mass_N = _sum_vocab(
        p_NU * p_ratio_NU, q_NU.mul_(q_ratio_NU), p_NU, tp_group=inputs.tp_group
    )
    kl_p_N = sum_p_N / mass_N
    grad_NU = p_NU.mul_(p_ratio_NU.sub_(kl_p_N.float()[:, None])).mul_(1 - weight)
    return inputs.attach(weight * sum_q_N + (1 - weight) * kl_p_N, grad_NU)


def _mixture_log_ratios(ratio_NU: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log p/m and log q/m for m = weight * q + (1 - weight) * p, from log p/q."""
    log_weight, log_rest = ratio_NU.new_tensor([weight, 1 - weight]).log()
    p_ratio_NU = torch.logaddexp(log_weight - ratio_NU, log_rest).neg_()
    q_ratio_NU = torch.logaddexp(log_rest + ratio_NU, log_weight).neg_()
    # Where the models are close the ratios are small differences: take them from expm1 instead.
    close_NU = (-ratio_NU).expm1_().mul_(weight).log1p_().neg_()
    is_close_NU = ratio_NU.abs() < 1
    return (
        torch.where(is_close_NU, close_NU, p_ratio_NU),
        torch.where(is_close_NU, close_NU - ratio_NU, q_ratio_NU),
    )


def _sampled_logprobs(
    distribution: Softmax, sampled_ids_N: Tensor | None, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """log-probability of each row's sampled id, [N] float64; one all-gather."""
    if sampled_ids_N is None:
        raise ValueError("this loss needs sampled_ids")
    size = vocab_size(distribution.logits_NU.shape[-1], tp_group)
    problem = "sampled_ids names an id that does not exist"
    raise_at_row({problem: (sampled_ids_N < 0) | (sampled_ids_N >= size)})
    logit_N = gather_at(distribution.logits_NU, sampled_ids_N, tp_group=tp_group).double()
    raise_at_row({problem: logit_N == -torch.inf})
    return logit_N - distribution.max_N - distribution.log_sum_N


def _nll_gradient(
    student: Softmax, sampled_ids_N: Tensor | None, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Gradient of -log p(y) with respect to the logits: p - 1[y], [N, U]."""
    assert sampled_ids_N is not None
    grad_NU = student.logprobs().exp_()
    start, _ = vocab_range(grad_NU.shape[-1], tp_group)
    local_N1 = sampled_ids_N[:, None] - start
    _add_columns(grad_NU, local_N1, torch.full_like(local_N1, -1.0, dtype=grad_NU.dtype))
    return grad_NU


def distillation_loss(
    rule: Callable[[_Inputs], Tensor],
    student_logits_NU: Tensor,
    teacher_logits_NU: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    num_valid: int | None = None,
    top_k: int = 16,
    temperature: float = 1.0,
    jsd_weight: float = 0.5,
    veto_coef: float = 0.0,
    sampled_ids: Tensor | None = None,
) -> LossOutput:
    """Compare p = softmax(student / temperature) and q alike by one of the rules in `LOSSES`.

    Logits are [N, U]; columns from `num_valid` on, counted over all shards, are ignored and get no
    gradient. `jsd_weight` is b of "jsd", `veto_coef` that of "veto", `sampled_ids` [N] the ids y of
    "reverse_kl_sampled" (every row needs one that exists, masked later or not).
    Metrics: `student_topk_mass` and `teacher_topk_mass` (p and q on the student's top-k),
    `student_entropy`, `teacher_entropy` (nats).

    At most six all-gathers over `tp_group` forward, none backward; logits sharded, ids and results
    replicated; upcast to fp32, the gradient in the dtype of the logits. Raises ValueError, on all
    ranks alike, for options out of range, a top_k beyond the number of valid ids, and a NaN, a +inf
    or an id that is -inf in one model only, naming the row.
    """
    _validate_options(temperature, jsd_weight, veto_coef)
    student, teacher = _normalize_pair(
        mask_invalid(student_logits_NU.detach(), num_valid, tp_group) / temperature,
        mask_invalid(teacher_logits_NU.detach(), num_valid, tp_group) / temperature,
        tp_group,
    )
    logits_NK, support_NK = topk(student.logits_NU, top_k, tp_group=tp_group)
    teacher_NK = gather_at(teacher.logits_NU, support_NK, tp_group=tp_group).double()
    inputs = _Inputs(
        student_logits_NU=student_logits_NU,
        student=student,
        teacher=teacher,
        support_NK=support_NK,
        student_logprobs_NK=logits_NK - (student.max_N + student.log_sum_N)[:, None],
        teacher_logprobs_NK=teacher_NK - (teacher.max_N + teacher.log_sum_N)[:, None],
        tp_group=tp_group,
        temperature=temperature,
        jsd_weight=jsd_weight,
        veto_coef=veto_coef,
        sampled_ids=sampled_ids,
    )
    return LossOutput(rule(inputs), inputs.metrics())


def _validate_options(temperature: float, jsd_weight: float, veto_coef: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight={jsd_weight} must be between 0 and 1, both excluded")
    if not 0 <= veto_coef < math.inf:
        raise ValueError(f"veto_coef={veto_coef} must be finite and at least 0")


def _normalize_pair(
    student_NU: Tensor, teacher_NU: Tensor, tp_group: dist.ProcessGroup | None
) -> tuple[Softmax, Softmax]:
    """Normalize both models in one all-gather, checking that they agree on which ids exist."""
    shards = shard_softmax(student_NU), shard_softmax(teacher_NU)
    one_sided_N = ((student_NU == -torch.inf) != (teacher_NU == -torch.inf)).any(dim=-1)
    columns = (shards[0].partials_N3, shards[1].partials_N3, one_sided_N[:, None].double())
    partials_RN7 = all_gather(torch.cat(columns, dim=-1), tp_group)
    student = combine_softmax(student_NU, partials_RN7[..., :3])
    teacher = combine_softmax(teacher_NU, partials_RN7[..., 3:6])
    raise_at_row(
        {
            **student.problems("student"),
            **teacher.problems("teacher"),
            "logits are -inf in one model only": partials_RN7[..., 6].any(dim=0),
        }
    )
    return student, teacher


def cross_entropy(
    student_logits_NU: Tensor,
    teacher_logits_NU: Tensor | None = None,
    *,
    tp_group: dist.ProcessGroup | None = None,
    num_valid: int | None = None,
    top_k: int = 16,
    temperature: float = 1.0,
    jsd_weight: float = 0.5,
    veto_coef: float = 0.0,
    sampled_ids: Tensor | None = None,
) -> LossOutput:
    """Return -log p(y) for y = `sampled_ids` [N]: supervised training, without a teacher.

    Arguments, sharding and errors as in `distillation_loss`; those that are not about the student
    and y have no effect. Two all-gathers over `tp_group` forward, none backward. Metric:
    `student_entropy`.
    """
    _validate_options(temperature, jsd_weight, veto_coef)
    scaled_NU = mask_invalid(student_logits_NU.detach(), num_valid, tp_group) / temperature
    student = softmax(scaled_NU, tp_group=tp_group)
    value_N = -_sampled_logprobs(student, sampled_ids, tp_group)
    grad_NU = _nll_gradient(student, sampled_ids, tp_group).div_(temperature)
    per_token_N = _WithGradient.apply(
        student_logits_NU, value_N.float(), grad_NU.to(student_logits_NU.dtype)
    )
    return LossOutput(per_token_N, {"student_entropy": student.entropy_N.float()})


LOSSES: dict[str, Callable[..., LossOutput]] = {
    "reverse_kl_topk": partial(distillation_loss, _reverse_kl_topk),
    "reverse_kl_topk_policy_gradient": partial(distillation_loss, _reverse_kl_topk_policy_gradient),
    "reverse_kl_full": partial(distillation_loss, _reverse_kl_full),
    "reverse_kl_sampled": partial(distillation_loss, _reverse_kl_sampled),
    "forward_kl_full": partial(distillation_loss, _forward_kl_full),
    "jsd": partial(distillation_loss, _jsd),
    "veto": partial(distillation_loss, _veto),
    "cross_entropy": cross_entropy,
}
