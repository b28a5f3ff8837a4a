"""The losses, per visited prefix: value and gradient as functions of both models' logits.

p = student, q = teacher, S = the student's top-k ids, p_S and q_S = p and q renormalized on S.
Only the student gets a gradient. Masking, summation and normalization over tokens happen outside.

`LOSSES[name](...)` is a differentiable loss of given logits; `fused_loss` applies the same rules
where no one ever holds the logits of all tokens.

Shapes: N rows (packed tokens), K ids of S, R ranks of the tensor-parallel group, V full vocabulary,
U this rank's shard. An id that is -inf in both models does not exist and gets no gradient.

Each loss states its value and its gradient with respect to the logits; autograd never sees the
arithmetic in between, because it would differentiate the sums over shards wrongly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb_megatron.vocab_parallel import (
    ShardSoftmax,
    Softmax,
    all_gather,
    combine_softmax,
    gather_at,
    mask_invalid,
    raise_at_row,
    shard_softmax,
    topk,
    vocab_range,
    vocab_size,
)


class LossOutput(NamedTuple):
    """A loss at N prefixes."""

    per_token: Tensor
    """[N] fp32 in nats, differentiable with respect to the student's logits, unweighted."""
    metrics: dict[str, Tensor]
    """Each [N] fp32, detached; see `compute_metrics`."""


@dataclass(frozen=True)
class LossOptions:
    """Parameters of the losses. Raises ValueError for one that is out of range."""

    top_k: int = 16
    """k, the size of S."""
    temperature: float = 1.0
    """What the logits of both models are divided by."""
    jsd_weight: float = 0.5
    """b of "jsd"."""
    veto_coef: float = 0.0
    """b of "veto"."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if not 0 < self.jsd_weight < 1:
            raise ValueError(f"jsd_weight={self.jsd_weight} must be between 0 and 1, both excluded")
        if not 0 <= self.veto_coef < math.inf:
            raise ValueError(f"veto_coef={self.veto_coef} must be finite and at least 0")


class Summary(NamedTuple):
    """What is kept of a model's logits at N prefixes; all replicated over shards."""

    topk_ids_NK: Tensor
    """The model's own top-k ids, largest first, ties to the lowest id."""
    support_NK: Tensor
    """Log-probabilities of the student's top-k ids, float64."""
    entropy_N: Tensor
    """Nats, float64."""


@dataclass(frozen=True)
class ModelView:
    """A model at N prefixes: this shard's logits, divided by the temperature, and their softmax."""

    shard: ShardSoftmax
    softmax: Softmax
    summary: Summary
    tp_group: dist.ProcessGroup | None

    def logprobs_at(self, ids: Tensor) -> Tensor:
        """Log-probabilities of each row's `ids` ([N] or [N, K]) in float64; one all-gather."""
        logits = gather_at(self.softmax.logits_NU, ids, tp_group=self.tp_group)
        return _normalize(logits, self.softmax)

    def log_scale_N(self) -> Tensor:
        """What is added to `shard.shifted_NU` to make it log-probabilities, float64."""
        return self.shard.partials_N3[:, 0] - self.softmax.max_N - self.softmax.log_sum_N

    def probs_NU(self) -> Tensor:
        """This shard's probabilities, a new tensor."""
        return self.shard.exp_NU * self.log_scale_N().exp().float()[:, None]


def view_model(
    name: str,
    logits_NU: Tensor,
    top_k: int,
    tp_group: dist.ProcessGroup | None,
    support_ids_NK: Tensor | None = None,
) -> ModelView:
    """Normalize fp32 logits over all shards and summarize them.

    `support_ids_NK` are the student's top-k ids, None if this is the student. Two all-gathers over
    `tp_group`, a third for given ids; logits sharded, ids and summary replicated. Raises
    ValueError, on all ranks alike, with `name` and the row of a NaN or a +inf, and for a `top_k`
    beyond the number of existing ids.
    """
    shard = shard_softmax(logits_NU)
    softmax = combine_softmax(logits_NU, all_gather(shard.partials_N3, tp_group))
    raise_at_row(softmax.problems(name))
    support_logits_NK, topk_ids_NK = topk(logits_NU, top_k, tp_group=tp_group)
    if support_ids_NK is not None:
        support_logits_NK = gather_at(logits_NU, support_ids_NK, tp_group=tp_group)
    summary = Summary(topk_ids_NK, _normalize(support_logits_NK, softmax), softmax.entropy_N)
    return ModelView(shard, softmax, summary, tp_group)


def _normalize(logits: Tensor, softmax: Softmax) -> Tensor:
    """Log-probabilities of some logits of each row, [N] or [N, K], in float64."""
    log_normalizer_N = softmax.max_N + softmax.log_sum_N
    return logits.double() - log_normalizer_N.view(-1, *[1] * (logits.dim() - 1))


