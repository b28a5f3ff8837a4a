"""What a run puts where: layers, vocabulary rows, parameters and bytes of each rank.

Computed from the configuration and both models' `config.json`, without Megatron, weights or ranks.
All ranks of a pipeline stage hold equally much of a model, so everything is said once per stage.

Exact are the counts of parameters, and the bytes of weights, gradient buffers and caches. Those of
the optimizer are at most so many: what Megatron pads a buffer with is not spread evenly. The rest
is estimated, for responses of the greatest length:

- activations: what autograd keeps of a token in a layer (`_layer_activations`), counted as in
  Korthikanti et al., arXiv 2205.05198, section 4, for these layers: RMSNorm, grouped queries,
  flash-attention, a gated MLP, no dropout. Stage s of P holds those of P - s microbatches (1F1B).
  With recomputation it keeps the input of each layer, and all of one layer (section 5 there).
- rollouts: the activations of a prefill, or the logits of a round of drafts, and the teacher's
  hidden states, which exist twice while they are sorted by response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import NamedTuple

from trb_megatron.config import (
    AUTO_CACHE_SHARE,
    AUTO_PAGE_TOKENS,
    Config,
    ConfigError,
    check_world_size,
)
from trb_megatron.drafting import MAX_POSITIONS
from trb_megatron.hf_config import HFModelConfig, layers_of_stages
from trb_megatron.pair_config import PairConfig
from trb_megatron.param_mapping import MappedParam, has_parameter, map_params, stored_params

GB = 10**9

RESERVED_BYTES = 2 * GB
"""Of a GPU, for what no plan counts: CUDA itself, NCCL's buffers, gaps between allocations."""


class ParameterBytes(NamedTuple):
    """What a parameter takes: as a weight, and as the optimizer's own copy where it has one."""

    weight: int
    master: int


PARAMETER_BYTES = {
    "fp32": ParameterBytes(4, 0),
    "bf16": ParameterBytes(2, 4),
    "fp8": ParameterBytes(2, 4),
}
"""By `training.precision`. Activations and caches have the weights' type."""

GRADIENT_BYTES = 4
ADAM_BYTES = 8
"""Both moments, fp32."""

FP8_COPY_BYTES = {"student": 2, "teacher": 1}
"""Of each parameter of the layers, for products with it and, in training, with its transpose."""


@dataclass(frozen=True)
class StageShare:
    """What each rank of a pipeline stage holds of a model.

    Attributes:
        layers: counted from 0 over the model.
        num_parameters, num_layer_parameters: of one rank, and those of them in layers.
        buffer_size: elements of Megatron's buffer for them where the optimizer is distributed: each
            parameter begins at a multiple of 64, and the end can be cut over the replicas.
    """

    layers: range
    num_parameters: int
    num_layer_parameters: int
    buffer_size: int


@dataclass(frozen=True)
class ModelPlan:
    """A model cut into pipeline stages and over tensor-parallel ranks.

    `num_parameters` are those of the checkpoint: vocabulary not padded, tied embeddings once.
    """

    config: HFModelConfig
    num_parameters: int
    stages: tuple[StageShare, ...]


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
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.fp8_copies

    @property
    def training(self) -> int:
        """The most while the student trains."""
        return self.held + self.activations + self.loss + self.hidden

    def cache(self, cache_gb: float | None, memory: int | None) -> int:
        """Bytes of the cache, as the engine chooses them on a GPU with so much `memory`, or None.

        Without a configured size all slots at their greatest length, or what fits.
        """
        if cache_gb is not None:
            return min(self.cache_all, int(cache_gb * GB))
        if memory is None:
            return self.cache_all
        free = memory - RESERVED_BYTES - self.held
        return max(0, min(self.cache_all, int(AUTO_CACHE_SHARE * free), free - self.rollouts))

    def num_sequences(self, cache: int) -> int:
        """Sequences of the greatest length that a cache of so many bytes holds at a time."""
        return max(0, cache - self.cache_page) // (self.cache_one - self.cache_page)


