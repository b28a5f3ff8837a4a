"""Sampling responses: continuous batching over a paged cache, speculative and exact.

A `RolloutEngine` belongs to one model replica (the ranks of one TP x PP group). Sequences enter and
leave slots as the `scheduler` says. What enters is computed up to its last token (prefill); then
those in the slots go through rounds together:

1. draft: the student proposes up to G - 1 tokens, one forward pass each, and runs once more;
2. score: the teacher, if the policy needs it, sees the same new tokens in one forward pass;
3. draw: the policy draws the token of all G positions at once;
4. commit: from left to right, up to the first token that is not the student's proposal.

Which token is drawn at a position does not depend on how many were drafted, since each position has
its own random numbers: G changes the speed, never the tokens. With G = 1 a round is one token.

With several pipeline stages the slots form as many groups, whose rounds take turns: while a later
stage works on one group, an earlier stage works on another. Between the first draft and the draw of
a round nothing is read back from the device.

Shapes: S sequences of a round, G positions of a round, N packed tokens (or rows), U this rank's
vocabulary shard. A round holds the student's logits at S * G positions, S * G * U elements of the
model's type on each rank of the last stage, and as many of the teacher's.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trb_megatron.batch import Rollout, TokenRecord
from trb_megatron.config import (
    AUTO_CACHE_SHARE,
    AUTO_PAGE_TOKENS,
    ConfigError,
    RolloutConfig,
)
from trb_megatron.decode_graphs import DecodeGraphs
from trb_megatron.distributed import ParallelLayout
from trb_megatron.drafting import (
    MAX_POSITIONS,
    DraftCosts,
    choose_num_positions,
    estimate_acceptance,
)
from trb_megatron.forward import CachedModel, copy_to_host
from trb_megatron.kv_cache import PagedKVCache, PageTable, RaggedBatch
from trb_megatron.models import (
    HiddenStateGPTModel,
    common_token_multiple,
    flash_attention_version,
)
from trb_megatron.pipeline import Announcement, take_turns
from trb_megatron.policies import Policy, Sampling
from trb_megatron.scheduler import Admission, Request, Scheduler, SequenceState, SlotGroup
from trb_megatron.uniforms import drawing_uniforms, rollout_key
from trb_megatron.vocab_parallel import RowError

_FREE_MEMORY_SHARE = 0.8
"""Of a GPU's free memory, the share that caches take where the configuration does not say."""


