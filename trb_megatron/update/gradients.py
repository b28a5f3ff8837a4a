"""The gradients of a step: forward and backward of the student, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from trb_megatron.batch import Microbatch
from trb_megatron.config.options import Config
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.distributed.vocab_parallel import RowError
from trb_megatron.job.nonfinite import NonFiniteGuard, find_in_gradients
from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer
from trb_megatron.models.forward import forward_backward
from trb_megatron.models.pair import Models
from trb_megatron.models.sources import ModelSources


def loss_of_step(
    step: int, config: Config, sources: ModelSources, layout: ParallelLayout
) -> FusedLossSettings:
    """The loss of an optimizer step, counted from 0; the coefficient of "veto" decays over them."""
    loss, remaining = config.loss, 1.0 - step / config.training.steps
    return FusedLossSettings(
        loss=LOSSES[loss.name],
        options=LossOptions(
            top_k=loss.top_k,
            temperature=loss.temperature,
            jsd_weight=loss.jsd_weight,
            veto_coef=loss.veto_coef * remaining,
        ),
        workspace_bytes=loss.workspace_mb * 10**6,
        tp_group=layout.tp_group,
        num_valid=sources.tokenizer_size,
        alignment=sources.alignment if config.is_distilling else None,
    )


class StepGradients:
    """Gradients of the global mean loss per token, in the student's gradient buffers.

    Args:
        student_ddp: the student in Megatron's DistributedDataParallel.
        guard: stops on a loss or gradient that is not finite.
        step: names the step in its messages.
    """

    def __init__(
        self,
        student_ddp: DistributedDataParallel,
        models: Models,
        loss_settings: FusedLossSettings,
        guard: NonFiniteGuard,
        step: int,
    ) -> None:
        self._student_ddp = student_ddp
        self._models = models
        self._loss_settings = loss_settings
        self._guard = guard
        self._step = step
        self._problem: str | None = None
        """Of the first token whose loss is not finite."""
        self._microbatches: Sequence[Microbatch] = ()

    def compute(self, microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
        """Forward and backward over all microbatches; sums of the loss and its metrics.

        Collective over all ranks. The sums are on the last stage, and empty on others.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
        """
        model_config = self._student_ddp.config
        self._microbatches = microbatches
        model_config.finalize_model_grads_func = self._finalize
        self._student_ddp.train()
        self._student_ddp.zero_grad_buffer()
        sums: dict[str, Tensor] = {}
        try:
            for metrics in forward_backward(self._student_ddp, microbatches, self.loss):
                for name, value in metrics.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value
        finally:
            # Megatron's configuration must not keep the microbatches, with the teacher's hidden
            # states, through the next rollouts.
            model_config.finalize_model_grads_func = None
        return sums

    def loss(self, hidden_NH: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the sampled tokens of a microbatch, and sums of its metrics."""
        student, teacher = self._models.student, self._models.teacher
        of_teacher = None
        if teacher is not None:
            assert microbatch.teacher_hidden_NH is not None
            of_teacher = OutputLayer(microbatch.teacher_hidden_NH, teacher.output_weight)
        try:
            output = fused_loss(
                self._loss_settings,
                OutputLayer(hidden_NH, student.output_weight),
                of_teacher,
                sampled_ids=microbatch.labels_N,
                weight_grad_UH=student.output_weight.main_grad,
            )
        except RowError as error:
            # The other stages are in the middle of the schedule: go through with it.
            self._note(error.problem, microbatch, error.rows[0])
            return 0.0 * hidden_NH.sum(), {}
        if not output.loss_sum.isfinite():
            (rows,) = output.per_token.isfinite().logical_not().nonzero(as_tuple=True)
            self._note("the loss is not finite", microbatch, int(rows[0]))
        sums = {f"loss/{name}": values.sum() for name, values in output.metrics.items()}
        return output.loss_sum, {"loss": output.loss_sum.detach(), **sums}

    def _note(self, problem: str, microbatch: Microbatch, row: int) -> None:
        if self._problem is None:
            self._problem = f"{problem} at {microbatch.describe(row)}"

    def _finalize(self, models: list[Any], *args: Any, **kwargs: Any) -> None:
        """Stop on a non-finite loss or gradient while it is known whose it is, then reduce."""
        # The loss first: it is the reason where both are not finite, perhaps on other ranks.
        self._guard.check(self._problem, self._step)
        problem = None
        if not all(bool(buffer.grad_data.isfinite().all()) for buffer in self._student_ddp.buffers):
            problem = find_in_gradients(self._models.student, self._microbatches)
        self._guard.check(problem, self._step)
        finalize_model_grads(models, *args, **kwargs)
