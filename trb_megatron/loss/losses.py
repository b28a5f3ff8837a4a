"""`LOSSES`, the table of losses, each callable on logits with its gradient.

`fused_loss` (in `fused`) applies the same rules where no one ever holds the logits of all tokens.

Shapes: N rows (packed tokens), K ids of the student's top-k, U this rank's vocabulary shard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb_megatron.distributed.vocab_parallel import all_gather, mask_invalid, raise_at_row
from trb_megatron.loss import rules
from trb_megatron.loss.views import compute_metrics, view_model


class LossOutput(NamedTuple):
    """A loss at N prefixes."""

    per_token: Tensor
    """[N] fp32 in nats, differentiable with respect to the student's logits, unweighted."""
    metrics: dict[str, Tensor]
    """Each [N] fp32, detached; see `compute_metrics`."""


@dataclass(frozen=True)
class Loss:
    """A row of the table: a rule, and what it reads and touches."""

    rule: Callable[..., tuple[Tensor, Tensor]]
    """A `rules.SupportRule` if `on_support`, else a `rules.VocabRule`."""
    on_support: bool = False
    needs_teacher: bool = True

    @property
    def reads_both_at_once(self) -> bool:
        """Whether the rule reads both models' logits together.

        A rule on the support reads one model's after the other's.
        """
        return self.needs_teacher and not self.on_support

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
        as in `rules.LossOptions`, metrics as in `compute_metrics`.

        At most eight all-gathers over `tp_group` forward, none backward; logits sharded, ids and
        results replicated; upcast to fp32, the gradient in the dtype of the logits. Raises
        ValueError, on all ranks alike, for options out of range, a top_k beyond the number of valid
        ids, and a NaN, a +inf or an id that is -inf in one model only, naming the row.
        """
        options = rules.LossOptions(top_k, temperature, jsd_weight, veto_coef)
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
                rules.VocabInputs(student, teacher, options, sampled_ids, tp_group)
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
        rules.add_columns(result_NU, ids_NK, grad_NK * grads[0][:, None], ctx.tp_group)
        return result_NU, None, None, None, None


LOSSES: dict[str, Loss] = {
    "reverse_kl_topk": Loss(rules.reverse_kl_topk, on_support=True),
    "reverse_kl_topk_policy_gradient": Loss(rules.reverse_kl_topk_policy_gradient),
    "reverse_kl_full": Loss(rules.reverse_kl_full),
    "reverse_kl_sampled": Loss(rules.reverse_kl_sampled),
    "forward_kl_full": Loss(rules.forward_kl_full),
    "jsd": Loss(rules.jsd),
    "veto": Loss(rules.veto, on_support=True),
    "cross_entropy": Loss(rules.cross_entropy, needs_teacher=False),
}
