"""Slow, obviously right twins of the fast paths: dense, float64, by definition."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def blend_logprobs(student_NV: Tensor, teacher_NV: Tensor, coef_N: Tensor) -> Tensor:
    """log of p^(1-b) q^b normalized, from logits without absent ids, in float64."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    coef_N1 = coef_N.double()[:, None]
    return ((1 - coef_N1) * logp_NV + coef_N1 * logq_NV).log_softmax(-1)


def dense_blend(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> DenseBehavior:
    """Bisect KL(mu||p) = budget 100 times."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    low_N, high_N = torch.zeros_like(budget_N), torch.ones_like(budget_N)
    for _ in range(100):
        middle_N = (low_N + high_N) / 2
        feasible_N = kl(blend_logprobs(logp_NV, logq_NV, middle_N), logp_NV) <= budget_N
        low_N = torch.where(feasible_N, middle_N, low_N)
        high_N = torch.where(feasible_N, high_N, middle_N)
    coef_N = torch.where(kl(logq_NV, logp_NV) <= budget_N, 1.0, low_N)
    coef_N = torch.where(budget_N == 0, 0.0, coef_N)
    return _describe(coef_N, blend_logprobs(logp_NV, logq_NV, coef_N), logp_NV, logq_NV)


def _describe(coef_N: Tensor, logmu_NV: Tensor, logp_NV: Tensor, logq_NV: Tensor) -> DenseBehavior:
    mu_NV = logmu_NV.exp()
    entropy_N = -torch.where(mu_NV > 0, mu_NV * logmu_NV, 0.0).sum(-1)
    return DenseBehavior(coef_N, kl(logmu_NV, logp_NV), kl(logmu_NV, logq_NV), entropy_N, logmu_NV)


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


def dense_loss(
    name: str,
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    top_k: int = 16,
    temperature: float = 1.0,
    jsd_weight: float = 0.5,
    veto_coef: float = 0.0,
    sampled_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient [N, V] of a loss by definition and autograd, in float64.

    Logits without absent ids, or with ids that are -1e9 in both models.
    """
    logits_NV = student_NV.detach().double().requires_grad_()
    logp_NV = (logits_NV / temperature).log_softmax(-1)
    logq_NV = (teacher_NV.double() / temperature).log_softmax(-1)
    support_NK = logits_NV.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
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
        logm_NV = torch.logaddexp(
            logp_NV + torch.tensor(1 - jsd_weight).double().log(),
            logq_NV + torch.tensor(jsd_weight).double().log(),
        )
        value_N = jsd_weight * kl(logq_NV, logm_NV) + (1 - jsd_weight) * kl(logp_NV, logm_NV)
        surrogate_N = value_N
    elif name == "veto":
        target_NK = (logq_NK + veto_coef * logp_NK.detach()).log_softmax(-1)
        value_N = surrogate_N = kl(logp_NK.log_softmax(-1), target_NK)
    else:
        assert sampled_ids is not None
        logp_N = logp_NV.gather(-1, sampled_ids[:, None])[:, 0]
        ratio_N = (logp_N - logq_NV.gather(-1, sampled_ids[:, None])[:, 0]).detach()
        value_N = {"reverse_kl_sampled": ratio_N, "cross_entropy": -logp_N}[name]
        surrogate_N = {"reverse_kl_sampled": ratio_N * logp_N, "cross_entropy": -logp_N}[name]
    (grad_NV,) = torch.autograd.grad(surrogate_N.sum(), logits_NV)
    return value_N.detach(), grad_NV
