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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from trb_megatron.batch import Rollout
from trb_megatron.behavior.policies import Policy
from trb_megatron.config.options import RolloutConfig
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.distributed.pipeline import take_turns
from trb_megatron.models.gpt import HiddenStateGPTModel
from trb_megatron.models.kv_cache import PageTable
from trb_megatron.models.layers import flash_attention_version
from trb_megatron.rollout.cache_size import CacheSize, page_tokens
from trb_megatron.rollout.drafting import DraftCosts
from trb_megatron.rollout.generation import Generation, GenerationCounts, Watch
from trb_megatron.rollout.sequences import Request, ResponseSpec
from trb_megatron.rollout.timing import time_rounds


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
        self.page_tokens = page_tokens(config, self._flash_attention)
        self._cache_size = CacheSize(config, layout, self.page_tokens, other_bytes)
        self.draft_costs: DraftCosts | None = None
        """Measured by `measure_draft_costs`; `draft_tokens: auto` decides by them."""
        self.counts = GenerationCounts()
        """Of the latest `generate`."""

    def _models(self, with_teacher: bool) -> list[HiddenStateGPTModel]:
        """The models that a cache serves."""
        if with_teacher and self.teacher is not None:
            return [self.student, self.teacher]
        return [self.student]

    @property
    def _flash_attention(self) -> int | None:
        return flash_attention_version(self.layout.device, self.student.config.params_dtype)

    @property
    def uses_cuda_graphs(self) -> bool:
        """Not with masked attention, which would read as many pages as the longest sequence has."""
        can_record = self._flash_attention is not None and self.layout.pp_size == 1
        return self.config.cuda_graphs and can_record

    def generate(
        self,
        requests: Sequence[Request],
        policy: Policy,
        spec: ResponseSpec,
        watch: Watch | None = None,
    ) -> list[Rollout]:
        """Answer every request, in the order given; `watch` is told after each round.

        Collective over the model replica. The result depends on the policy, the requests' indices
        and the key in `spec`, not on drafts, slots, memory, order or layout (except where rounding
        puts a random number on a boundary). Per-token records and kept hidden states are on the
        last pipeline stage only.

        Raises:
            ConfigError: the cache cannot hold the longest prompt and its response.
        """
        if not requests:
            self.counts = GenerationCounts()
            return []
        generation = Generation(self, requests, policy, spec)
        scheduler = generation.scheduler
        with self._inference():
            take_turns([generation.serve(group, watch) for group in scheduler.groups])
        self.counts = generation.counts
        return generation.recorder.collect(scheduler.sequences)

    def check_cache(self, num_tokens: int, *, with_teacher: bool, what: str) -> None:
        """Refuse a cache of configured size that cannot hold one sequence of `num_tokens` tokens.

        Collective over the model replica.

        Raises:
            ConfigError: says how large it must be; `what` names where the length comes from.
        """
        self._cache_size.num_pages(self._models(with_teacher), num_tokens, 1, what)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The student in evaluation mode, and operations that autograd does not follow.

        Inference mode takes a seventh off the time of a small model under `torch.no_grad`. What
        leaves it for the loss must be copied outside of it (`RolloutRecorder.collect`). Training
        writes to Megatron's buffers of sequence parallelism and to Transformer Engine's state,
        which tensors made in inference mode refuse: there is none where a rollout might be the
        first to need them.
        """
        keeps_state = self.student.config.sequence_parallel or self.layout.device.type == "cuda"
        inference_mode = torch.inference_mode(not keeps_state)
        with self.student.in_inference(), inference_mode, torch.no_grad():
            yield

    def measure_draft_costs(
        self, policy: Policy, spec: ResponseSpec, num_sequences: int
    ) -> DraftCosts:
        """Time rounds of 1 to `num_sequences` sequences, the most that a step has in slots.

        Collective over all ranks of the job; see `time_rounds`.
        """
        with self._inference():
            return time_rounds(self, policy, spec, num_sequences)

    def make_page_table(
        self, requests: Sequence[Request], max_response_tokens: int, *, with_teacher: bool
    ) -> PageTable:
        """Pages for these requests with responses of at most so many tokens."""
        num_slots = min(self.config.max_sequences, len(requests))
        max_tokens = max(len(request.prompt_ids) for request in requests) + max_response_tokens
        return PageTable(
            num_slots,
            self._cache_size.num_pages(
                self._models(with_teacher),
                max_tokens,
                num_slots,
                "the longest prompt and its response",
            ),
            max_tokens + self.config.max_positions,
            self.page_tokens,
            self.layout.device,
        )
