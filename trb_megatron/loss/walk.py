"""The chunk loop behind `fused_loss`: logits, loss and gradients of some tokens at a time.

A chunk of tokens goes through both output layers. The loss's rule makes the gradient of the logits
of them, and that becomes the gradient of the student's hidden states and output weight at once.

Shapes: N tokens (at least one), C of a chunk, B of a block, K columns of a row, U this rank's shard
of the vocabulary, H hidden size (each model has its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trb_megatron.behavior.stop_alignment import (
    StopAlignment,
    merge_stop_ids_,
    spread_stop_columns,
    spread_stop_gradient_,
)
from trb_megatron.distributed.vocab_parallel import RowError, mask_invalid_, vocab_range
from trb_megatron.loss.losses import Loss
from trb_megatron.loss.rules import LossOptions, VocabInputs
from trb_megatron.loss.views import Summary, compute_metrics, view_model

# The rules work on blocks of a chunk, of this share of its tokens, so that their temporaries (about
# eight of the size of a block) and those of the matrix products add no more than half to what the
# chunk's own buffers take. On a CPU a block fits into the caches.
_BLOCKS_PER_CHUNK = 16
_MEMORY_PER_BUFFER = 1.5
_CPU_BLOCK_ELEMENTS = 2**19


_Part = tuple[Tensor, dict[str, Tensor]]
"""Values and metrics of some tokens."""


class OutputLayer(NamedTuple):
    """The end of a model: what `hidden_NH @ weight_UH.T` makes logits of."""

    hidden_NH: Tensor
    """Final hidden states, replicated. Kept in place of logits they are small: 8,192 tokens of
    H = 4,096 in bf16 are 67 MB, their logits over 151,936 columns in fp32 5.0 GB. The teacher's may
    lie in (pinned) host memory; each chunk is then copied to the device of the weight."""
    weight_UH: Tensor
    """This rank's rows of the output weight, tied to the embedding or not."""


@dataclass(frozen=True)
class FusedLossSettings:
    """The loss and its parameters, the same for every microbatch of a step.

    Attributes:
        loss: a row of `LOSSES`.
        num_valid: columns from here on, counted over all shards, do not exist.
        alignment: stop ids of both models, merged into one after the division by the temperature;
            None: the logits are compared as they are.
        workspace_bytes: memory for the chunks; what more of it changes is the speed. One token is
            the least, whatever it needs.
    """

    loss: Loss
    options: LossOptions
    workspace_bytes: int
    tp_group: dist.ProcessGroup | None = None
    num_valid: int | None = None
    alignment: StopAlignment | None = None

    @property
    def merged_stops(self) -> StopAlignment | None:
        """The alignment where it has something to merge."""
        return None if self.alignment is None or self.alignment.is_trivial else self.alignment


def logit_bytes(loss: Loss, dtype: torch.dtype) -> float:
    """Bytes that one logit of a chunk takes of the workspace, temporaries included.

    An fp32 buffer of each model whose logits the rule reads at once, and one in half precision
    where the weights, of type `dtype`, are.
    """
    buffers = 4 * (1 + loss.reads_both_at_once) * _MEMORY_PER_BUFFER
    return buffers if dtype == torch.float32 else buffers + dtype.itemsize


