"""The losses, per visited prefix: each rule gives a value and its gradient, as pure functions.

p = student, q = teacher, S = the student's top-k ids, p_S and q_S = p and q renormalized on S.
Only the student gets a gradient. Masking, summation and normalization over tokens happen outside.

Shapes: N rows (packed tokens), K ids of S, V full vocabulary, U this rank's shard. An id that is
-inf in both models does not exist and gets no gradient.

Each loss states its value and its gradient with respect to the logits; autograd never sees the
arithmetic in between, because it would differentiate the sums over shards wrongly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.distributed.vocab_parallel import (
    all_gather,
    raise_at_row,
    vocab_range,
    vocab_size,
)
from trb_megatron.loss.views import ModelView, Summary


@dataclass(frozen=True)
class LossOptions:
    """Parameters of the losses. Raises ValueError for one that is out of range."""

    top_k: int
    """k, the size of S."""
    temperature: float
    """Divides the logits of both models."""
    jsd_weight: float
    """b of "jsd"."""
    veto_coef: float
    """b of "veto"."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if not 0 < self.jsd_weight < 1:
            raise ValueError(f"jsd_weight={self.jsd_weight} must be between 0 and 1, both excluded")
        if not 0 <= self.veto_coef < math.inf:
            raise ValueError(f"veto_coef={self.veto_coef} must be finite and at least 0")


# ---------------------------------------------------------------- rules on the support
#
# (student, teacher, options) -> value [N] and its gradient [N, K] with respect to the student's
# logits on S, both float64; elsewhere the gradient is zero.

SupportRule = Callable[[Summary, Summary, LossOptions], tuple[Tensor, Tensor]]


