"""Slow, obviously right twins of the fast paths: dense, float64, by definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.loss.rules import LossOptions


@dataclass(frozen=True)
class DenseBehavior:
    """A behavior policy of one batch; every field is [N] but `logprobs`, [N, V]; float64."""

    blend_coef: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    entropy: Tensor
    logprobs: Tensor


def kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p||q) per row; ids that are -inf in p contribute nothing."""
    return torch.where(logp_NV.exp() > 0, logp_NV.exp() * (logp_NV - logq_NV), 0.0).sum(-1)


def entropy(logp_NV: Tensor) -> Tensor:
    """Entropy of p per row; ids that are -inf contribute nothing."""
    return -torch.where(logp_NV.exp() > 0, logp_NV.exp() * logp_NV, 0.0).sum(-1)


def blend_logprobs(student_NV: Tensor, teacher_NV: Tensor, blend_coef_N: Tensor) -> Tensor:
    """log of p^(1-β) q^β normalized, from logits without absent ids, in float64."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    blend_coef_N1 = blend_coef_N.double()[:, None]
    return ((1 - blend_coef_N1) * logp_NV + blend_coef_N1 * logq_NV).log_softmax(-1)


def dense_blend(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> DenseBehavior:
    """Bisect KL(mu||p) = budget 100 times."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    low_N, high_N = torch.zeros_like(budget_N), torch.ones_like(budget_N)
    for _ in range(100):
        middle_N = (low_N + high_N) / 2
        feasible_N = kl(blend_logprobs(logp_NV, logq_NV, middle_N), logp_NV) <= budget_N
        low_N = torch.where(feasible_N, middle_N, low_N)
        high_N = torch.where(feasible_N, high_N, middle_N)
    blend_coef_N = torch.where(kl(logq_NV, logp_NV) <= budget_N, 1.0, low_N)
    blend_coef_N = torch.where(budget_N == 0, 0.0, blend_coef_N)
    logmu_NV = blend_logprobs(logp_NV, logq_NV, blend_coef_N)
    return _describe(blend_coef_N, logmu_NV, logp_NV, logq_NV)


def _describe(
    blend_coef_N: Tensor, logmu_NV: Tensor, logp_NV: Tensor, logq_NV: Tensor
) -> DenseBehavior:
    return DenseBehavior(
        blend_coef=blend_coef_N,
        kl_student=kl(logmu_NV, logp_NV),
        kl_teacher=kl(logmu_NV, logq_NV),
        entropy=entropy(logmu_NV),
        logprobs=logmu_NV,
    )


def dense_skd(
    student_NV: Tensor, teacher_NV: Tensor, fresh_NV: Tensor, top_k: int
) -> DenseBehavior:
    """SKD by definition; `fresh_NV` are the logits of the draw that replaces an unlikely one."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    is_likely_NV = torch.zeros_like(logp_NV, dtype=torch.bool)
    likeliest_NK = teacher_NV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    is_likely_NV.scatter_(-1, likeliest_NK, True)
    kept_NV = logp_NV.exp() * is_likely_NV
    replaced_N1 = (logp_NV.exp() * ~is_likely_NV).sum(-1, keepdim=True)
    logmu_NV = (kept_NV + replaced_N1 * fresh_NV.double().softmax(-1)).log()
    return _describe(torch.full_like(logp_NV[:, 0], torch.nan), logmu_NV, logp_NV, logq_NV)


def dense_teacher(student_NV: Tensor, teacher_NV: Tensor) -> DenseBehavior:
    """The teacher itself, as a behavior policy."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    return _describe(torch.ones_like(logp_NV[:, 0]), logq_NV, logp_NV, logq_NV)


def align_by_definition(logits_NV: Tensor, own_ids: tuple[int, ...], stop: StopAlignment) -> Tensor:
    """The logits with merged stop ids, by torch operations that autograd differentiates."""
    columns = list(logits_NV.unbind(-1))
    merged_N = logits_NV[:, list(own_ids)].logsumexp(-1)
    for removed_id in stop.removed_ids:
        columns[removed_id] = torch.full_like(merged_N, -torch.inf)
    columns[stop.stop_id] = merged_N
    return torch.stack(columns, dim=-1)


def dense_loss(
    name: str,
    student_NV: Tensor,
    teacher_NV: Tensor,
    options: LossOptions,
    sampled_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient [N, V] of a loss by definition and autograd, in float64.

    Logits without absent ids, or with ids that are -1e9 in both models.
    """
    logits_NV = student_NV.detach().double().requires_grad_()
    logp_NV = (logits_NV / options.temperature).log_softmax(-1)
    logq_NV = (teacher_NV.double() / options.temperature).log_softmax(-1)
    order_NV = logits_NV.detach().sort(dim=-1, descending=True, stable=True).indices
    support_NK = order_NV[:, : options.top_k]
    logp_NK, logq_NK = logp_NV.gather(-1, support_NK), logq_NV.gather(-1, support_NK)
    if name == "reverse_kl_topk":
        value_N = surrogate_N = kl(logp_NK.log_softmax(-1), logq_NK.log_softmax(-1))
    elif name == "reverse_kl_topk_policy_gradient":
        weighted_NK = (logp_NK.softmax(-1) * (logp_NK - logq_NK)).detach()
        value_N, surrogate_N = weighted_NK.sum(-1), (weighted_NK * logp_NK).sum(-1)
    elif name == "reverse_kl_full":
        value_N = surrogate_N = kl(logp_NV, logq_NV)
    elif name == "forward_kl_full":
        value_N = surrogate_N = kl(logq_NV, logp_NV)
    elif name == "jsd":
        value_N = surrogate_N = _dense_jsd(logp_NV, logq_NV, options.jsd_weight)
    elif name == "veto":
        target_NK = (logq_NK + options.veto_coef * logp_NK.detach()).log_softmax(-1)
        value_N = surrogate_N = kl(logp_NK.log_softmax(-1), target_NK)
    else:
        assert sampled_ids is not None
        logp_N = logp_NV.gather(-1, sampled_ids[:, None])[:, 0]
        ratio_N = (logp_N - logq_NV.gather(-1, sampled_ids[:, None])[:, 0]).detach()
        value_N = {"reverse_kl_sampled": ratio_N, "cross_entropy": -logp_N}[name]
        surrogate_N = {"reverse_kl_sampled": ratio_N * logp_N, "cross_entropy": -logp_N}[name]
    (grad_NV,) = torch.autograd.grad(surrogate_N.sum(), logits_NV)
    return value_N.detach(), grad_NV


def _dense_jsd(logp_NV: Tensor, logq_NV: Tensor, weight: float) -> Tensor:
    """weight * KL(q||m) + (1 - weight) * KL(p||m) with m = weight * q + (1 - weight) * p."""
    log_weight, log_rest = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
    logm_NV = torch.logaddexp(logp_NV + log_rest, logq_NV + log_weight)
    return weight * kl(logq_NV, logm_NV) + (1 - weight) * kl(logp_NV, logm_NV)
