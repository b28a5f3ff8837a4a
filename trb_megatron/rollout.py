"""Sampling responses: continuous batching over a paged cache, student and teacher in step.

A `RolloutEngine` belongs to one model replica (the ranks of one TP x PP group). Each of its steps
runs
a group of sequences: either the prompts that were just admitted (prefill), or one token of every
sequence in flight (decode). Finished sequences leave their slot and waiting prompts enter. Which
token is drawn is a *policy*'s decision; the engine does not know how a policy chooses.

Shapes: S sequences of a step, N packed tokens, U this rank's vocabulary shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.batch import Rollout, TokenRecord
from trb_megatron.blending import (
    StopAlignment,
    align_stop_ids,
    draw_tokens,
    solve_behavior,
)
from trb_megatron.config import RolloutConfig
from trb_megatron.distributed import ParallelLayout
from trb_megatron.forward import forward_cached
from trb_megatron.kv_cache import PagedKVCache, PageTable, RaggedBatch
from trb_megatron.models import HiddenStateGPTModel, token_multiple
from trb_megatron.uniforms import Purpose, counter_uniforms
from trb_megatron.vocab_parallel import (
    argmax,
    gather_at,
    log_softmax_NU,
    mask_invalid,
    sample_inverse_cdf,
)


@dataclass(frozen=True)
class Request:
    """A prompt to answer; the indices key the random numbers (DESIGN 2.5)."""

    prompt_index: int
    rollout_index: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn and when they end.

    Attributes:
        temperature: divides the logits of both models; 0 takes the student's most likely token.
        max_response_tokens: a response that reaches it is cut.
        stop_ids: a response ends with the first of these; the token is part of it.
        seed, step: key the random numbers together with a request and a position.
        num_valid: ids from here on (padding of the vocabulary) do not exist.
    """

    temperature: float
    max_response_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    step: int
    num_valid: int


class Uniforms:
    """The random numbers of one position of each of S sequences."""

    def __init__(
        self, sampling: Sampling, prompt_S: Tensor, rollout_S: Tensor, position_S: Tensor
    ) -> None:
        self._key = (sampling.seed, sampling.step, prompt_S, rollout_S, position_S)

    def __getitem__(self, purpose: Purpose) -> Tensor:
        """Uniforms in [0, 1) of shape [S], float64, for one purpose."""
        return counter_uniforms(*self._key, purpose)


