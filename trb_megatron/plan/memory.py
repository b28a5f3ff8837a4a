"""The memory plan: bytes on each rank of a stage for weights, optimizer, activations, caches.

Exact are those of weights, gradient buffers and caches. Those of the optimizer are at most so many:
what Megatron pads a buffer with is not spread evenly. The rest is estimated, for responses of the
greatest length:

- activations: what autograd keeps of a token in a layer (`_layer_activations`), counted as in
  Korthikanti et al., arXiv 2205.05198, section 4, for these layers: RMSNorm, grouped queries,
  flash-attention, a gated MLP, no dropout. Stage s of P holds those of P - s microbatches (1F1B).
  With recomputation it keeps the input of each layer, and all of one layer (section 5 there).
- rollouts: the activations of a prefill, or the logits of a round of drafts with the most
  sequences and positions and what the policy computes from them, and the teacher's hidden states,
  which exist twice while they are sorted by response. Timing rounds before the first step
  (`rollout.draft_tokens=auto`) takes no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trb_megatron.config.options import Config, RolloutConfig
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.families import has_parameter
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.walk import logit_bytes
from trb_megatron.models.fp8 import COPY_BYTES
from trb_megatron.models.kv_cache import groups_on_rank, kv_bytes_per_token
from trb_megatron.plan.layout import ModelPlan, StepPlan
from trb_megatron.rollout.cache_size import cache_limit, page_tokens, pages_of_sequence
from trb_megatron.update.state_size import GRADIENT_DTYPE, optimizer_bytes

GB = 10**9

RESERVED_BYTES = 2 * GB
"""Of a GPU, for what no plan counts: CUDA itself, NCCL's buffers, gaps between allocations."""


DRAW_COPIES = {"trb": 5, "skd": 10, "teacher": 7}
"""What each behavior policy computes from a round's logits to draw its tokens: at most so many
tensors of their shape in fp32 at a time."""
PROPOSE_COPIES = 2
"""Likewise of the student's draw at one position."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of a pipeline stage; the module docstring says which are exact.

    Attributes:
        weights, gradients, optimizer: of the student.
        teacher: its weights.
        fp8_copies: of both models' weights.
        activations: of the student's microbatches, or of the teacher's pass if that needs more.
        loss: its workspace, and the hidden states of a microbatch around it.
        hidden: the teacher's hidden states while the student trains on them.
        cache_page: of the key/value caches, for a page of both models.
        cache_one, cache_all: for one sequence, and for all slots, of the greatest length.
        rollouts: what rollouts need beside the cache.
        host: of the host's memory, where the teacher's hidden states wait there.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    fp8_copies: int
    activations: int
    loss: int
    hidden: int
    cache_page: int
    cache_one: int
    cache_all: int
    rollouts: int
    host: int

    @property
    def held(self) -> int:
        """Bytes that are taken all the time."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.fp8_copies

    @property
    def training(self) -> int:
        """The most while the student trains."""
        return self.held + self.activations + self.loss + self.hidden

    def cache(self, config: RolloutConfig, memory: int | None) -> int:
        """Bytes of the cache, as the engine chooses them on a GPU with so much `memory`, or None.

        Without a configured size all slots at their greatest length, or what fits.
        """
        free = None if memory is None else memory - RESERVED_BYTES - self.held
        limit = cache_limit(config, free, self.rollouts)
        return self.cache_all if limit is None else max(0, min(self.cache_all, int(limit)))

    def num_sequences(self, cache: int) -> int:
        """Sequences of the greatest length that a cache of so many bytes holds at a time."""
        return max(0, cache - self.cache_page) // (self.cache_one - self.cache_page)


