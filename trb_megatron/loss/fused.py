"""A loss straight from hidden states: output layers, loss and gradients, chunk by chunk.

The logits of a step do not fit: 32,768 tokens x 151,936 columns in fp32 are 19.9 GB for one model.
`fused_loss` projects a chunk of tokens through both output layers, applies a rule of `LOSSES` to it
and turns the rule's gradient into that of the student's hidden states and output weight at once, so
that nothing of size [tokens, U] outlives a chunk (`walk`).

Shapes: N tokens (at least one), U this rank's shard of the vocabulary, H hidden size (each model
has its own).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb_megatron.loss.walk import FusedLossSettings, OutputLayer, Walk


class FusedLossOutput(NamedTuple):
    """A loss summed over N tokens."""

    loss_sum: Tensor
    """Scalar fp32: the weighted sum, differentiable."""
    per_token: Tensor
    """[N] fp32 in nats, unweighted, detached."""
    metrics: dict[str, Tensor]
    """Each [N] fp32, detached; see `views.compute_metrics`."""


def fused_loss(
    settings: FusedLossSettings,
    student: OutputLayer,
    teacher: OutputLayer | None,
    *,
    sampled_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    weight_grad_UH: Tensor | None = None,
) -> FusedLossOutput:
    """Sum a loss over tokens, weighted, and differentiate it by hidden states and weight.

    The gradients are computed together with the value. What autograd then gives is that of
    `student.hidden_NH` and, without `weight_grad_UH`, of `student.weight_UH`.

    Args:
        teacher: None for a loss that needs none.
        sampled_ids: [N], where the loss needs them.
        token_weights: [N]; a token of weight 0 contributes exactly zero. None: all are 1.
        weight_grad_UH: a gradient buffer (Megatron's `main_grad`) that the weight's gradient is
            added to, at once. The sum must then be differentiated with an upstream gradient of 1
            (RuntimeError otherwise), and the weight gets no gradient from autograd, so that a hook
            which waits for one (`overlap_grad_reduce`) never runs.

    All-gathers over `settings.tp_group` for each block of tokens, and one all-reduce of the
    gradient [N, H] of the hidden states. Hidden states, weights of tokens and results replicated,
    output weights sharded; logits are upcast to fp32. Raises ValueError like the losses, a RowError
    counting all tokens.
    """
    if settings.loss.needs_teacher and teacher is None:
        raise ValueError("this loss needs a teacher")
    wants_grad = torch.is_grad_enabled() and (
        student.hidden_NH.requires_grad or student.weight_UH.requires_grad
    )
    own_weight_grad = wants_grad and weight_grad_UH is None and student.weight_UH.requires_grad
    if own_weight_grad:
        weight_grad_UH = torch.zeros_like(student.weight_UH, dtype=torch.float32)
    walk = Walk(
        settings,
        OutputLayer(student.hidden_NH.detach(), student.weight_UH.detach()),
        teacher,
        sampled_ids,
        token_weights,
        grad_hidden_NH=torch.empty_like(student.hidden_NH) if wants_grad else None,
        grad_weight_UH=weight_grad_UH if wants_grad else None,
    )
    with torch.no_grad():
        per_token_N, metrics = walk.run()
        weighted_N = per_token_N if token_weights is None else per_token_N * token_weights
        loss_sum = weighted_N.sum()
    if wants_grad:
        loss_sum = _WithGradients.apply(
            student.hidden_NH,
            student.weight_UH if own_weight_grad else None,
            loss_sum,
            walk.grad_hidden_NH,
            walk.grad_weight_UH if own_weight_grad else None,
            weight_grad_UH is not None and not own_weight_grad,
        )
    return FusedLossOutput(loss_sum, per_token_N, metrics)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_UH: Tensor | None,
        loss_sum: Tensor,
        grad_hidden_NH: Tensor,
        grad_weight_UH: Tensor | None,
        is_accumulated: bool,
    ) -> Tensor:
        ctx.grads, ctx.is_accumulated = (grad_hidden_NH, grad_weight_UH), is_accumulated
        ctx.weight_dtype = None if weight_UH is None else weight_UH.dtype
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        if ctx.is_accumulated and upstream != 1:
            raise RuntimeError(
                f"the gradient of the output weight was added to its buffer for an upstream "
                f"gradient of 1, not {float(upstream)}"
            )
        grad_hidden_NH, grad_weight_UH = ctx.grads
        # The buffers belong to this node, which runs once: scaling in place saves their copies.
        ctx.grads = None
        grad_hidden_NH = grad_hidden_NH.mul_(upstream)
        if grad_weight_UH is not None:
            grad_weight_UH = grad_weight_UH.mul_(upstream).to(ctx.weight_dtype)
        return grad_hidden_NH, grad_weight_UH, None, None, None, None