@dataclass(frozen=True)
class StepPlan:
    """The most that a step computes with; a replica's share where it says so.

    Attributes:
        num_responses: of all replicas.
        max_length: tokens of a prompt and its response; None where the dataset's decide.
        num_microbatches: of a replica; None likewise.
        microbatch_tokens: of the longest microbatch.
    """

    num_responses: int
    max_length: int | None
    num_microbatches: int | None
    microbatch_tokens: int


@dataclass(frozen=True)
class Plan:
    """Where a run puts what, on `world_size` ranks.

    Ranks count tensor-parallel ranks first, then replicas, then pipeline stages (Megatron's order).
    `memory` has an entry for each stage.
    """

    tp_size: int
    pp_size: int
    dp_size: int
    vocab_size: int
    models: dict[str, ModelPlan]
    step: StepPlan
    memory: tuple[RankMemory, ...]

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and output weight on each tensor-parallel rank."""
        return self.vocab_size // self.tp_size


def make_plan(config: Config, pair: PairConfig, world_size: int) -> Plan:
    """Lay a run out on `world_size` ranks.

    Raises:
        ConfigError: ranks that don't make whole replicas, replicas without work, a top-k beyond the
            vocabulary, a configured cache that cannot hold one sequence.
    """
    parallel = config.parallel
    check_world_size(parallel, world_size)
    _check_top_k(config, pair)
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp_size = world_size // (tp_size * pp_size)
    step = _plan_step(config, dp_size)
    models = {
        name: _plan_model(model, pair.vocab_size, tp_size, pp_size, dp_size)
        for name, model in pair.models.items()
    }
    sizes = _Sizes(config, models, step, tp_size, pp_size, dp_size, pair.vocab_size // tp_size)
    plan = Plan(
        tp_size=tp_size,
        pp_size=pp_size,
        dp_size=dp_size,
        vocab_size=pair.vocab_size,
        models=models,
        step=step,
        memory=tuple(sizes.stage_memory(stage) for stage in range(pp_size)),
    )
    _check_cache(config, plan)
    return plan


def _check_top_k(config: Config, pair: PairConfig) -> None:
    num_ids = pair.tokenizer_size - len(pair.alignment.removed_ids)
    top_k = {"loss.top_k": config.loss.top_k}
    if config.behavior.policy == "skd":
        top_k["behavior.skd_top_k"] = config.behavior.skd_top_k
    for key, value in top_k.items():
        if value > num_ids:
            raise ConfigError(
                f"{key}={value} exceeds the vocabulary of {num_ids} ids, stop ids merged; lower it"
            )


def _check_cache(config: Config, plan: Plan) -> None:
    """Refuse a configured cache that holds less than one sequence."""
    needed = max(memory.cache_one for memory in plan.memory)
    if config.rollout.cache_gb is not None and config.rollout.cache_gb * GB < needed:
        raise ConfigError(
            f"rollout.cache_gb={config.rollout.cache_gb:g}: one sequence of "
            f"{plan.step.max_length} tokens needs {needed / GB:.3g} GB on each rank; give the "
            "key/value cache at least that, or shorten the sequences"
        )


def _plan_step(config: Config, dp_size: int) -> StepPlan:
    num_responses = config.training.prompts_per_step
    is_distilling = config.training.task == "distill"
    if is_distilling:
        num_responses *= config.rollout.rollouts_per_prompt
    if num_responses < dp_size:
        raise ConfigError(
            f"training.prompts_per_step: a step of {num_responses} responses leaves some of "
            f"the {dp_size} data-parallel replicas without work; raise it"
        )
    budget = config.training.max_tokens_per_microbatch
    if not is_distilling:
        return StepPlan(num_responses, None, None, budget)
    max_length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    share = -(-num_responses // dp_size)
    return StepPlan(
        num_responses=num_responses,
        max_length=max_length,
        num_microbatches=-(-share // max(1, budget // max_length)),
        microbatch_tokens=min(max(budget, max_length), share * max_length),
    )


# ---------------------------------------------------------------- parameters


def _plan_model(
    model: HFModelConfig, vocab_size: int, tp_size: int, pp_size: int, dp_size: int
) -> ModelPlan:
    shape = model.shape(vocab_size)
    params = map_params(model.family, shape)
    if model.tied_embeddings and pp_size == 1:
        del params["output_layer.weight"]
    stages = layers_of_stages(model.num_layers, pp_size)
    stage_of_layer = {layer: number for number, layers in enumerate(stages) for layer in layers}
    sizes: list[dict[str, int]] = [{} for _ in stages]
    for name, param in params.items():
        if param.stack_index:
            stage = stage_of_layer[param.stack_index[0]]
        else:
            stage = 0 if name.startswith("embedding.") else -1
        sizes[stage][name] = _size_on_rank(param, tp_size)
    stored = stored_params(model.family, shape).values()
    return ModelPlan(
        config=model,
        num_parameters=sum(prod(shape) for param in stored for shape in param.hf_shapes),
        stages=tuple(
            StageShare(
                layers=layers,
                num_parameters=sum(of_stage.values()),
                num_layer_parameters=sum(
                    size for name, size in of_stage.items() if name.startswith("decoder.layers.")
                ),
                buffer_size=sum(_buckets(of_stage, model.tied_embeddings, pp_size, dp_size)),
            )
            for layers, of_stage in zip(stages, sizes, strict=True)
        ),
    )


def _size_on_rank(param: MappedParam, tp_size: int) -> int:
    size = prod(param.full_shape)
    return size if param.kind.cut_axis is None else size // tp_size


def _buckets(sizes: dict[str, int], is_tied: bool, pp_size: int, dp_size: int) -> Iterator[int]:
    """Sizes of the buckets that Megatron's distributed optimizer puts parameters into.

    The two copies of a tied embedding have buckets of their own, so that both stages cut it alike
    (`_ParamAndGradBuffer` in megatron-core 0.16, `optimizer/param_layout.py` in 0.19).
    """
    shared = {"embedding.word_embeddings.weight", "output_layer.weight"}
    is_shared = {name: is_tied and pp_size > 1 and name in shared for name in sizes}
    for bucket in (False, True):
        members = [size for name, size in sizes.items() if is_shared[name] == bucket]
        yield _pad(sum(_pad(size, 64) for size in members), lcm(dp_size, 128))


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class _Sizes:
    """Everything that the bytes of a rank are computed from."""

    config: Config
    models: dict[str, ModelPlan]
    step: StepPlan
    tp_size: int
    pp_size: int
    dp_size: int
    vocab_rows: int

    @property
    def bytes(self) -> ParameterBytes:
        return PARAMETER_BYTES[self.config.training.precision]

    @property
    def asks_teacher(self) -> bool:
        """Whether some rollouts need the teacher."""
        behavior = self.config.behavior
        return "teacher" in self.models and (behavior.policy != "trb" or behavior.kl_budget > 0)

    @property
    def share(self) -> int:
        """Responses of a replica in a step."""
        return -(-self.step.num_responses // self.dp_size)

    def stage_memory(self, stage: int) -> RankMemory:
        student = self.models["student"].stages[stage]
        is_distributed = self.config.optimizer.distributed
        size = student.buffer_size if is_distributed else student.num_parameters
        state = self.bytes.master + ADAM_BYTES
        num_states = student.num_parameters
        if is_distributed:
            num_states = min(num_states, size // self.dp_size)
        teacher = self.models.get("teacher")
        hidden = self._hidden(stage)
        on_device = self.config.training.teacher_hidden_device == "device"
        is_kept = self.asks_teacher and self.config.rollout.keep_teacher_hidden
        page, one, everything = self._cache(stage)
        return RankMemory(
            weights=size * self.bytes.weight,
            gradients=size * GRADIENT_BYTES,
            optimizer=num_states * state,
            teacher=teacher.stages[stage].num_parameters * self.bytes.weight if teacher else 0,
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
            FP8_COPY_BYTES[name] * model.stages[stage].num_layer_parameters
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
        return int(elements) * self.bytes.weight

    def _hidden_size(self, model: HFModelConfig) -> float:
        """Elements of a token's hidden state where sequence parallelism cuts it."""
        parallel = self.config.parallel.sequence_parallel or model.num_experts > 0
        return model.hidden_size / self.tp_size if parallel else model.hidden_size

    def _layer_activations(self, model: HFModelConfig) -> float:
        """Elements that a token's forward pass leaves behind in a layer for the backward.

        Inputs and outputs of both norms; queries and keys as the attention takes them, and before
        their norm where they have one, values, the attention's output; of the gated MLP both
        projections, the activation and the product. With k experts for a token those of each of
        them, and the token itself, once in and twice out.
        """
        norms = 4 * self._hidden_size(model)
        heads, groups = model.num_attention_heads, model.num_query_groups
        has_norms = has_parameter(model.family, "q_layernorm.weight")
        attention = (2 * heads + 2 * groups + has_norms * (heads + groups)) * model.head_dim
        mlp = 4 * model.ffn_hidden_size
        routed = 0
        if model.num_experts > 0:
            mlp = 4 * model.experts_per_token * model.expert_ffn_hidden_size
            routed = 3 * model.experts_per_token * model.hidden_size
        return norms + routed + (attention + mlp) / self.tp_size

    def _loss(self, stage: int) -> int:
        """The workspace, and a microbatch's hidden states: gathered, picked out, their gradient."""
        if not self._is_last(stage):
            return 0
        hidden_size = self.models["student"].config.hidden_size
        num_tokens = self.step.microbatch_tokens
        # Of both models an fp32 buffer and half as much again, and one in half precision.
        most = 14 * num_tokens * self.vocab_rows
        workspace = min(self.config.loss.workspace_mb * 10**6, most)
        return workspace + 3 * num_tokens * hidden_size * self.bytes.weight

    def _hidden(self, stage: int) -> int:
        """The teacher's hidden states at all response tokens of a replica's step."""
        if "teacher" not in self.models or not self._is_last(stage):
            return 0
        num_tokens = self.share * self.config.rollout.max_response_tokens
        return num_tokens * self.models["teacher"].config.hidden_size * self.bytes.weight

    def _cache(self, stage: int) -> tuple[int, int, int]:
        """Bytes of a page, of one sequence and of all slots, a page for padding included."""
        if self.step.max_length is None:
            return 0, 0, 0
        rollout = self.config.rollout
        page_tokens = AUTO_PAGE_TOKENS if rollout.page_tokens == "auto" else rollout.page_tokens
        page = page_tokens * sum(
            self._token_cache(self.models[name], stage)
            for name in (("student", "teacher") if self.asks_teacher else ("student",))
        )
        per_sequence = -(-(self.step.max_length + MAX_POSITIONS) // page_tokens)
        num_slots = min(rollout.max_sequences, self.share)
        return page, (per_sequence + 1) * page, (num_slots * per_sequence + 1) * page

    def _token_cache(self, model: ModelPlan, stage: int) -> int:
        groups = model.config.num_query_groups // self.tp_size
        layers = len(model.stages[stage].layers)
        return 2 * layers * groups * model.config.head_dim * self.bytes.weight

    def _rollouts(self, stage: int) -> int:
        """The larger of a prefill's activations and, on the last stage, a round's logits."""
        if self.step.max_length is None:
            return 0
        rollout = self.config.rollout
        names = ("student", "teacher") if self.asks_teacher else ("student",)
        of_layer = max(self._layer_activations(self.models[name].config) for name in names)
        num_prefilled = min(rollout.max_prefill_tokens, self.share * self.step.max_length)
        num_elements = int(num_prefilled * of_layer)
        if self._is_last(stage):
            num_sequences = -(-min(rollout.max_sequences, self.share) // self.pp_size)
            num_positions = 1
            if self.asks_teacher:
                drafts = rollout.draft_tokens
                num_positions = MAX_POSITIONS if drafts == "auto" else drafts + 1
            # The student's are made position by position and then stacked.
            num_copies = 2 + self.asks_teacher
            logits = num_copies * num_sequences * num_positions * self.vocab_rows
            num_elements = max(num_elements, logits)
        return num_elements * self.bytes.weight


# ---------------------------------------------------------------- does it fit?


def check_memory(plan: Plan, config: Config, memory: int) -> None:
    """Refuse a run that does not fit into `memory` bytes on each rank.

    Raises:
        ConfigError: one line with the stage that lacks most, what it needs, and what to change.
    """
    _check_training(plan, config, memory)
    _check_rollouts(plan, config, memory)


def _check_training(plan: Plan, config: Config, memory: int) -> None:
    room = memory - RESERVED_BYTES
    stage = max(range(plan.pp_size), key=lambda stage: plan.memory[stage].training)
    need = plan.memory[stage]
    if need.training <= room:
        return
    advice = []
    if need.held < room:
        if not config.training.recompute_activations:
            advice.append("set training.recompute_activations=true")
        if plan.step.microbatch_tokens > (plan.step.max_length or 0):
            advice.append("lower training.max_tokens_per_microbatch")
        if need.hidden > 0:
            advice.append("set training.teacher_hidden_device=host")
    advice.append(_advice_on_weights(plan, config))
    raise ConfigError(
        f"{_available(room, memory)}, but training needs {need.training / GB:.1f} GB on stage "
        f"{stage}, of which {need.held / GB:.1f} GB are weights, gradients and optimizer; "
        + ", or ".join(advice)
    )


def _check_rollouts(plan: Plan, config: Config, memory: int) -> None:
    room = memory - RESERVED_BYTES
    left = [room - need.held - need.rollouts for need in plan.memory]
    for stage, need in enumerate(plan.memory):
        if left[stage] < need.cache_one:
            raise ConfigError(
                f"{_available(room, memory)}, but rollouts need "
                f"{(need.held + need.rollouts + need.cache_one) / GB:.1f} GB on stage {stage}, "
                f"with a key/value cache for one sequence; {_advice_on_rollouts(plan, config)}"
            )
        cache = need.cache(config.rollout.cache_gb, memory)
        if cache > left[stage]:
            raise ConfigError(
                f"{_available(room, memory)}, but beside {need.held / GB:.1f} GB of weights and "
                f"optimizer and {need.rollouts / GB:.1f} GB for the rest of the rollouts there is "
                f"no room for a key/value cache of {cache / GB:.1f} GB on stage {stage}; set "
                f"rollout.cache_gb={left[stage] * 10 // GB / 10} or less"
            )


def _advice_on_rollouts(plan: Plan, config: Config) -> str:
    shorter = "lower rollout.max_response_tokens or rollout.max_sequences"
    advice = [shorter, _advice_on_weights(plan, config)]
    if any(need.hidden > 0 for need in plan.memory):
        advice.insert(0, "set training.teacher_hidden_device=host")
    return ", or ".join(advice)


def _available(room: int, memory: int) -> str:
    return f"{room / GB:.1f} of {memory / GB:.1f} GB can be used on each rank"


def _advice_on_weights(plan: Plan, config: Config) -> str:
    larger = "parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size"
    if plan.dp_size > 1 and not config.optimizer.distributed:
        return f"set optimizer.distributed=true, or raise {larger}"
    return f"raise {larger}"