@dataclass
class Walk:
    """One pass over the tokens: what the loss reads, the gradients, and buffers of a chunk."""

    settings: FusedLossSettings
    student: OutputLayer
    teacher: OutputLayer | None
    sampled_ids: Tensor | None
    token_weights: Tensor | None
    grad_hidden_NH: Tensor | None
    """Overwritten; None: no gradient is wanted."""
    grad_weight_UH: Tensor | None
    """Added to; None: the weight's gradient is not wanted."""

    def __post_init__(self) -> None:
        settings, weight_UH = self.settings, self.student.weight_UH
        self.loss, self.options = settings.loss, settings.options
        self.tp_group, self.num_valid = settings.tp_group, settings.num_valid
        self.alignment = settings.merged_stops
        self.has_pair = settings.loss.reads_both_at_once
        shape = (self._chunk_size(), len(weight_UH))
        self.student_CU = weight_UH.new_empty(shape, dtype=torch.float32)
        self.teacher_CU = torch.empty_like(self.student_CU) if self.has_pair else self.student_CU
        # Half-precision logits are made here and upcast; their gradient is rounded into it.
        self.rounded_CU = self.student_CU
        if weight_UH.dtype != torch.float32:
            self.rounded_CU = weight_UH.new_empty(shape)

    def _chunk_size(self) -> int:
        """Tokens of a chunk: as many as fit, in chunks of about the same size."""
        num_tokens, weight_UH = len(self.student.hidden_NH), self.student.weight_UH
        column_bytes = logit_bytes(self.loss, weight_UH.dtype)
        most = max(1, int(self.settings.workspace_bytes / (column_bytes * len(weight_UH))))
        num_chunks = -(-num_tokens // most)
        return -(-num_tokens // num_chunks)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [N] and metrics of all tokens."""
        run_chunk = self._run_support_chunk if self.loss.on_support else self._run_vocab_chunk
        parts = [run_chunk(tokens) for tokens in self._chunks()]
        if self.grad_hidden_NH is not None and self.tp_group is not None:
            # So far each rank has what its columns contribute.
            dist.all_reduce(self.grad_hidden_NH, group=self.tp_group)
        return _concatenate(parts)

    def _chunks(self) -> Iterator[slice]:
        return _slices(slice(0, len(self.student.hidden_NH)), len(self.student_CU))

    def _blocks(self, tokens: slice) -> Iterator[tuple[slice, slice]]:
        """Each block of a chunk: its rows in the chunk, and its tokens."""
        size = -(-len(self.student_CU) // _BLOCKS_PER_CHUNK)
        if self.student_CU.device.type == "cpu":
            size = min(size, max(1, _CPU_BLOCK_ELEMENTS // self.student_CU.shape[1]))
        for block in _slices(tokens, size):
            rows = slice(block.start - tokens.start, block.stop - tokens.start)
            yield rows, block

    def _run_vocab_chunk(self, tokens: slice) -> _Part:
        """Rules on the vocabulary: the gradient takes the place of the student's logits."""
        student_CU, shares_CK = self._project_student(tokens)
        teacher_CU = self._project_teacher(tokens) if self.has_pair else None
        options, tp_group = self.options, self.tp_group
        parts = []
        for rows, block in self._blocks(tokens):
            with _rows_counted_from(block.start):
                student = view_model("student", student_CU[rows], options.top_k, tp_group)
                teacher = None
                if teacher_CU is not None:
                    support_ids_BK = student.summary.topk_ids_NK
                    teacher = view_model(
                        "teacher", teacher_CU[rows], options.top_k, tp_group, support_ids_BK
                    )
                sampled_ids_B = None if self.sampled_ids is None else self.sampled_ids[block]
                inputs = VocabInputs(student, teacher, options, sampled_ids_B, tp_group)
                value_B, grad_BU = self.loss.rule(inputs)
            torch.mul(grad_BU, self._gradient_scale(block), out=student_CU[rows])
            metrics = compute_metrics(student.summary, None if teacher is None else teacher.summary)
            parts.append((value_B.float(), metrics))
        if self.grad_hidden_NH is not None:
            if self.alignment is not None:
                assert shares_CK is not None
                spread_stop_gradient_(
                    student_CU,
                    shares_CK,
                    self.alignment.student_ids,
                    self.alignment,
                    tp_group=tp_group,
                )
            self._add_gradient(tokens, student_CU)
        return _concatenate(parts)

    def _run_support_chunk(self, tokens: slice) -> _Part:
        """Rules on the support: all that is kept of the logits are K columns of each row."""
        student_CU, shares_CK = self._project_student(tokens)
        student = self._summarize("student", student_CU, tokens, None)
        ids_CK = student.topk_ids_NK
        teacher = self._summarize("teacher", self._project_teacher(tokens), tokens, ids_CK)
        with _rows_counted_from(tokens.start):
            value_C, grad_CK = self.loss.rule(student, teacher, self.options)
        if self.grad_hidden_NH is not None:
            grad_CK = grad_CK.float() * self._gradient_scale(tokens)
            if self.alignment is not None:
                assert shares_CK is not None
                ids_CK, grad_CK = spread_stop_columns(
                    ids_CK, grad_CK, shares_CK, self.alignment.student_ids, self.alignment
                )
            self._add_column_gradient(tokens, ids_CK, grad_CK)
        return value_C.float(), compute_metrics(student, teacher)

    def _summarize(
        self, name: str, logits_CU: Tensor, tokens: slice, support_ids_CK: Tensor | None
    ) -> Summary:
        """One model's summary of a chunk, made block by block."""
        parts = []
        for rows, block in self._blocks(tokens):
            support_ids_BK = None if support_ids_CK is None else support_ids_CK[rows]
            with _rows_counted_from(block.start):
                view = view_model(
                    name, logits_CU[rows], self.options.top_k, self.tp_group, support_ids_BK
                )
            parts.append(view.summary)
        return _stack(parts)

    def _project_student(self, tokens: slice) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk, ready for a rule, and the shares of its merged stop ids."""
        own_ids = None if self.alignment is None else self.alignment.student_ids
        return self._project(self.student, tokens, self.student_CU, own_ids)

    def _project_teacher(self, tokens: slice) -> Tensor:
        assert self.teacher is not None
        own_ids = None if self.alignment is None else self.alignment.teacher_ids
        return self._project(self.teacher, tokens, self.teacher_CU, own_ids)[0]

    def _project(
        self,
        model: OutputLayer,
        tokens: slice,
        buffer_CU: Tensor,
        own_ids: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor | None]:
        weight_UH = model.weight_UH
        hidden_CH = model.hidden_NH[tokens].to(weight_UH.device, non_blocking=True)
        logits_CU, rounded_CU = buffer_CU[: len(hidden_CH)], self.rounded_CU[: len(hidden_CH)]
        if weight_UH.dtype == torch.float32:
            torch.mm(hidden_CH, weight_UH.T, out=logits_CU)
        else:
            logits_CU.copy_(torch.mm(hidden_CH, weight_UH.T, out=rounded_CU))
        if self.options.temperature != 1.0:
            logits_CU.div_(self.options.temperature)
        shares_CK = None
        if self.alignment is not None:
            assert own_ids is not None
            shares_CK = merge_stop_ids_(logits_CU, own_ids, self.alignment, tp_group=self.tp_group)
        mask_invalid_(logits_CU, self.num_valid, self.tp_group)
        return logits_CU, shares_CK

    def _gradient_scale(self, tokens: slice) -> Tensor | float:
        """The factor of the rule's gradient: the tokens' weights [C, 1] / temperature."""
        if self.token_weights is None:
            return 1.0 / self.options.temperature
        return self.token_weights[tokens, None].float() / self.options.temperature

    def _add_gradient(self, tokens: slice, grad_CU: Tensor) -> None:
        """From the logits' gradient to that of hidden states and weight."""
        hidden_CH, weight_UH = self.student.hidden_NH[tokens], self.student.weight_UH
        grad_hidden_CH = self._grad_hidden(tokens)
        if weight_UH.dtype == torch.float32:
            torch.mm(grad_CU, weight_UH, out=grad_hidden_CH)
            if self.grad_weight_UH is not None:
                self.grad_weight_UH.addmm_(grad_CU.T, hidden_CH)
            return
        grad_CU = self.rounded_CU[: len(grad_CU)].copy_(grad_CU)
        torch.mm(grad_CU, weight_UH, out=grad_hidden_CH)
        if self.grad_weight_UH is not None:
            # Products in half precision, sums over chunks in fp32; by blocks of columns, since the
            # product has the size of the weight.
            num_rows = max(
                1, self.settings.workspace_bytes // (_BLOCKS_PER_CHUNK * 4 * hidden_CH.shape[1])
            )
            for rows in _slices(slice(0, len(weight_UH)), num_rows):
                self.grad_weight_UH[rows] += grad_CU[:, rows].T @ hidden_CH

    def _add_column_gradient(self, tokens: slice, ids_CK: Tensor, grad_CK: Tensor) -> None:
        """`_add_gradient` for K columns per row, given by global ids: no [C, U] product."""
        hidden_CH, weight_UH = self.student.hidden_NH[tokens], self.student.weight_UH
        start, stop = vocab_range(len(weight_UH), self.tp_group)
        # Columns of other shards contribute nothing, wherever they point.
        grad_CK = torch.where((ids_CK >= start) & (ids_CK < stop), grad_CK, 0.0)
        local_CK = (ids_CK - start).clamp_(0, len(weight_UH) - 1)
        self._grad_hidden(tokens)[:] = F.embedding_bag(
            local_CK, weight_UH, per_sample_weights=grad_CK.to(weight_UH.dtype), mode="sum"
        )
        if self.grad_weight_UH is not None:
            for local_C, grad_C1 in zip(local_CK.unbind(-1), grad_CK.split(1, -1), strict=True):
                _add_rows(self.grad_weight_UH, local_C, grad_C1 * hidden_CH)

    def _grad_hidden(self, tokens: slice) -> Tensor:
        assert self.grad_hidden_NH is not None
        return self.grad_hidden_NH[tokens]


def _add_rows(result_UH: Tensor, rows_C: Tensor, values_CH: Tensor) -> None:
    """Add to rows, of which some may come twice, always in the same order."""
    if result_UH.is_cuda:  # there index_add_ adds in any order, and here index_put_ does
        result_UH.index_put_((rows_C,), values_CH, accumulate=True)
    else:
        result_UH.index_add_(0, rows_C, values_CH)


@contextmanager
def _rows_counted_from(first: int) -> Iterator[None]:
    """Make the rows of a RowError those of all tokens."""
    try:
        yield
    except RowError as error:
        raise RowError(error.problem, [first + row for row in error.rows]) from None


def _slices(whole: slice, size: int) -> Iterator[slice]:
    """Cut a slice into slices of at most `size`."""
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))


def _stack(summaries: Iterable[Summary]) -> Summary:
    return Summary(*map(torch.cat, zip(*summaries, strict=True)))


def _concatenate(parts: Sequence[_Part]) -> _Part:
    values, metrics = zip(*parts, strict=True)
    return torch.cat(values), {key: torch.cat([m[key] for m in metrics]) for key in metrics[0]}