def reverse_kl_topk(
    student: Summary, teacher: Summary, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """KL(p_S||q_S). Needs k logits of each model (Li et al., arXiv 2604.13016, eq. 5)."""
    return _support_kl(student.support_NK, teacher.support_NK)


def veto(student: Summary, teacher: Summary, options: LossOptions) -> tuple[Tensor, Tensor]:
    """KL(p_S||Q) with Q = softmax on S of log q + coef * log p, p constant (arXiv 2601.07155)."""
    target_NK = teacher.support_NK + options.veto_coef * student.support_NK
    return _support_kl(student.support_NK, target_NK)


def _support_kl(student_NK: Tensor, target_NK: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_S||t) for t = softmax on S of a constant target; gradient p_S (log p_S/t - KL)."""
    logp_NK = student_NK.log_softmax(dim=-1)
    ratio_NK = logp_NK - target_NK.log_softmax(dim=-1)
    p_NK = logp_NK.exp()
    kl_N = (p_NK * ratio_NK).sum(dim=-1)
    return kl_N, p_NK * (ratio_NK - kl_N[:, None])


# ---------------------------------------------------------------- rules on the vocabulary
#
# inputs -> value [N] float64 and its gradient [N, U] fp32 with respect to the student's logits on
# this shard.


@dataclass(frozen=True)
class VocabInputs:
    """Both models at N prefixes, logits and all."""

    student: ModelView
    teacher_or_none: ModelView | None
    options: LossOptions
    sampled_ids_N: Tensor | None
    tp_group: dist.ProcessGroup | None

    @property
    def teacher(self) -> ModelView:
        assert self.teacher_or_none is not None
        return self.teacher_or_none

    def log_ratio_NU(self) -> Tensor:
        """log p - log q on this shard, finite at ids that do not exist; a new tensor."""
        student, teacher = self.student, self.teacher
        # Subtracting before normalizing is exact where the models are close.
        ratio_NU = student.shard.shifted_NU - teacher.shard.shifted_NU
        offset_N = (student.log_scale_N() - teacher.log_scale_N()).float()
        return ratio_NU.add_(offset_N[:, None])

    def sampled_logprobs_N(self, model: ModelView) -> Tensor:
        """log-probability of each row's sampled id, float64; one all-gather."""
        if self.sampled_ids_N is None:
            raise ValueError("this loss needs sampled_ids")
        size = vocab_size(model.softmax.logits_NU.shape[-1], self.tp_group)
        problem = "sampled_ids names an id that does not exist"
        raise_at_row({problem: (self.sampled_ids_N < 0) | (self.sampled_ids_N >= size)})
        logprobs_N = model.logprobs_at(self.sampled_ids_N)
        raise_at_row({problem: logprobs_N == -torch.inf})
        return logprobs_N

    def nll_gradient_NU(self) -> Tensor:
        """Gradient of -log p(y) with respect to the logits: p - 1[y], a new tensor."""
        assert self.sampled_ids_N is not None
        grad_NU = self.student.probs_NU()
        ids_N1 = self.sampled_ids_N[:, None]
        add_columns(
            grad_NU, ids_N1, torch.full_like(ids_N1, -1.0, dtype=grad_NU.dtype), self.tp_group
        )
        return grad_NU


VocabRule = Callable[[VocabInputs], tuple[Tensor, Tensor]]


def reverse_kl_topk_policy_gradient(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """Mean under p_S of log p - log q, weights and log-ratios detached (arXiv 2604.13016's code).

    Gradient: p_S (log p - log q) on S, minus value * p everywhere.
    """
    student = inputs.student.summary
    ratio_NK = student.support_NK - inputs.teacher.summary.support_NK
    weighted_NK = student.support_NK.softmax(dim=-1) * ratio_NK
    value_N = weighted_NK.sum(dim=-1)
    grad_NU = inputs.student.probs_NU().mul_(-value_N.float()[:, None])
    add_columns(grad_NU, student.topk_ids_NK, weighted_NK, inputs.tp_group)
    return value_N, grad_NU


def reverse_kl_full(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """KL(p||q); gradient p (log p - log q - KL)."""
    ratio_NU, p_NU = inputs.log_ratio_NU(), inputs.student.probs_NU()
    sum_N, mass_N = _sum_vocab(p_NU * ratio_NU, p_NU, tp_group=inputs.tp_group)
    # The rounded p sums to `mass`: only divided by it is the mean exact where p is deterministic.
    kl_N = sum_N / mass_N
    return kl_N, ratio_NU.sub_(kl_N.float()[:, None]).mul_(p_NU)


def reverse_kl_sampled(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """log p(y) - log q(y) as a detached policy-gradient reward: gradient value * grad log p(y)."""
    value_N = inputs.sampled_logprobs_N(inputs.student) - inputs.sampled_logprobs_N(inputs.teacher)
    return value_N, inputs.nll_gradient_NU().mul_(-value_N.float()[:, None])


def forward_kl_full(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """KL(q||p); gradient p - q."""
    ratio_NU = inputs.log_ratio_NU()
    p_NU, q_NU = inputs.student.probs_NU(), inputs.teacher.probs_NU()
    # p - q by difference loses all digits where the models are close; -p expm1(-ratio) does not.
    is_close_NU = ratio_NU.abs() < 1
    grad_NU = torch.where(is_close_NU, p_NU * (-ratio_NU).expm1_().neg_(), p_NU - q_NU)
    minus_kl_N, excess_N = _sum_vocab(q_NU.mul_(ratio_NU), grad_NU, tp_group=inputs.tp_group)
    # Exactly, p - q sums to 0: what is left is the rounding of the two normalizers.
    return -minus_kl_N, grad_NU.sub_(p_NU.mul_(excess_N.float()[:, None]))


def jsd(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """b KL(q||m) + (1-b) KL(p||m) with m = b q + (1-b) p; gradient (1-b) p (log p/m - KL(p||m))."""
    weight, ratio_NU = inputs.options.jsd_weight, inputs.log_ratio_NU()
    p_NU, q_NU = inputs.student.probs_NU(), inputs.teacher.probs_NU()
    p_ratio_NU, q_ratio_NU = _mixture_log_ratios(ratio_NU, weight)
    sum_p_N, sum_q_N, mass_N = _sum_vocab(
        p_NU * p_ratio_NU, q_NU.mul_(q_ratio_NU), p_NU, tp_group=inputs.tp_group
    )
    kl_p_N = sum_p_N / mass_N
    grad_NU = p_NU.mul_(p_ratio_NU.sub_(kl_p_N.float()[:, None])).mul_(1 - weight)
    return weight * sum_q_N + (1 - weight) * kl_p_N, grad_NU


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


def cross_entropy(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """-log p(y): supervised training, without a teacher; gradient p - 1[y]."""
    return -inputs.sampled_logprobs_N(inputs.student), inputs.nll_gradient_NU()


def _sum_vocab(*terms_NU: Tensor, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum each term over all shards; one all-gather, results [N] float64 and replicated."""
    sums_NC = torch.stack([term_NU.sum(dim=-1).double() for term_NU in terms_NU], dim=-1)
    return list(all_gather(sums_NC, tp_group).sum(dim=0).unbind(dim=-1))


def add_columns(
    result_NU: Tensor, ids_NK: Tensor, values_NK: Tensor, tp_group: dist.ProcessGroup | None
) -> None:
    """Add values at global ids, in place; ids of other shards are left out."""
    start, stop = vocab_range(result_NU.shape[-1], tp_group)
    values_NK = torch.where((ids_NK >= start) & (ids_NK < stop), values_NK, 0.0)
    local_NK = (ids_NK - start).clamp(0, stop - start - 1)
    result_NU.scatter_add_(-1, local_NK, values_NK.to(result_NU.dtype))