class RolloutEngine:
    """Generates responses with one model replica; every rank of it makes the same calls.

    Args:
        student, teacher: this rank's parts, in evaluation mode; the teacher may be None when no
            policy needs it.
        config: slots, pages and memory of the cache, tokens of one prefill pass, and draft length.
        hidden_to_host: whether kept hidden states of the teacher leave the GPU at once.
        other_bytes: memory of a GPU that a cache without a configured size leaves to the rest of
            the rollouts.
    """

    def __init__(
        self,
        student: HiddenStateGPTModel,
        teacher: HiddenStateGPTModel | None,
        layout: ParallelLayout,
        config: RolloutConfig,
        hidden_to_host: bool = False,
        other_bytes: int = 0,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.layout = layout
        self.config = config
        self.hidden_to_host = hidden_to_host
        self.other_bytes = other_bytes
        self.page_tokens = _page_tokens(config, self._flash_attention)
        self.draft_costs: DraftCosts | None = None
        """What `draft_tokens: auto` decides by; measured by `measure_draft_costs`."""
        self.num_teacher_calls = 0
        """Teacher forward passes since the engine was made."""
        self.num_prefilled_tokens = 0
        """Tokens that were run without a token being sampled behind them, likewise."""
        self.num_preemptions = 0
        """Sequences that had to give their pages back, likewise."""

    @property
    def _flash_attention(self) -> int | None:
        return flash_attention_version(self.layout.device, self.student.config.params_dtype)

    @property
    def uses_cuda_graphs(self) -> bool:
        """Not with masked attention, which would read as many pages as the longest sequence has."""
        can_record = self._flash_attention is not None and self.layout.pp_size == 1
        return self.config.cuda_graphs and can_record

    def generate(
        self, requests: Sequence[Request], policy: Policy, sampling: Sampling
    ) -> list[Rollout]:
        """Answer every request, in the order given.

        Collective over the model replica. The result depends on the requests' indices and the
        sampling key, not on drafts, slots, memory, order or layout (except where rounding puts a
        random number on a boundary). Per-token records and kept hidden states are on the last
        pipeline stage only.

        Raises:
            ConfigError: the cache cannot hold the longest prompt and its response.
        """
        if not requests:
            return []
        run = _Run(self, requests, policy, sampling)
        with self._inference():
            take_turns([run.serve(group) for group in run.scheduler.groups])
        self.num_preemptions += run.scheduler.num_preemptions
        return run.collect()

    def check_cache(self, num_tokens: int, *, with_teacher: bool, what: str) -> None:
        """Refuse a cache of configured size that cannot hold one sequence of `num_tokens` tokens.

        Collective over the model replica.

        Raises:
            ConfigError: says how large it must be; `what` names where the length comes from.
        """
        self._num_pages(num_tokens, 1, with_teacher, what)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The student in evaluation mode, and operations that autograd does not follow.

        Inference mode takes a seventh off the time of a small model under `torch.no_grad`. What
        leaves it for the loss must be copied outside of it (`_Run.collect`). Training writes to
        Megatron's buffers of sequence parallelism and to Transformer Engine's state, which tensors
        made in inference mode refuse: there is none where a rollout might be the first to need
        them.
        """
        keeps_state = self.student.config.sequence_parallel or self.layout.device.type == "cuda"
        inference_mode = torch.inference_mode(not keeps_state)
        with self.student.in_inference(), inference_mode, torch.no_grad():
            yield

    def measure_draft_costs(self, policy: Policy, sampling: Sampling) -> DraftCosts:
        """Time rounds of few and many sequences, with and without drafts, on made-up prompts.

        Collective over all ranks of the job; rank 0's clock counts everywhere.
        """
        endless = replace(sampling, stop_ids=(), max_response_tokens=4 * MAX_POSITIONS)
        seconds = {}
        with self._inference():
            for num_sequences in sorted({1, self.config.max_sequences}):
                requests = [Request(i, 0, (0, 0)) for i in range(num_sequences)]
                for num_positions in (1, 9):
                    run = _Run(self, requests, policy, endless)
                    for group in run.scheduler.groups:
                        run.admit(group)
                    times = [_time_rounds(run, num_positions) for _ in range(3)]
                    seconds[run.scheduler.num_active, num_positions] = min(times)
        shared = [DraftCosts.fit(seconds)]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _page_table(self, requests: Sequence[Request], policy: Policy, limit: int) -> PageTable:
        """Pages for these requests with responses of at most `limit` tokens."""
        num_slots = min(self.config.max_sequences, len(requests))
        max_tokens = max(len(request.prompt_ids) for request in requests) + limit
        num_pages = self._num_pages(
            max_tokens, num_slots, policy.needs_teacher, "the longest prompt and its response"
        )
        return PageTable(
            num_slots,
            num_pages,
            max_tokens + MAX_POSITIONS,
            self.page_tokens,
            self.layout.device,
        )

    def _num_pages(self, num_tokens: int, num_slots: int, with_teacher: bool, what: str) -> int:
        """Pages of the pool, the same on all ranks of the replica: what is needed, or what fits."""
        per_sequence = -(-(num_tokens + MAX_POSITIONS) // self.page_tokens)
        models = [self.student]
        if with_teacher and self.teacher is not None:
            models.append(self.teacher)
        page_bytes = self.page_tokens * sum(
            PagedKVCache.bytes_per_token(model.config, len(model.decoder.layers))
            for model in models
        )
        fitting = num_slots * per_sequence
        if self.config.cache_gb is not None:
            fitting = min(fitting, int(self.config.cache_gb * 1e9 / page_bytes) - 1)
        elif self.layout.device.type == "cuda":
            # The first passes make the copies, when the cache is there already.
            copies = sum(model.fp8_copy_bytes for model in models)
            free = _free_gpu_memory(self.layout.device) - copies
            free_bytes = min(AUTO_CACHE_SHARE * free, free - self.other_bytes)
            fitting = min(fitting, int(free_bytes / page_bytes) - 1)
        worst = torch.tensor([fitting, -page_bytes], device=self.layout.device)
        for group in (self.layout.tp_group, self.layout.pp_group):
            dist.all_reduce(worst, op=dist.ReduceOp.MIN, group=group)
        num_pages, needed_gb = int(worst[0]), -int(worst[1]) * (per_sequence + 1) / 1e9
        if num_pages < per_sequence:
            raise ConfigError(
                f"rollout.cache_gb: the key/value cache holds {max(0, num_pages)} pages of "
                f"{self.page_tokens} tokens on each rank, but one sequence needs "
                f"{per_sequence} ({num_tokens} tokens, {what}, and {MAX_POSITIONS} for drafts); "
                f"give it at least {needed_gb:.3g} GB, or shorten the sequences"
            )
        return num_pages


def _page_tokens(config: RolloutConfig, flash_attention: int | None) -> int:
    if config.page_tokens == "auto":
        return 256 if flash_attention == 2 else AUTO_PAGE_TOKENS
    if flash_attention == 2 and config.page_tokens % 256 != 0:
        raise ConfigError(
            f"rollout.page_tokens={config.page_tokens}: flash-attention 2 reads pages of 256 "
            "tokens or a multiple; set it so, or to auto"
        )
    return config.page_tokens


def _free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate, what its allocator keeps unused included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _time_rounds(run: _Run, num_positions: int) -> float:
    """Seconds in which all groups go through a round."""
    started = time.perf_counter()
    take_turns([run.round(group, num_positions) for group in run.scheduler.groups])
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class _Run:
    """One call of `RolloutEngine.generate`: its caches, sequences and records."""

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
        self.layout = engine.layout
        self.device = engine.layout.device
        self.table = engine._page_table(requests, policy, sampling.max_response_tokens)
        indices_N2 = torch.tensor([(r.prompt_index, r.rollout_index) for r in requests])
        keys_N = rollout_key(sampling.seed, sampling.step, *indices_N2.unbind(dim=1))
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
                self.student, max_pages, engine.page_tokens, self._token_multiple
            )
        self.records: list[TokenRecord] = []
        """Of each round, at all its positions."""
        self.num_recorded = 0
        """Positions in `records`."""
        self.kept_rows: list[int] = []
        """Which of them were committed, and, by number, to which sequence."""
        self.kept_numbers: list[int] = []
        self.teacher_hidden: list[Tensor] = []
        """Of each round, at the committed positions, where they are kept."""
        self.num_accepted = self.num_scanned = 0
        self.num_positions = MAX_POSITIONS
        """Of the latest round."""

    def serve(self, group: SlotGroup) -> Iterator[None]:
        """Admit and run rounds until nothing is left for this group of slots."""
        while not self.scheduler.is_done(group):
            self.admit(group)
            yield from self.round(group, self._choose_num_positions(group))

    def _choose_num_positions(self, group: SlotGroup) -> int:
        """Positions of the group's next round: no more than the longest response may still get."""
        if not self.policy.needs_teacher:
            return 1
        shortest = min((len(s.response_ids) for s in group.sequences), default=0)
        remaining = self.sampling.max_response_tokens - shortest
        if self.engine.config.draft_tokens != "auto":
            return min(self.engine.config.draft_tokens + 1, remaining)
        assert self.engine.draft_costs is not None, "draft_tokens=auto needs measured costs"
        acceptance = estimate_acceptance(
            self.policy.least_acceptance, self.num_accepted, self.num_scanned
        )
        num_active = max(1, self.scheduler.num_active)
        chosen = choose_num_positions(self.engine.draft_costs, acceptance, num_active)
        return min(chosen, remaining)

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
                pad_to_multiple=self._token_multiple,
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
            self.engine.num_prefilled_tokens += sum(counts)

    def _models(self) -> list[CachedModel]:
        return [model for model in (self.student, self.teacher) if model is not None]

    @property
    def _token_multiple(self) -> int:
        return common_token_multiple(cached.model for cached in self._models())

    # ------------------------------------------------------------------ rounds

    def round(self, group: SlotGroup, num_positions: int) -> Iterator[None]:
        """Draft, score, draw and commit; see the module docstring."""
        self.num_positions = num_positions
        self.scheduler.make_room(group, num_positions)
        if not group.sequences:
            yield  # nothing waits, or the other groups hold all pages
            return
        view = _RoundView(group.sequences, num_positions, self)
        student_SGU, drafted_SG = yield from self._draft(view)
        teacher_NU, teacher_NH = self._score(view, drafted_SG)
        record, drawn_2SG = None, None
        problems: dict[int, str] = {}
        if student_SGU is not None:
            token_ids_N, record, problems = self._draw(
                student_SGU.flatten(0, 1), teacher_NU, view.uniforms(0, num_positions)
            )
            drawn_2SG = torch.stack([token_ids_N, record.accepted.long()]).view(2, *view.shape)
        announced = Announcement(drawn_2SG, (2, *view.shape), self.layout)
        yield
        counts = self._commit(group, announced.wait(), drafted_SG)
        if record is not None:
            self._keep(group.sequences, counts, record, teacher_NH)
        self._note_problems(group.sequences, counts, problems, num_positions)
        self.scheduler.retire(group)

    def _draft(self, view: _RoundView) -> Generator[None, None, tuple[Tensor | None, Tensor]]:
        """The student's logits [S, G, U] (last stage) and its proposals [S, G - 1]."""
        num_sequences, num_positions = view.shape
        logits: list[Tensor] = []
        tokens: list[Tensor] = [view.last_S]
        for position in range(num_positions):
            logits_SU = self._run_student(view, position, tokens[-1])
            if logits_SU is not None:
                logits.append(logits_SU)
            if position == num_positions - 1:
                break
            proposed_S = None
            if logits_SU is not None:
                proposed_S = self.policy.propose(logits[-1], view.uniforms(position, 1))
            announced = Announcement(proposed_S, (num_sequences,), self.layout)
            yield
            tokens.append(announced.wait())
        return (
            torch.stack(logits, dim=1) if logits else None,
            torch.stack(tokens, dim=1)[:, 1:],
        )

    def _run_student(self, view: _RoundView, position: int, tokens_S: Tensor) -> Tensor | None:
        """Logits [S, U] behind one token of each sequence, on the last stage."""
        if self.graphs is not None:
            return self.graphs(view.past_S + position, tokens_S, view.block_table_SP)
        hidden_SH = self.student.forward(view.batch(position, 1), tokens_S)
        return None if hidden_SH is None else self.student.project(hidden_SH)

    def _score(self, view: _RoundView, drafted_SG: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's logits [S * G, U] and hidden states at all positions, on the last stage."""
        if self.teacher is None:
            return None, None
        self.engine.num_teacher_calls += 1
        tokens_SG = torch.cat([view.last_S[:, None], drafted_SG], dim=1)
        hidden_NH = self.teacher.forward(view.batch(0, view.shape[1]), tokens_SG.flatten())
        if hidden_NH is None:
            return None, None
        return self.teacher.project(hidden_NH), hidden_NH

    def _draw(
        self, student_NU: Tensor, teacher_NU: Tensor | None, uniforms_3N: Tensor
    ) -> tuple[Tensor, TokenRecord, dict[int, str]]:
        """The policy's draw, and the problem of each row whose logits cannot be used.

        Such a row draws from equal logits instead: the rollouts of all ranks go on together, and
        the caller decides what becomes of them.
        """
        problems: dict[int, str] = {}
        while True:
            try:
                token_ids_N, record = self.policy.draw(student_NU, teacher_NU, uniforms_3N)
            except RowError as error:
                if problems.keys() & error.rows:
                    raise  # equal logits don't help
                rows = list(error.rows)
                problems |= dict.fromkeys(rows, error.problem)
                for logits_NU in (student_NU, teacher_NU):
                    if logits_NU is not None:
                        logits_NU[rows] = 0.0
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
                self.sampling.stop_ids,
                self.sampling.max_response_tokens,
            )
            sequence.num_teacher_calls += self.teacher is not None
            self.num_scanned += count
            self.num_accepted += sum(accepted[:count])
            counts.append(count)
        return counts

    # ------------------------------------------------------------------ records

    def _keep(
        self,
        sequences: Sequence[SequenceState],
        counts: list[int],
        record: TokenRecord,
        teacher_NH: Tensor | None,
    ) -> None:
        """Remember the records (and hidden states) of the committed positions."""
        num_positions = len(record.accepted) // len(sequences)
        rows = [row * num_positions + i for row, count in enumerate(counts) for i in range(count)]
        self.kept_rows += [self.num_recorded + row for row in rows]
        self.kept_numbers += [sequences[row // num_positions].number for row in rows]
        self.records.append(record)
        self.num_recorded += len(record.accepted)
        if teacher_NH is not None and self.engine.config.keep_teacher_hidden:
            hidden_NH = teacher_NH[torch.tensor(rows, device=self.device)]
            self.teacher_hidden.append(
                copy_to_host(hidden_NH) if self.engine.hidden_to_host else hidden_NH
            )

    def collect(self) -> list[Rollout]:
        """The finished rollouts, with their records sorted out of the rounds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # hidden states may be on their way to the host
        sequences = self.scheduler.sequences
        return [
            Rollout(
                prompt_index=sequence.request.prompt_index,
                rollout_index=sequence.request.rollout_index,
                prompt_ids=sequence.request.prompt_ids,
                response_ids=tuple(sequence.response_ids),
                stopped=sequence.stopped,
                teacher_calls=sequence.num_teacher_calls,
                teacher_hidden=of_sequence.pop("teacher_hidden", None),
                record=TokenRecord(**of_sequence) if of_sequence else None,
                problem=sequence.problem,
            )
            for sequence, of_sequence in zip(sequences, self._columns_by_sequence(), strict=True)
        ]

    def _columns_by_sequence(self) -> list[dict[str, Tensor]]:
        """Copies of the fields of `TokenRecord`, and the hidden states where they are kept."""
        by_sequence: list[dict[str, Tensor]] = [{} for _ in self.scheduler.sequences]
        if not self.records:
            return by_sequence
        order_N = torch.argsort(torch.tensor(self.kept_numbers), stable=True)
        row_N = torch.tensor(self.kept_rows)[order_N].to(self.device)
        columns = {
            c.name: torch.cat([getattr(record, c.name) for record in self.records])[row_N]
            for c in fields(TokenRecord)
        }
        if self.teacher_hidden:
            hidden_NH = torch.cat(self.teacher_hidden)
            self.teacher_hidden.clear()  # they are large: let them go before the copy in order
            columns["teacher_hidden"] = hidden_NH[order_N.to(hidden_NH.device)]
        lengths = [len(sequence.response_ids) for sequence in self.scheduler.sequences]
        for name, values_N in columns.items():
            for of_sequence, values in zip(by_sequence, values_N.split(lengths), strict=True):
                of_sequence[name] = values
        return by_sequence


class _RoundView:
    """What the models and policies need of the sequences of a round, on the device."""

    def __init__(self, sequences: Sequence[SequenceState], num_positions: int, run: _Run) -> None:
        self.shape = (len(sequences), num_positions)
        rows = [(s.num_cached, s.last_id, s.key, len(s.response_ids)) for s in sequences]
        columns_4S = torch.tensor(rows).T.contiguous()
        self.past_S, self.last_S = columns_4S[:2].to(run.device, non_blocking=True).unbind()
        key_S1, first_S1 = columns_4S[2:, :, None].unbind()
        uniforms_3SG = drawing_uniforms(key_S1, first_S1 + torch.arange(num_positions))
        self._uniforms_3SG = uniforms_3SG.to(run.device, non_blocking=True)
        self._token_multiple = run._token_multiple
        self._page_tokens = run.table.page_tokens
        longest = max(row[0] for row in rows) + num_positions
        self.block_table_SP = run.table.block_table([s.slot for s in sequences], longest)

    def batch(self, first: int, count: int) -> RaggedBatch:
        """`count` new tokens of each sequence from the `first` of this round."""
        return RaggedBatch.uniform(
            self.past_S + first,
            count,
            self.block_table_SP,
            self._page_tokens,
            self._token_multiple,
        )

    def uniforms(self, first: int, count: int) -> Tensor:
        """Of `count` positions of each sequence from the `first` of this round, [3, S * count]."""
        return self._uniforms_3SG[..., first : first + count].flatten(1)


def _chunks(
    sequences: Sequence[SequenceState], max_tokens: int
) -> Iterator[list[tuple[SequenceState, int]]]:
    """What the cache lacks of sequences (all but their last tokens), in chunks of `max_tokens`.

    Each chunk lists sequences and how many tokens of each are next.
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
