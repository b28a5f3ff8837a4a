"""Records of sampled tokens, sorted from rounds into rollouts.

Shapes: N rows (the positions of a round, or tokens of all rollouts), H hidden size of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from trb_megatron.batch import Rollout, TokenRecord
from trb_megatron.models.forward import copy_to_host
from trb_megatron.rollout.sequences import SequenceState


class RolloutRecorder:
    """Gathers what is known of the committed tokens, round by round, and makes rollouts of it.

    Args:
        keeps_hidden: whether the teacher's hidden states are kept.
        hidden_to_host: whether they leave the GPU at once.
    """

    def __init__(self, device: torch.device, *, keeps_hidden: bool, hidden_to_host: bool) -> None:
        self._device = device
        self._keeps_hidden = keeps_hidden
        self._hidden_to_host = hidden_to_host
        self._records: list[TokenRecord] = []
        """Of each round, at all its positions."""
        self._num_recorded = 0
        """Positions in `_records`."""
        self._kept_rows: list[int] = []
        """Which of them were committed, and, by number, to which sequence."""
        self._kept_numbers: list[int] = []
        self._teacher_hidden: list[Tensor] = []
        """Of each round, at the committed positions, where they are kept."""

    def keep(
        self,
        sequences: Sequence[SequenceState],
        counts: list[int],
        record: TokenRecord,
        teacher_NH: Tensor | None,
    ) -> None:
        """Remember the records (and hidden states) of the committed positions."""
        num_positions = len(record.accepted) // len(sequences)
        rows = [row * num_positions + i for row, count in enumerate(counts) for i in range(count)]
        self._kept_rows += [self._num_recorded + row for row in rows]
        self._kept_numbers += [sequences[row // num_positions].number for row in rows]
        self._records.append(record)
        self._num_recorded += len(record.accepted)
        if teacher_NH is not None and self._keeps_hidden:
            hidden_NH = teacher_NH[torch.tensor(rows, device=self._device)]
            self._teacher_hidden.append(
                copy_to_host(hidden_NH) if self._hidden_to_host else hidden_NH
            )

    def collect(self, sequences: Sequence[SequenceState]) -> list[Rollout]:
        """The finished rollouts, with their records sorted out of the rounds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # hidden states may be on their way to the host
        columns = self._columns_by_sequence(sequences)
        return [
            _make_rollout(sequence, of_sequence)
            for sequence, of_sequence in zip(sequences, columns, strict=True)
        ]

    def _columns_by_sequence(self, sequences: Sequence[SequenceState]) -> list[dict[str, Tensor]]:
        """Copies of the fields of `TokenRecord`, and the hidden states where they are kept."""
        by_sequence: list[dict[str, Tensor]] = [{} for _ in sequences]
        if not self._records:
            return by_sequence
        order_N = torch.argsort(torch.tensor(self._kept_numbers), stable=True)
        row_N = torch.tensor(self._kept_rows)[order_N].to(self._device)
        columns = {
            c.name: torch.cat([getattr(record, c.name) for record in self._records])[row_N]
            for c in fields(TokenRecord)
        }
        if self._teacher_hidden:
            hidden_NH = torch.cat(self._teacher_hidden)
            self._teacher_hidden.clear()  # they are large: let them go before the copy in order
            columns["teacher_hidden"] = hidden_NH[order_N.to(hidden_NH.device)]
        lengths = [len(sequence.response_ids) for sequence in sequences]
        for name, values_N in columns.items():
            for of_sequence, values in zip(by_sequence, values_N.split(lengths), strict=True):
                of_sequence[name] = values
        return by_sequence


def _make_rollout(sequence: SequenceState, columns: dict[str, Tensor]) -> Rollout:
    """A rollout with the columns of its tokens, of which there are none on other stages."""
    teacher_hidden = columns.pop("teacher_hidden", None)
    return Rollout(
        prompt_index=sequence.request.prompt_index,
        rollout_index=sequence.request.rollout_index,
        prompt_ids=sequence.request.prompt_ids,
        response_ids=tuple(sequence.response_ids),
        stopped=sequence.stopped,
        teacher_calls=sequence.num_teacher_calls,
        record=TokenRecord(**columns) if columns else None,
        teacher_hidden=teacher_hidden,
        problem=sequence.problem,
    )