@dataclass(frozen=True)
class MemoryModel:
    """Everything that the bytes of a rank are computed from."""

    config: Config
    models: dict[str, ModelPlan]
    step: StepPlan
    tp_size: int
    pp_size: int
    dp_size: int
    vocab_rows: int
    dtype: torch.dtype
    """Of weights, activations and caches."""

    @property
    def sampling_models(self) -> list[ModelPlan]:
        """Those that rollouts run, in some steps at least."""
        names = ("student", "teacher") if self.config.asks_teacher else ("student",)
        return [self.models[name] for name in names]

    @property
    def share(self) -> int:
        """Responses of a replica in a step."""
        return -(-self.step.num_responses // self.dp_size)

    def stage_memory(self, stage: int) -> RankMemory:
        student = self.models["student"].stages[stage]
        is_distributed = self.config.optimizer.distributed
        size = student.buffer_size if is_distributed else student.num_parameters
        num_states = student.num_parameters
        if is_distributed:
            num_states = min(num_states, size // self.dp_size)
        teacher = self.models.get("teacher")
        hidden = self._hidden(stage)
        on_device = self.config.training.teacher_hidden_device == "device"
        is_kept = self.config.asks_teacher and self.config.rollout.keep_teacher_hidden
        page, one, everything = self._cache(stage)
        return RankMemory(
            weights=size * self.dtype.itemsize,
            gradients=size * GRADIENT_DTYPE.itemsize,
            optimizer=num_states * optimizer_bytes(self.dtype),
            teacher=teacher.stages[stage].num_parameters * self.dtype.itemsize if teacher else 0,
            fp8_copies=self._fp8_copies(stage),
            activations=self._activations(stage),
            loss=self._loss(stage),
            hidden=hidden if on_device else 0,
            cache_page=page,
            cache_one=one,
            cache_all=everything,
            rollouts=self._rollouts(stage) + (2 * hidden if on_device and is_kept else 0),
            host=0 if on_device else 2 * hidden,
        )

    def _fp8_copies(self, stage: int) -> int:
        if self.config.training.precision != "fp8":
            return 0
        return sum(
            COPY_BYTES[name] * model.stages[stage].num_layer_parameters
            for name, model in self.models.items()
        )

    def _is_last(self, stage: int) -> bool:
        return stage == self.pp_size - 1

    def _activations(self, stage: int) -> int:
        num_tokens = self.step.microbatch_tokens
        student = self.models["student"]
        model, num_layers = student.config, len(student.stages[stage].layers)
        in_flight = self.pp_size - stage
        if self.step.num_microbatches is not None:
            in_flight = min(in_flight, self.step.num_microbatches)
        of_layer = self._layer_activations(model)
        kept = in_flight * num_layers * of_layer
        if self.config.training.recompute_activations:
            kept = in_flight * num_layers * self._hidden_size(model) + of_layer
        # Autograd makes a gradient of the whole embedding before it is added to the buffer.
        of_embedding = self.vocab_rows * model.hidden_size if stage == 0 else 0
        elements = num_tokens * kept + of_embedding
        if "teacher" in self.models:
            of_teacher = self._layer_activations(self.models["teacher"].config)
            elements = max(elements, num_tokens * of_teacher)
        return int(elements) * self.dtype.itemsize

    def _hidden_size(self, model: HFModelConfig) -> float:
        """Elements of a token's hidden state where sequence parallelism cuts it."""
        parallel = self.config.parallel.sequence_parallel or model.num_experts > 0
        return model.hidden_size / self.tp_size if parallel else model.hidden_size

    def _layer_activations(self, model: HFModelConfig) -> float:
        """Elements that a token's forward pass leaves behind in a layer for the backward.

        Inputs and outputs of both norms; those of the attention; of the gated MLP both projections,
        the activation and the product. With k experts for a token those of each of them, and the
        token itself, once in and twice out.
        """
        norms = 4 * self._hidden_size(model)
        mlp = 4 * model.ffn_hidden_size
        routed = 0
        if model.num_experts > 0:
            mlp = 4 * model.experts_per_token * model.expert_ffn_hidden_size
            routed = 3 * model.experts_per_token * model.hidden_size
        return norms + routed + self._attention_activations(model) + mlp / self.tp_size

    def _attention_activations(self, model: HFModelConfig) -> float:
        """Queries and keys as the attention takes them, its output, and what they come from.

        That is the values, and queries and keys before their norm where they have one. Where ranks
        share a query group these are views of the gathered projections of all heads.
        """
        heads = model.num_attention_heads / self.tp_size
        groups = groups_on_rank(model.num_query_groups, self.tp_size)
        if model.num_query_groups < self.tp_size:
            projected = float(model.num_qkv_rows)
        else:
            has_norms = has_parameter(model.family, "q_layernorm.weight")
            projected = (groups + has_norms * (heads + groups)) * model.head_dim
        return (2 * heads + groups) * model.head_dim + projected

    def _loss(self, stage: int) -> int:
        """The workspace, and a microbatch's hidden states: gathered, picked out, their gradient."""
        if not self._is_last(stage):
            return 0
        hidden_size = self.models["student"].config.hidden_size
        num_tokens = self.step.microbatch_tokens
        of_logit = logit_bytes(LOSSES[self.config.loss.name], self.dtype)
        most = int(of_logit * num_tokens * self.vocab_rows)
        workspace = min(self.config.loss.workspace_mb * 10**6, most)
        return workspace + 3 * num_tokens * hidden_size * self.dtype.itemsize

    def _hidden(self, stage: int) -> int:
        """The teacher's hidden states at all response tokens of a replica's step."""
        if "teacher" not in self.models or not self._is_last(stage):
            return 0
        num_tokens = self.share * self.config.rollout.max_response_tokens
        return num_tokens * self.models["teacher"].config.hidden_size * self.dtype.itemsize

    def _cache(self, stage: int) -> tuple[int, int, int]:
        """Bytes of a page, of one sequence and of all slots, a page for padding included."""
        if self.step.max_length is None:
            return 0, 0, 0
        rollout = self.config.rollout
        of_page = page_tokens(rollout, flash_attention=None)
        page = of_page * sum(self._token_cache(model, stage) for model in self.sampling_models)
        per_sequence = pages_of_sequence(self.step.max_length, rollout, of_page)
        num_slots = min(rollout.max_sequences, self.share)
        return page, (per_sequence + 1) * page, (num_slots * per_sequence + 1) * page

    def _token_cache(self, model: ModelPlan, stage: int) -> int:
        return kv_bytes_per_token(
            len(model.stages[stage].layers),
            groups_on_rank(model.config.num_query_groups, self.tp_size),
            model.config.head_dim,
            self.dtype.itemsize,
        )

    def _rollouts(self, stage: int) -> int:
        """The larger of a prefill's activations and, on the last stage, a round's logits."""
        if self.step.max_length is None:
            return 0
        rollout = self.config.rollout
        of_layer = max(self._layer_activations(model.config) for model in self.sampling_models)
        num_prefilled = min(rollout.max_prefill_tokens, self.share * self.step.max_length)
        num_bytes = int(num_prefilled * of_layer) * self.dtype.itemsize
        if self._is_last(stage):
            num_bytes = max(num_bytes, self._round())
        return num_bytes

    def _round(self) -> int:
        """The logits of a round of the most sequences and positions, and the draw from them."""
        rollout = self.config.rollout
        num_sequences = -(-min(rollout.max_sequences, self.share) // self.pp_size)
        num_logits = num_sequences * self.vocab_rows
        fp32 = torch.float32.itemsize
        of_logit = self.dtype.itemsize + PROPOSE_COPIES * fp32
        if self.config.asks_teacher:
            num_logits *= rollout.max_positions
            num_copies = DRAW_COPIES[self.config.behavior.policy]
            of_logit = len(self.sampling_models) * self.dtype.itemsize + num_copies * fp32
        return num_logits * of_logit
