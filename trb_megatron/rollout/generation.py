"""Rounds of generation: draft, score, draw and commit, as the `engine` describes them.

Shapes: S sequences of a round, G positions of a round, N packed tokens (or rows), U this rank's
vocabulary shard, H hidden size of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trb_megatron.batch import TokenRecord
from trb_megatron.behavior.policies import Policy
from trb_megatron.behavior.sampling import Sample
from trb_megatron.distributed.pipeline import Announcement
from trb_megatron.distributed.vocab_parallel import RowError
from trb_megatron.models.decode_graphs import DecodeGraphs
from trb_megatron.models.forward import CachedModel
from trb_megatron.models.gpt import common_token_multiple
from trb_megatron.models.kv_cache import PageTable, RaggedBatch
from trb_megatron.rollout.drafting import choose_num_positions, estimate_acceptance
from trb_megatron.rollout.recorder import RolloutRecorder
from trb_megatron.rollout.scheduler import Admission, Scheduler, SlotGroup
from trb_megatron.rollout.sequences import Request, ResponseSpec, SequenceState
from trb_megatron.uniforms import position_keys, rollout_key

if TYPE_CHECKING:
    from trb_megatron.rollout.engine import RolloutEngine

Watch = Callable[[int, int], None]
"""Is told how many sequences of a model replica are finished, and how many tokens it has drawn."""


@dataclass(frozen=True)
class GenerationCounts:
    """The cost of a generation for one model replica.

    Attributes:
        teacher_calls: forward passes of the teacher.
        prefilled_tokens: tokens that were run without a token being sampled behind them.
        preemptions: sequences that had to give their pages back.
    """

    teacher_calls: int = 0
    prefilled_tokens: int = 0
    preemptions: int = 0


class Generation:
    """One call of `RolloutEngine.generate`: its caches and sequences, and their rounds.

    Args:
        spec: when a response ends, and what keys its random numbers.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        requests: Sequence[Request],
        policy: Policy,
        spec: ResponseSpec,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.spec = spec
        self.layout = engine.layout
        self.device = engine.layout.device
        self.table = engine.make_page_table(
            requests, spec.max_response_tokens, with_teacher=policy.needs_teacher
        )
        indices_N2 = torch.tensor([(r.prompt_index, r.rollout_index) for r in requests])
        keys_N = rollout_key(spec.seed, spec.step, *indices_N2.unbind(dim=1))
        num_groups = engine.layout.pp_size
        self.scheduler = Scheduler(requests, keys_N.tolist(), self.table, num_groups)
        self.student = CachedModel(engine.student, self.table, engine.layout)
        self.teacher = None
        if policy.needs_teacher:
            assert engine.teacher is not None, "this policy needs a teacher"
            self.teacher = CachedModel(engine.teacher, self.table, engine.layout)
        self.graphs: DecodeGraphs | None = None
        if engine.uses_cuda_graphs:
            max_pages = self.table.pages_for(self.table.max_tokens)
            self.graphs = DecodeGraphs(
                self.student, policy.propose, max_pages, engine.page_tokens, self.token_multiple
            )
        self.recorder = RolloutRecorder(
            self.device,
            keeps_hidden=engine.config.keep_teacher_hidden,
            hidden_to_host=engine.hidden_to_host,
        )
        self.num_accepted = self.num_scanned = 0
        self._num_teacher_calls = self._num_prefilled_tokens = 0
        self.num_positions = engine.config.max_positions
        """Of the latest round."""

    @property
    def counts(self) -> GenerationCounts:
        """So far."""
        return GenerationCounts(
            self._num_teacher_calls, self._num_prefilled_tokens, self.scheduler.num_preemptions
        )

    def serve(self, group: SlotGroup, watch: Watch | None = None) -> Iterator[None]:
        """Admit and run rounds until nothing is left for this group of slots."""
        while not self.scheduler.is_done(group):
            self.admit(group)
            yield from self.round(group, self._choose_num_positions(group))
            if watch is not None:
                watch(self.scheduler.num_finished, self.num_scanned)

    def _choose_num_positions(self, group: SlotGroup) -> int:
        """Positions of the group's next round: no more than the longest response may still get."""
        if not self.policy.needs_teacher:
            return 1
        longest = self.spec.max_response_tokens
        remaining = [longest - len(s.response_ids) for s in group.sequences] or [longest]
        max_positions = self.engine.config.max_positions
        if self.engine.config.draft_tokens != "auto":
            return min(max_positions, max(remaining))
        assert self.engine.draft_costs is not None, "draft_tokens=auto needs measured costs"
        acceptance = estimate_acceptance(
            self.policy.least_acceptance, self.num_accepted, self.num_scanned
        )
        num_active = max(1, self.scheduler.num_active)
        return choose_num_positions(
            self.engine.draft_costs, acceptance, num_active, remaining, max_positions
        )

    # ------------------------------------------------------------------ prefill

    def admit(self, group: SlotGroup) -> None:
        """Fill free slots, and the caches of what enters up to the last token of each sequence."""
        admission = self.scheduler.admit(group, self.num_positions)
        self._prefill(admission.first)
        self._copy(admission)
        self._prefill(admission.others)

    def _copy(self, admission: Admission) -> None:
        if admission.copies:
            sources, targets = zip(*admission.copies, strict=True)
            for model in self._models():
                model.cache.copy_pages(sources, targets)

    def _prefill(self, sequences: Sequence[SequenceState]) -> None:
        for chunk in _chunks(sequences, self.engine.config.max_prefill_tokens):
            counts = [count for _, count in chunk]
            batch = self.table.ragged_batch(
                slots=[sequence.slot for sequence, _ in chunk],
                past_lengths=[sequence.num_cached for sequence, _ in chunk],
                new_lengths=counts,
                pad_to_multiple=self.token_multiple,
            )
            tokens_N = torch.tensor(
                [
                    token_id
                    for sequence, count in chunk
                    for token_id in sequence.token_ids[sequence.num_cached :][:count]
                ],
                device=self.device,
            )
            for model in self._models():
                model.forward(batch, tokens_N)
            for sequence, count in chunk:
                sequence.num_cached += count
            self._num_prefilled_tokens += sum(counts)

    def _models(self) -> list[CachedModel]:
        return [model for model in (self.student, self.teacher) if model is not None]

    @property
    def token_multiple(self) -> int:
        """The number of tokens of a pass must be a multiple of this."""
        return common_token_multiple(cached.model for cached in self._models())

    # ------------------------------------------------------------------ rounds

    def round(self, group: SlotGroup, num_positions: int) -> Iterator[None]:
        """Draft, score, draw and commit; see the module docstring."""
        self.num_positions = num_positions
        self.scheduler.make_room(group, num_positions)
        if not group.sequences:
            yield  # nothing waits, or the other groups hold all pages
            return
        view = RoundView(group.sequences, num_positions, self.table, self.token_multiple)
        drafts, drafted_SG = yield from self.draft(view)
        teacher_NU, teacher_NH = self.score(view, drafted_SG)
        record, drawn_2SG = None, None
        problems: dict[int, str] = {}
        if drafts is not None:
            token_ids_N, record, problems = self._draw(*drafts, teacher_NU, view.key_SG.flatten())
            drawn_2SG = torch.stack([token_ids_N, record.accepted.long()]).view(2, *view.shape)
        announced = Announcement(drawn_2SG, (2, *view.shape), self.layout)
        yield
        counts = self._commit(group, announced.wait(), drafted_SG)
        if record is not None:
            self.recorder.keep(group.sequences, counts, record, teacher_NH)
        self._note_problems(group.sequences, counts, problems, num_positions)
        self.scheduler.retire(group)

    def draft(
        self, view: RoundView
    ) -> Generator[None, None, tuple[tuple[Tensor, Sample] | None, Tensor]]:
        """The student's logits [S * G, U] and proposals at all positions, on the last stage, and
        the tokens that were drafted, [S, G - 1]."""
        num_sequences, num_positions = view.shape
        parts: list[tuple[Tensor, ...]] = []
        tokens: list[Tensor] = [view.last_S]
        for position in range(num_positions):
            part = self._run_student(view, position, tokens[-1])
            if part is not None:
                parts.append(part)
            if position < num_positions - 1:
                proposed_S = None if part is None else part[1]
                announced = Announcement(proposed_S, (num_sequences,), self.layout)
                yield
                tokens.append(announced.wait())
        drafted_SG = torch.stack(tokens, dim=1)[:, 1:]
        if not parts:
            return None, drafted_SG
        student_NU, *proposal = (
            torch.stack(columns, dim=1).flatten(0, 1) for columns in zip(*parts, strict=True)
        )
        return (student_NU, Sample(*proposal)), drafted_SG

    def _run_student(
        self, view: RoundView, position: int, tokens_S: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Logits [S, U] behind one token of each sequence, then the fields of the proposal there;
        on the last stage."""
        key_S = view.key_SG[:, position]
        if self.graphs is not None:
            return self.graphs(view.past_S + position, tokens_S, key_S, view.block_table_SP)
        hidden_SH = self.student.forward(view.batch(position, 1), tokens_S)
        if hidden_SH is None:
            return None
        logits_SU = self.student.project(hidden_SH)
        return logits_SU, *self.policy.propose(logits_SU, key_S)

    def score(self, view: RoundView, drafted_SG: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's logits [S * G, U] and hidden states at all positions, on the last stage."""
        if self.teacher is None:
            return None, None
        self._num_teacher_calls += 1
        tokens_SG = torch.cat([view.last_S[:, None], drafted_SG], dim=1)
        hidden_NH = self.teacher.forward(view.batch(0, view.shape[1]), tokens_SG.flatten())
        if hidden_NH is None:
            return None, None
        return self.teacher.project(hidden_NH), hidden_NH

    def _draw(
        self, student_NU: Tensor, proposal: Sample, teacher_NU: Tensor | None, key_N: Tensor
    ) -> tuple[Tensor, TokenRecord, dict[int, str]]:
        """The policy's draw, and the problem of each row whose logits cannot be used.

        Such a row draws from equal logits instead: the rollouts of all ranks go on together, and
        the caller decides what becomes of them.
        """
        problems: dict[int, str] = {}
        while True:
            try:
                token_ids_N, record = self.policy.draw(proposal, student_NU, teacher_NU, key_N)
            except RowError as error:
                if problems.keys() & error.rows:
                    raise  # equal logits don't help
                rows = list(error.rows)
                problems |= dict.fromkeys(rows, error.problem)
                for logits_NU in (student_NU, teacher_NU):
                    if logits_NU is not None:
                        logits_NU[rows] = 0.0
                proposal = self.policy.propose(student_NU, key_N)
            else:
                return token_ids_N, record, problems

    def _note_problems(
        self,
        sequences: Sequence[SequenceState],
        counts: list[int],
        problems: dict[int, str],
        num_positions: int,
    ) -> None:
        """Remember the first problem of each sequence among its committed tokens."""
        for row, problem in sorted(problems.items()):
            sequence, count = sequences[row // num_positions], counts[row // num_positions]
            position = row % num_positions
            if position < count and sequence.problem is None:
                number = len(sequence.response_ids) - count + position
                sequence.problem = f"{problem} at token {number}"

    def _commit(self, group: SlotGroup, drawn_2SG: Tensor, drafted_SG: Tensor) -> list[int]:
        """Append what was drawn to the sequences; how many tokens each of them got."""
        both_3SG = torch.cat([drawn_2SG, F.pad(drafted_SG, (0, 1), value=-1)[None]])
        counts = []
        for sequence, drawn_ids, accepted, drafted_ids in zip(
            group.sequences, *both_3SG.tolist(), strict=True
        ):
            count = sequence.commit(
                drawn_ids,
                drafted_ids,
                self.spec.stop_ids,
                self.spec.max_response_tokens,
            )
            sequence.num_teacher_calls += self.teacher is not None
            self.num_scanned += count
            self.num_accepted += sum(accepted[:count])
            counts.append(count)
        return counts


class RoundView:
    """The sequences of a round as models and policies need them, on the device."""

    def __init__(
        self,
        sequences: Sequence[SequenceState],
        num_positions: int,
        table: PageTable,
        token_multiple: int,
    ) -> None:
        self.shape = (len(sequences), num_positions)
        rows = [(s.num_cached, s.last_id, s.key, len(s.response_ids)) for s in sequences]
        columns_4S = torch.tensor(rows).T.contiguous()
        self.past_S, self.last_S = columns_4S[:2].to(table.device, non_blocking=True).unbind()
        key_S1, first_S1 = columns_4S[2:, :, None].unbind()
        key_SG = position_keys(key_S1, first_S1 + torch.arange(num_positions))
        self.key_SG = key_SG.to(table.device, non_blocking=True)
        self._token_multiple = token_multiple
        self._page_tokens = table.page_tokens
        longest = max(row[0] for row in rows) + num_positions
        self.block_table_SP = table.block_table([s.slot for s in sequences], longest)

    def batch(self, first: int, count: int) -> RaggedBatch:
        """`count` new tokens of each sequence from the `first` of this round."""
        return RaggedBatch.uniform(
            self.past_S + first,
            count,
            self.block_table_SP,
            self._page_tokens,
            self._token_multiple,
        )


def _chunks(
    sequences: Sequence[SequenceState], max_tokens: int
) -> Iterator[list[tuple[SequenceState, int]]]:
    """Cut the tokens that sequences still lack in the cache into chunks of `max_tokens`.

    The last token of a sequence is left to its next round. Each chunk lists sequences and how many
    tokens of each are next.
    """
    chunk: list[tuple[SequenceState, int]] = []
    room = max_tokens
    for sequence in sequences:
        missing = len(sequence) - 1 - sequence.num_cached
        while missing > 0:
            count = min(missing, room)
            chunk.append((sequence, count))
            missing, room = missing - count, room - count
            if room == 0:
                yield chunk
                chunk, room = [], max_tokens
    if chunk:
        yield chunk
