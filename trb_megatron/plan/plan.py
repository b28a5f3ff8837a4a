"""The plan of a run: what lies on which rank, how many bytes that takes, and whether it fits.

Computed from the configuration and both models' `config.json`, without Megatron, weights or ranks.
`layout` counts parameters, `memory` bytes; the latter says which figures are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from trb_megatron.config.conflicts import check_world_size
from trb_megatron.config.options import Config
from trb_megatron.config.values import ConfigError
from trb_megatron.models.sources import DTYPES, ModelSources
from trb_megatron.plan.layout import ModelPlan, StepPlan, plan_model, plan_step
from trb_megatron.plan.memory import GB, RESERVED_BYTES, MemoryModel, RankMemory


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
    def responses_per_replica(self) -> int:
        """Of a step, at most."""
        return -(-self.step.num_responses // self.dp_size)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and output weight on each tensor-parallel rank."""
        return self.vocab_size // self.tp_size


def make_plan(config: Config, sources: ModelSources, world_size: int) -> Plan:
    """Lay a run out on `world_size` ranks.

    Raises:
        ConfigError: ranks that don't make whole replicas, replicas without work, a top-k beyond the
            vocabulary, a configured cache that cannot hold one sequence.
    """
    parallel = config.parallel
    check_world_size(parallel, world_size)
    _check_top_k(config, sources)
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp_size = world_size // (tp_size * pp_size)
    step = plan_step(config, dp_size)
    models = {
        name: plan_model(model, sources.vocab_size, tp_size, pp_size, dp_size)
        for name, model in sources.models.items()
    }
    memory = MemoryModel(
        config=config,
        models=models,
        step=step,
        tp_size=tp_size,
        pp_size=pp_size,
        dp_size=dp_size,
        vocab_rows=sources.vocab_size // tp_size,
        dtype=DTYPES[config.training.precision],
    )
    plan = Plan(
        tp_size=tp_size,
        pp_size=pp_size,
        dp_size=dp_size,
        vocab_size=sources.vocab_size,
        models=models,
        step=step,
        memory=tuple(memory.stage_memory(stage) for stage in range(pp_size)),
    )
    _check_cache(config, plan)
    return plan


def _check_top_k(config: Config, sources: ModelSources) -> None:
    num_ids = sources.tokenizer_size - len(sources.alignment.removed_ids)
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
        cache = need.cache(config.rollout, memory)
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
