"""Sampling responses: continuous batching over a paged cache, speculative and exact.

A `RolloutEngine` belongs to one model replica (the ranks of one TP x PP group) and works in rounds.
A round takes a group of sequences, either those just admitted (prefill) or all in flight (decode):

1. draft: the student proposes up to G - 1 tokens, one forward pass each, and runs once more;
2. score: the teacher, if the policy needs it, sees the same new tokens in one ragged forward pass;
3. draw: the policy draws the token of all G positions at once;
4. commit: from left to right, up to the first token that is not the student's proposal.

Which token is drawn at a position does not depend on how many were drafted, since each position has
its own random numbers: G changes the speed, never the tokens. With G = 1 a round is one token.
Finished sequences leave their slot and waiting prompts enter.

Shapes: S sequences of a round, G positions of a round, N packed tokens (or rows), U this rank's
vocabulary shard. A round holds the student's logits at S * G positions, S * G * U elements of the
model's type on each rank, and as many of the teacher's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.batch import Rollout, TokenRecord
from trb_megatron.config import RolloutConfig
from trb_megatron.distributed import ParallelLayout
from trb_megatron.drafting import (
    MAX_POSITIONS,
    DraftCosts,
    choose_num_positions,
    estimate_acceptance,
)
from trb_megatron.forward import forward_cached
from trb_megatron.kv_cache import PagedKVCache, PageTable, RaggedBatch
from trb_megatron.models import HiddenStateGPTModel, token_multiple
from trb_megatron.policies import Policy, Sampling, Uniforms


@dataclass(frozen=True)
class Request:
    """A prompt to answer; the indices key the random numbers (see `uniforms`)."""

    prompt_index: int
    rollout_index: int
    prompt_ids: tuple[int, ...]


@dataclass
class _Sequence:
    """A request in flight: its slot, what the cache holds of it, and its response so far."""

    request: Request
    number: int
    slot: int = -1
    cached: int = 0
    response_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    finished: bool = False
    teacher_calls: int = 0

    @property
    def new_ids(self) -> list[int]:
        """Tokens that the models have not seen: the prompt first, then the last sampled token."""
        return self.response_ids[-1:] if self.response_ids else list(self.request.prompt_ids)

    def commit(self, drawn_ids: list[int], drafted_ids: list[int], sampling: Sampling) -> int:
        """Append drawn tokens up to the first that was not drafted or that ends the response.

        What the cache holds beyond is forgotten: the next round writes over it. Returns how many
        tokens were appended.
        """
        num_before = len(self.response_ids)
        self.cached += len(self.new_ids) - 1
        for drawn_id, drafted_id in zip_longest(drawn_ids, drafted_ids):
            self.response_ids.append(drawn_id)
            self.stopped = drawn_id in sampling.stop_ids
            is_full = len(self.response_ids) == sampling.max_response_tokens
            self.finished = self.stopped or is_full
            if self.finished or drawn_id != drafted_id:
                break
        num_committed = len(self.response_ids) - num_before
        self.cached += num_committed
        return num_committed


class RolloutEngine:
    """Generates responses with one model replica; every rank of it makes the same calls.

    Args:
        student, teacher: this rank's parts, in evaluation mode; the teacher may be None when no
            policy needs it.
        config: cache slots, page size, and prompt tokens of one prefill step (a longer prompt is
            run alone).
    """

    def __init__(
        self,
        student: HiddenStateGPTModel,
        teacher: HiddenStateGPTModel | None,
        layout: ParallelLayout,
        config: RolloutConfig,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.layout = layout
        self.config = config
        self.draft_costs: DraftCosts | None = None
        """What `draft_tokens: auto` decides by; measured by `measure_draft_costs`."""
        self.num_teacher_calls = 0
        """Teacher forward passes since the engine was made."""

    def generate(
        self, requests: Sequence[Request], policy: Policy, sampling: Sampling
    ) -> list[Rollout]:
        """Answer every request, in the order given.

        Collective over the model replica. The result depends on the requests' indices and the
        sampling key, not on drafts, slots, order or layout (except where
        rounding puts a random number on a boundary).
        Per-token records and kept hidden states are on the last pipeline stage only.
        """
        if not requests:
            return []
        run = _Run(self, requests, policy, sampling)
        with self._student_in_inference():
            while run.waiting or run.active:
                run.round(run.admit() or run.active)  # prefill first: it fills the slots
        return run.collect()

    @contextmanager
    def _student_in_inference(self) -> Iterator[None]:
        was_training = self.student.training
        self.student.eval()
        try:
            yield
        finally:
            self.student.train(was_training)

    def measure_draft_costs(self, policy: Policy, sampling: Sampling) -> DraftCosts:
        """Time rounds of few and many sequences, with and without drafts, on made-up prompts.

        Collective over all ranks of the job; rank 0's clock counts everywhere.
        """
        endless = replace(sampling, stop_ids=(), max_response_tokens=4 * MAX_POSITIONS)
        seconds = {}
        with self._student_in_inference():
            for num_sequences in sorted({1, self.config.max_sequences}):
                for num_positions in (1, 9):
                    requests = [Request(i, 0, (0, 0)) for i in range(num_sequences)]
                    run = _Run(self, requests, policy, endless, num_positions=num_positions)
                    run.round(run.admit())
                    rounds = [_time(self.layout.device, run.round, run.active) for _ in range(3)]
                    seconds[num_sequences, num_positions] = min(rounds)
        shared = [DraftCosts.fit(seconds)]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


def _time(device: torch.device, function: Callable[..., None], *args: Any) -> float:
    started = time.perf_counter()
    function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class _Run:
    """One call of `RolloutEngine.generate`: its cache, and the sequences waiting and in flight."""

    def __init__(
        self,
        engine: RolloutEngine,
        requests: Sequence[Request],
        policy: Policy,
        sampling: Sampling,
        num_positions: int | None = None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.sampling = sampling
        self.sequences = [_Sequence(request, number) for number, request in enumerate(requests)]
        self.waiting = deque(self.sequences)
        self.active: list[_Sequence] = []
        self.records: list[tuple[list[int], dict[str, Tensor]]] = []
        self.fixed_num_positions = num_positions or self._configured_num_positions()
        self.num_positions = self.fixed_num_positions or MAX_POSITIONS
        self.num_accepted = self.num_scanned = 0

        num_slots = min(engine.config.max_sequences, len(requests))
        longest_prompt = max(len(request.prompt_ids) for request in requests)
        max_tokens = longest_prompt + sampling.max_response_tokens + self.num_positions
        self.device = engine.layout.device
        self.token_multiple = token_multiple(engine.student.config)
        self.free_slots = list(range(num_slots))
        self.page_table = PageTable(num_slots, max_tokens, engine.config.page_tokens, self.device)
        self.student = (engine.student, self._cache(engine.student, max_tokens))
        self.teacher = None
        if policy.needs_teacher:
            assert engine.teacher is not None, "this policy needs a teacher"
            self.teacher = (engine.teacher, self._cache(engine.teacher, max_tokens))

    def _cache(self, model: HiddenStateGPTModel, max_tokens: int) -> PagedKVCache:
        return PagedKVCache(model.config, len(model.decoder.layers), self.page_table, max_tokens)

    def _configured_num_positions(self) -> int | None:
        """Positions of every round; None when each round chooses."""
        if not self.policy.needs_teacher:
            return 1
        drafts = self.engine.config.draft_tokens
        return None if drafts == "auto" else drafts + 1

    def _choose_num_positions(self, num_sequences: int) -> int:
        if self.fixed_num_positions is not None:
            return self.fixed_num_positions
        assert self.engine.draft_costs is not None, "draft_tokens=auto needs measured costs"
        acceptance = estimate_acceptance(
            self.policy.least_acceptance, self.num_accepted, self.num_scanned
        )
        return choose_num_positions(self.engine.draft_costs, acceptance, num_sequences)

    def admit(self) -> list[_Sequence]:
        """Give free slots to waiting sequences, as many as one prefill may hold."""
        admitted: list[_Sequence] = []
        num_tokens = 0
        while self.waiting and self.free_slots:
            num_tokens += len(self.waiting[0].request.prompt_ids)
            if admitted and num_tokens > self.engine.config.max_prefill_tokens:
                break
            sequence = self.waiting.popleft()
            sequence.slot = self.free_slots.pop()
            admitted.append(sequence)
        self.active.extend(admitted)
        return admitted

    def round(self, group: list[_Sequence]) -> None:
        """Draft, score, draw and commit; see the module docstring."""
        self.num_positions = self._choose_num_positions(len(group))
        student_SGU, drafted_ids = self._draft(group)
        teacher_NU, teacher_NH = self._score(group, drafted_ids)
        drawn_ids, accepted, record = self._draw(group, student_SGU, teacher_NU)
        counts = [
            sequence.commit(drawn, drafted, self.sampling)
            for sequence, drawn, drafted in zip(group, drawn_ids, drafted_ids, strict=True)
        ]
        self.num_scanned += sum(counts)
        self.num_accepted += sum(
            sum(flags[:count]) for flags, count in zip(accepted, counts, strict=True)
        )
        if record is not None:
            self._keep(group, counts, record, teacher_NH)
        for sequence in group:
            if sequence.finished:
                self.page_table.release(sequence.slot)
                self.free_slots.append(sequence.slot)
        self.active = [sequence for sequence in self.active if not sequence.finished]

    def _draft(self, group: list[_Sequence]) -> tuple[Tensor | None, list[list[int]]]:
        """The student's logits [S, G, U] at all positions (last stage), and its proposals."""
        model, cache = self.student
        logits: list[Tensor] = []
        new_ids = [sequence.new_ids for sequence in group]
        past = [sequence.cached for sequence in group]
        drafted_ids: list[list[int]] = [[] for _ in group]
        for position in range(self.num_positions):
            batch, hidden_NH = self._forward(model, cache, group, past, new_ids)
            if hidden_NH is not None:
                logits.append(_project(model, hidden_NH[batch.query_lengths_S.cumsum(0) - 1]))
            if position == self.num_positions - 1:
                break
            proposed_S = None
            if hidden_NH is not None:
                proposed_S = self.policy.propose(logits[-1], self._uniforms(group, position, 1))
            past = [p + len(ids) for p, ids in zip(past, new_ids, strict=True)]
            new_ids = [[token_id] for token_id in self._share(proposed_S, (len(group),))]
            for drafted, ids in zip(drafted_ids, new_ids, strict=True):
                drafted.extend(ids)
        return (torch.stack(logits, dim=1) if logits else None), drafted_ids

    def _score(
        self, group: list[_Sequence], drafted_ids: list[list[int]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's logits [S * G, U] and hidden states at all positions, on the last stage."""
        if self.teacher is None:
            return None, None
        model, cache = self.teacher
        past = [sequence.cached for sequence in group]
        new_ids = [s.new_ids + drafted for s, drafted in zip(group, drafted_ids, strict=True)]
        self.engine.num_teacher_calls += 1
        for sequence in group:
            sequence.teacher_calls += 1
        batch, hidden_NH = self._forward(model, cache, group, past, new_ids)
        if hidden_NH is None:
            return None, None
        back_G = torch.arange(-self.num_positions, 0, device=self.device)
        rows_N = (batch.query_lengths_S.cumsum(0)[:, None] + back_G).flatten()
        return _project(model, hidden_NH[rows_N]), hidden_NH[rows_N]

    def _forward(
        self,
        model: HiddenStateGPTModel,
        cache: PagedKVCache,
        group: list[_Sequence],
        past: list[int],
        new_ids: list[list[int]],
    ) -> tuple[RaggedBatch, Tensor | None]:
        """Run new tokens behind `past` cached ones; hidden states on the last stage."""
        batch = self.page_table.extend(
            slots=[sequence.slot for sequence in group],
            past_lengths=past,
            new_lengths=[len(ids) for ids in new_ids],
            pad_to_multiple=self.token_multiple,
        )
        tokens_N = torch.tensor([token for ids in new_ids for token in ids], device=self.device)
        return batch, forward_cached(model, cache, batch, tokens_N, self.engine.layout)

    def _draw(
        self, group: list[_Sequence], student_SGU: Tensor | None, teacher_NU: Tensor | None
    ) -> tuple[list[list[int]], list[list[int]], TokenRecord | None]:
        """Tokens of all positions and whether each was proposed, [S][G], on every stage.

        The record of the positions is on the last stage only.
        """
        drawn_2N, record = None, None
        if student_SGU is not None:
            uniforms = self._uniforms(group, 0, self.num_positions)
            token_ids_N, record = self.policy.draw(student_SGU.flatten(0, 1), teacher_NU, uniforms)
            drawn_2N = torch.stack([token_ids_N, record.accepted.long()])
        rows = len(group) * self.num_positions
        token_ids, accepted = self._share(drawn_2N, (2, rows))
        starts = range(0, rows, self.num_positions)
        return (
            [token_ids[start : start + self.num_positions] for start in starts],
            [accepted[start : start + self.num_positions] for start in starts],
            record,
        )

    def _uniforms(self, group: list[_Sequence], first: int, count: int) -> Uniforms:
        """Of `count` positions from the `first` after the committed tokens of each sequence."""
        key_S3 = torch.tensor(
            [
                (s.request.prompt_index, s.request.rollout_index, len(s.response_ids) + first)
                for s in group
            ],
            device=self.device,
        )
        prompt_N, rollout_N, position_N = key_S3.repeat_interleave(count, dim=0).unbind(dim=1)
        offset_N = torch.arange(count, device=self.device).repeat(len(group))
        return Uniforms(self.sampling, prompt_N, rollout_N, position_N + offset_N)

    def _share(self, values: Tensor | None, shape: tuple[int, ...]) -> list[Any]:
        """Integers of the last stage on every stage: a broadcast over the pipeline group."""
        layout = self.engine.layout
        if values is None:
            values = torch.empty(shape, dtype=torch.long, device=self.device)
        if layout.pp_size > 1:
            dist.broadcast(values, src=layout.last_stage_rank, group=layout.pp_group)
        return values.tolist()

    def _keep(
        self,
        group: list[_Sequence],
        counts: list[int],
        record: TokenRecord,
        teacher_NH: Tensor | None,
    ) -> None:
        """Remember the records (and hidden states) of the committed positions."""
        positions_G = torch.arange(self.num_positions, device=self.device)
        is_committed_SG = positions_G < torch.tensor(counts, device=self.device)[:, None]
        kept_N = is_committed_SG.flatten().nonzero()[:, 0]
        numbers = [s.number for s, n in zip(group, counts, strict=True) for _ in range(n)]
        kept = {c.name: getattr(record, c.name)[kept_N] for c in fields(TokenRecord)}
        if teacher_NH is not None and self.engine.config.keep_teacher_hidden:
            kept["teacher_hidden"] = teacher_NH[kept_N]
        self.records.append((numbers, kept))

    def collect(self) -> list[Rollout]:
        """The finished rollouts, with their records sorted out of the rounds."""
        columns = self._columns_by_sequence()
        return [
            Rollout(
                prompt_index=sequence.request.prompt_index,
                rollout_index=sequence.request.rollout_index,
                prompt_ids=sequence.request.prompt_ids,
                response_ids=tuple(sequence.response_ids),
                stopped=sequence.stopped,
                teacher_calls=sequence.teacher_calls,
                teacher_hidden=of_sequence.pop("teacher_hidden", None),
                record=TokenRecord(**of_sequence) if of_sequence else None,
            )
            for sequence, of_sequence in zip(self.sequences, columns, strict=True)
        ]

    def _columns_by_sequence(self) -> list[dict[str, Tensor]]:
        if not self.records:
            return [{} for _ in self.sequences]
        number_N = torch.tensor([number for numbers, _ in self.records for number in numbers])
        order_N = torch.argsort(number_N, stable=True).to(self.device)
        lengths = [len(sequence.response_ids) for sequence in self.sequences]
        columns: list[dict[str, Tensor]] = [{} for _ in self.sequences]
        for name in self.records[0][1]:
            values_N = torch.cat([kept[name] for _, kept in self.records])[order_N]
            for of_sequence, values in zip(columns, values_N.split(lengths), strict=True):
                of_sequence[name] = values
        return columns


@torch.no_grad()
def _project(model: HiddenStateGPTModel, hidden_NH: Tensor) -> Tensor:
    return model.project(hidden_NH)