def compute_metrics(student: Summary, teacher: Summary | None) -> dict[str, Tensor]:
    """Describe N prefixes, each metric [N] fp32; those of the teacher where there is one.

    - `student_topk_mass`, `teacher_topk_mass`: p and q of S. A truncated KL says nothing about the
      mass outside.
    - `student_entropy`, `teacher_entropy`: over the whole vocabulary, in nats.
    - `topk_overlap`: the share |S & T| / k of the student's top-k ids that are also among the
      teacher's own top-k ids T. (Other definitions in use: |S & T| / |S | T|, and the mass that
      either model has on S & T.)
    """
    metrics = {
        "student_topk_mass": student.support_NK.exp().sum(dim=-1).float(),
        "student_entropy": student.entropy_N.float(),
    }
    if teacher is not None:
        is_shared_NK = (student.topk_ids_NK[..., None] == teacher.topk_ids_NK[:, None]).any(dim=-1)
        metrics |= {
            "teacher_topk_mass": teacher.support_NK.exp().sum(dim=-1).float(),
            "teacher_entropy": teacher.entropy_N.float(),
            "topk_overlap": is_shared_NK.float().mean(dim=-1),
        }
    return metrics


# ---------------------------------------------------------------- rules on the support
#
# (student, teacher, options) -> value [N] and its gradient [N, K] with respect to the student's
# logits on S, both float64; elsewhere the gradient is zero.

SupportRule = Callable[[Summary, Summary, LossOptions], tuple[Tensor, Tensor]]