class Policy(Protocol):
    """Draws one token per sequence from logits [S, U]; identical on all tensor-parallel ranks."""

    needs_teacher: bool

    def draw(
        self, student_logits_SU: Tensor, teacher_logits_SU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """Return token ids [S] and what is recorded of them; collective over the TP group."""
        ...


@dataclass(frozen=True)
class StudentPolicy:
    """The student's own distribution; with `alignment` over aligned stop events (DESIGN 2.2)."""

    sampling: Sampling
    tp_group: dist.ProcessGroup | None = None
    alignment: StopAlignment | None = None
    needs_teacher = False

    def draw(
        self, student_logits_SU: Tensor, teacher_logits_SU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """Inverse-CDF sampling by the draft uniform, or argmax at temperature 0."""
        is_greedy = self.sampling.temperature == 0
        logits_SU = mask_invalid(student_logits_SU, self.sampling.num_valid, self.tp_group)
        logits_SU = logits_SU / (1.0 if is_greedy else self.sampling.temperature)
        if self.alignment is not None:
            logits_SU = align_stop_ids(
                logits_SU, self.alignment.student_ids, self.alignment, tp_group=self.tp_group
            )
        logprobs_SU = log_softmax_NU(logits_SU, tp_group=self.tp_group)
        if is_greedy:
            token_ids = argmax(logprobs_SU, tp_group=self.tp_group)
        else:
            token_ids = sample_inverse_cdf(
                logprobs_SU.exp(), uniforms[Purpose.DRAFT], tp_group=self.tp_group
            )
        logprobs_S = gather_at(logprobs_SU, token_ids, tp_group=self.tp_group)
        zeros = torch.zeros_like(logprobs_S)
        record = TokenRecord(
            student_logprobs=logprobs_S,
            teacher_logprobs=torch.full_like(logprobs_S, torch.nan),
            behavior_logprobs=logprobs_S,
            blend_coef=zeros,
            kl_student=zeros,
        )
        return token_ids, record


@dataclass(frozen=True)
class BlendPolicy:
    """The trust-region behavior policy: nearest the teacher within `kl_budget` of the student.

    Plyusov et al., arXiv 2605.31159; drawn by the rule of DESIGN 2.4.
    """

    sampling: Sampling
    kl_budget: float
    alignment: StopAlignment
    tp_group: dist.ProcessGroup | None = None
    needs_teacher = True

    def draw(
        self, student_logits_SU: Tensor, teacher_logits_SU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """Solve for the blend of each row, then draw from it with the position's three uniforms."""
        assert teacher_logits_SU is not None
        student_SU = self._aligned(student_logits_SU, self.alignment.student_ids)
        teacher_SU = self._aligned(teacher_logits_SU, self.alignment.teacher_ids)
        behavior = solve_behavior(student_SU, teacher_SU, self.kl_budget, tp_group=self.tp_group)
        logprobs_3SU = torch.stack(
            [behavior.student.logprobs(), behavior.teacher.logprobs(), behavior.logprobs()]
        )
        drawn = draw_tokens(
            logprobs_3SU[0],
            logprobs_3SU[2],
            uniforms[Purpose.DRAFT],
            uniforms[Purpose.ACCEPT],
            uniforms[Purpose.RESIDUAL],
            tp_group=self.tp_group,
        )
        student_S, teacher_S, behavior_S = gather_at(
            logprobs_3SU.flatten(0, 1), drawn.token_ids.repeat(3), tp_group=self.tp_group
        ).chunk(3)
        record = TokenRecord(
            student_S, teacher_S, behavior_S, behavior.blend_coef, behavior.kl_student
        )
        return drawn.token_ids, record

    def _aligned(self, logits_SU: Tensor, own_ids: tuple[int, ...]) -> Tensor:
        masked_SU = mask_invalid(logits_SU, self.sampling.num_valid, self.tp_group)
        scaled_SU = masked_SU / self.sampling.temperature
        return align_stop_ids(scaled_SU, own_ids, self.alignment, tp_group=self.tp_group)


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

    @property
    def new_ids(self) -> tuple[int, ...] | list[int]:
        """Tokens that the models have not seen: the prompt first, then the last sampled token."""
        return self.response_ids[-1:] if self.response_ids else self.request.prompt_ids


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
        self.num_teacher_calls = 0
        """Teacher forward passes since the engine was made."""

    def generate(
        self, requests: Sequence[Request], policy: Policy, sampling: Sampling
    ) -> list[Rollout]:
        """Answer every request, in the order given.

        Collective over the model replica. The result depends on the requests' indices and the
        sampling key, not on slots, order or layout (up to rounding, see DESIGN 2.5). Per-token
        records are present on the last pipeline stage.
        """
        if not requests:
            return []
        was_training = self.student.training
        self.student.eval()
        run = _Run(self, requests, policy, sampling)
        while run.waiting or run.active:
            run.step(run.admit() or run.active)  # prefill first: it fills the slots
        self.student.train(was_training)
        return run.collect()


class _Run:
    """One call of `RolloutEngine.generate`: its cache, and the sequences waiting and in flight."""

    def __init__(
        self,
        engine: RolloutEngine,
        requests: Sequence[Request],
        policy: Policy,
        sampling: Sampling,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.sampling = sampling
        self.sequences = [_Sequence(request, number) for number, request in enumerate(requests)]
        self.waiting = deque(self.sequences)
        self.active: list[_Sequence] = []
        self.records: list[tuple[list[int], TokenRecord]] = []

        num_slots = min(engine.config.max_sequences, len(requests))
        longest_prompt = max(len(request.prompt_ids) for request in requests)
        max_tokens = longest_prompt + sampling.max_response_tokens
        self.device = engine.layout.device
        self.token_multiple = token_multiple(engine.student.config)
        self.free_slots = list(range(num_slots))
        self.page_table = PageTable(num_slots, max_tokens, engine.config.page_tokens, self.device)
        models = [engine.student]
        if policy.needs_teacher:
            assert engine.teacher is not None, "this policy needs a teacher"
            models.append(engine.teacher)
        self.models = [
            (
                model,
                PagedKVCache(model.config, len(model.decoder.layers), self.page_table, max_tokens),
            )
            for model in models
        ]

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

    def step(self, group: list[_Sequence]) -> None:
        """Run the new tokens of a group through the models and draw one token for each sequence."""
        new_ids = [sequence.new_ids for sequence in group]
        batch = self.page_table.extend(
            slots=[sequence.slot for sequence in group],
            past_lengths=[sequence.cached for sequence in group],
            new_lengths=[len(ids) for ids in new_ids],
            pad_to_multiple=self.token_multiple,
        )
        tokens_N = torch.tensor([token for ids in new_ids for token in ids], device=self.device)
        logits_SU = [self._forward_last(m, cache, batch, tokens_N) for m, cache in self.models]
        for sequence, token_id in zip(group, self._draw(group, logits_SU), strict=True):
            sequence.cached += len(sequence.new_ids)
            sequence.response_ids.append(token_id)
            sequence.stopped = token_id in self.sampling.stop_ids
            is_full = len(sequence.response_ids) == self.sampling.max_response_tokens
            sequence.finished = sequence.stopped or is_full
            if sequence.finished:
                self.page_table.release(sequence.slot)
                self.free_slots.append(sequence.slot)
        self.active = [sequence for sequence in self.active if not sequence.finished]

    def _forward_last(
        self, model: HiddenStateGPTModel, cache: PagedKVCache, batch: RaggedBatch, tokens_N: Tensor
    ) -> Tensor | None:
        """Logits [S, U] behind the last new token of each sequence; None before the last stage."""
        if model is self.engine.teacher:
            self.engine.num_teacher_calls += 1
        hidden_NH = forward_cached(model, cache, batch, tokens_N, self.engine.layout)
        if hidden_NH is None:
            return None
        with torch.no_grad():
            return model.project(hidden_NH[batch.query_lengths_S.cumsum(0) - 1])

    def _draw(self, group: list[_Sequence], logits_SU: list[Tensor | None]) -> list[int]:
        """The last stage draws and records; a broadcast (PP group) tells the others the tokens."""
        layout = self.engine.layout
        if layout.is_last_stage:
            key_3S = torch.tensor(
                [
                    [sequence.request.prompt_index for sequence in group],
                    [sequence.request.rollout_index for sequence in group],
                    [len(sequence.response_ids) for sequence in group],
                ],
                device=self.device,
            )
            student_SU, *teacher_SU = logits_SU
            assert student_SU is not None
            uniforms = Uniforms(self.sampling, *key_3S)
            token_ids_S, record = self.policy.draw(
                student_SU, teacher_SU[0] if teacher_SU else None, uniforms
            )
            self.records.append(([sequence.number for sequence in group], record))
        else:
            token_ids_S = torch.empty(len(group), dtype=torch.long, device=self.device)
        if layout.pp_size > 1:
            dist.broadcast(token_ids_S, src=layout.last_stage_rank, group=layout.pp_group)
        return token_ids_S.tolist()

    def collect(self) -> list[Rollout]:
        """The finished rollouts, with their records sorted out of the steps."""
        records = self._records_by_sequence()
        return [
            Rollout(
                prompt_index=sequence.request.prompt_index,
                rollout_index=sequence.request.rollout_index,
                prompt_ids=sequence.request.prompt_ids,
                response_ids=tuple(sequence.response_ids),
                stopped=sequence.stopped,
                record=records[sequence.number] if records else None,
            )
            for sequence in self.sequences
        ]

    def _records_by_sequence(self) -> list[TokenRecord]:
        if not self.records:
            return []
        number_N = torch.tensor([number for numbers, _ in self.records for number in numbers])
        order_N = torch.argsort(number_N, stable=True).to(self.device)
        lengths = [len(sequence.response_ids) for sequence in self.sequences]
        columns = [
            torch.cat([getattr(record, column.name) for _, record in self.records])[order_N]
            .cpu()
            .split(lengths)
            for column in fields(TokenRecord)
        ]
        return [TokenRecord(*values) for values in zip(*columns, strict=True)]