def _reverse_kl_topk(
    student: Summary, teacher: Summary, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """KL(p_S||q_S). Needs k logits of each model (Li et al., arXiv 2604.13016, eq. 5)."""
    return _support_kl(student.support_NK, teacher.support_NK)


def _veto(student: Summary, teacher: Summary, options: LossOptions) -> tuple[Tensor, Tensor]:
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
        _add_columns(
            grad_NU, ids_N1, torch.full_like(ids_N1, -1.0, dtype=grad_NU.dtype), self.tp_group
        )
        return grad_NU


VocabRule = Callable[[VocabInputs], tuple[Tensor, Tensor]]


def _reverse_kl_topk_policy_gradient(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """Mean under p_S of log p - log q, weights and log-ratios detached (arXiv 2604.13016's code).

    Gradient: p_S (log p - log q) on S, minus value * p everywhere.
    """
    student = inputs.student.summary
    ratio_NK = student.support_NK - inputs.teacher.summary.support_NK
    weighted_NK = student.support_NK.softmax(dim=-1) * ratio_NK
    value_N = weighted_NK.sum(dim=-1)
    grad_NU = inputs.student.probs_NU().mul_(-value_N.float()[:, None])
    _add_columns(grad_NU, student.topk_ids_NK, weighted_NK, inputs.tp_group)
    return value_N, grad_NU


def _reverse_kl_full(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """KL(p||q); gradient p (log p - log q - KL)."""
    ratio_NU, p_NU = inputs.log_ratio_NU(), inputs.student.probs_NU()
    sum_N, mass_N = _sum_vocab(p_NU * ratio_NU, p_NU, tp_group=inputs.tp_group)
    # The rounded p sums to `mass`: only divided by it is the mean exact where p is deterministic.
    kl_N = sum_N / mass_N
    return kl_N, ratio_NU.sub_(kl_N.float()[:, None]).mul_(p_NU)


def _reverse_kl_sampled(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """log p(y) - log q(y) as a detached policy-gradient reward: gradient value * grad log p(y)."""
    value_N = inputs.sampled_logprobs_N(inputs.student) - inputs.sampled_logprobs_N(inputs.teacher)
    return value_N, inputs.nll_gradient_NU().mul_(-value_N.float()[:, None])


def _forward_kl_full(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """KL(q||p); gradient p - q."""
    ratio_NU = inputs.log_ratio_NU()
    p_NU, q_NU = inputs.student.probs_NU(), inputs.teacher.probs_NU()
    # p - q by difference loses all digits where the models are close; -p expm1(-ratio) does not.
    is_close_NU = ratio_NU.abs() < 1
    grad_NU = torch.where(is_close_NU, p_NU * (-ratio_NU).expm1_().neg_(), p_NU - q_NU)
    minus_kl_N, excess_N = _sum_vocab(q_NU.mul_(ratio_NU), grad_NU, tp_group=inputs.tp_group)
    # Exactly, p - q sums to 0: what is left is the rounding of the two normalizers.
    return -minus_kl_N, grad_NU.sub_(p_NU.mul_(excess_N.float()[:, None]))


def _jsd(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
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


def _cross_entropy(inputs: VocabInputs) -> tuple[Tensor, Tensor]:
    """-log p(y): supervised training, without a teacher; gradient p - 1[y]."""
    return -inputs.sampled_logprobs_N(inputs.student), inputs.nll_gradient_NU()


def _sum_vocab(*terms_NU: Tensor, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum each term over all shards; one all-gather, results [N] float64 and replicated."""
    sums_NC = torch.stack([term_NU.sum(dim=-1).double() for term_NU in terms_NU], dim=-1)
    return list(all_gather(sums_NC, tp_group).sum(dim=0).unbind(dim=-1))


def _add_columns(
    result_NU: Tensor, ids_NK: Tensor, values_NK: Tensor, tp_group: dist.ProcessGroup | None
) -> None:
    """Add values at global ids, in place; ids of other shards are left out."""
    start, stop = vocab_range(result_NU.shape[-1], tp_group)
    values_NK = torch.where((ids_NK >= start) & (ids_NK < stop), values_NK, 0.0)
    local_NK = (ids_NK - start).clamp(0, stop - start - 1)
    result_NU.scatter_add_(-1, local_NK, values_NK.to(result_NU.dtype))


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Loss:
    """A row of the table: a rule, and what it reads and touches."""

    rule: Callable[..., tuple[Tensor, Tensor]]
    """A `SupportRule` if `on_support`, else a `VocabRule`."""
    on_support: bool = False
    needs_teacher: bool = True

    def __call__(
        self,
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
        """Compare p = softmax(student / temperature) with q, or with y = `sampled_ids`.

        Logits are [N, U]; columns from `num_valid` on, counted over all shards, are ignored and get
        no gradient. `sampled_ids` [N] is what "reverse_kl_sampled" and "cross_entropy" need (every
        row one that exists, masked later or not); the latter ignores the teacher. Other parameters
        as in `LossOptions`, metrics as in `compute_metrics`.

        At most eight all-gathers over `tp_group` forward, none backward; logits sharded, ids and
        results replicated; upcast to fp32, the gradient in the dtype of the logits. Raises
        ValueError, on all ranks alike, for options out of range, a top_k beyond the number of valid
        ids, and a NaN, a +inf or an id that is -inf in one model only, naming the row.
        """
        options = LossOptions(top_k, temperature, jsd_weight, veto_coef)
        student_NU = mask_invalid(student_logits_NU.detach(), num_valid, tp_group) / temperature
        student = view_model("student", student_NU, top_k, tp_group)
        teacher = None
        if self.needs_teacher:
            if teacher_logits_NU is None:
                raise ValueError("this loss needs teacher_logits_NU")
            teacher_NU = mask_invalid(teacher_logits_NU.detach(), num_valid, tp_group) / temperature
            _refuse_one_sided(student_NU, teacher_NU, tp_group)
            support_ids_NK = student.summary.topk_ids_NK
            teacher = view_model("teacher", teacher_NU, top_k, tp_group, support_ids_NK)
        if self.on_support:
            assert teacher is not None
            value_N, grad_NK = self.rule(student.summary, teacher.summary, options)
            per_token_N = _WithColumns.apply(
                student_logits_NU,
                value_N.float(),
                student.summary.topk_ids_NK,
                (grad_NK / temperature).float(),
                tp_group,
            )
        else:
            value_N, grad_NU = self.rule(
                VocabInputs(student, teacher, options, sampled_ids, tp_group)
            )
            grad_NU = grad_NU.div_(temperature).to(student_logits_NU.dtype)
            per_token_N = _WithGradient.apply(student_logits_NU, value_N.float(), grad_NU)
        metrics = compute_metrics(student.summary, None if teacher is None else teacher.summary)
        return LossOutput(per_token_N, metrics)


def _refuse_one_sided(
    student_NU: Tensor, teacher_NU: Tensor, tp_group: dist.ProcessGroup | None
) -> None:
    """Raise, on all ranks alike, where an id exists in one model only; one all-gather."""
    one_sided_N = ((student_NU == -torch.inf) != (teacher_NU == -torch.inf)).any(dim=-1)
    is_one_sided_N = all_gather(one_sided_N, tp_group).any(dim=0)
    raise_at_row({"logits are -inf in one model only": is_one_sided_N})


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


class _WithColumns(torch.autograd.Function):
    """Like `_WithGradient`, where all but K columns of each row have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NU: Tensor,
        value_N: Tensor,
        ids_NK: Tensor,
        grad_NK: Tensor,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(ids_NK, grad_NK)
        ctx.width, ctx.dtype, ctx.tp_group = logits_NU.shape[-1], logits_NU.dtype, tp_group
        return value_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids_NK, grad_NK = ctx.saved_tensors
        result_NU = grad_NK.new_zeros(len(grad_NK), ctx.width, dtype=ctx.dtype)
        _add_columns(result_NU, ids_NK, grad_NK * grads[0][:, None], ctx.tp_group)
        return result_NU, None, None, None, None


LOSSES: dict[str, Loss] = {
    "reverse_kl_topk": Loss(_reverse_kl_topk, on_support=True),
    "reverse_kl_topk_policy_gradient": Loss(_reverse_kl_topk_policy_gradient),
    "reverse_kl_full": Loss(_reverse_kl_full),
    "reverse_kl_sampled": Loss(_reverse_kl_sampled),
    "forward_kl_full": Loss(_forward_kl_full),
    "jsd": Loss(_jsd),
    "veto": Loss(_veto, on_support=True),
    "cross_entropy": Loss(_cross_entropy, needs_teacher=False),
}
