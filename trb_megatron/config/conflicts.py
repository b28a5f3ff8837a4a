"""Conflicts between options, and combinations that are allowed but probably not meant."""

from collections.abc import Iterator

from trb_megatron.config.options import (
    BehaviorConfig,
    Config,
    JobConfig,
    ParallelConfig,
    TrainingConfig,
)
from trb_megatron.config.values import ConfigError


def find_conflicts(config: JobConfig) -> Iterator[str]:
    """Say what cannot be combined, one line each: the key, why, and what to set instead.

    What concerns training alone is no conflict of another job.
    """
    if isinstance(config, Config) and config.is_distilling:
        yield from _find_distillation_conflicts(config)
    elif isinstance(config, Config):
        yield from _find_supervised_conflicts(config)
    yield from _find_general_conflicts(config)


def _find_distillation_conflicts(config: Config) -> Iterator[str]:
    if config.teacher is None:
        yield "teacher.path: training.task=distill needs a teacher; set teacher.path"
    if config.loss.name == "cross_entropy":
        yield (
            "loss.name: cross_entropy does not use the teacher; choose another loss or set "
            "training.task=supervised"
        )
    yield from _find_behavior_conflicts(config)


def _find_behavior_conflicts(config: Config) -> Iterator[str]:
    behavior, policy = config.behavior, config.behavior.policy
    plain = "behavior.kl_budget=0"
    if policy != "trb":
        plain = "behavior.policy=trb with behavior.kl_budget=0"
        if behavior.kl_budget == 0:
            yield (
                f"behavior.kl_budget: 0 is plain on-policy distillation, but behavior.policy="
                f"{policy} has no budget; leave it out, or set behavior.policy=trb"
            )
    if config.asks_teacher and behavior.warmup_steps == 0:
        yield (
            f"behavior.warmup_steps: 0 leaves no step to behavior.policy={policy}; set it to at "
            f"least 1, or {plain} for plain on-policy distillation"
        )
    if config.asks_teacher and config.rollout.temperature == 0:
        yield (
            f"rollout.temperature: 0 (greedy) leaves behavior.policy={policy} no distribution to "
            f"draw from; set it above 0, or {plain} for plain on-policy distillation"
        )
    for key in ("skd_top_k", "skd_temperature"):
        is_default = getattr(behavior, key) == BehaviorConfig.model_fields[key].default
        if policy != "skd" and not is_default:
            yield (
                f"behavior.{key}: behavior.policy={policy} does not use it; set "
                "behavior.policy=skd, or leave it out"
            )


def _find_supervised_conflicts(config: Config) -> Iterator[str]:
    if config.loss.name != "cross_entropy":
        yield (
            f"loss.name: {config.loss.name} needs a teacher's distribution; with "
            "training.task=supervised set loss.name=cross_entropy"
        )
    if config.data.response_column is None:
        yield (
            "data.response_column: training.task=supervised needs responses to imitate; name the "
            "column that holds them"
        )


def _find_general_conflicts(config: JobConfig) -> Iterator[str]:
    parallel, data, loss, evaluation = config.parallel, config.data, config.loss, config.evaluation
    optimizer, training = config.optimizer, config.training
    if optimizer.lr * optimizer.weight_decay >= 1:
        yield (
            f"optimizer.weight_decay: each update would multiply the weights with 1 - optimizer.lr "
            f"* optimizer.weight_decay = {1 - optimizer.lr * optimizer.weight_decay:g}; lower it"
        )
    is_default = training.fp8_recipe == TrainingConfig.model_fields["fp8_recipe"].default
    if training.precision != "fp8" and not is_default:
        yield (
            f"training.fp8_recipe: training.precision={training.precision} does not use it; set "
            "training.precision=fp8, or leave it out"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel: there is nothing to split with "
            "parallel.tensor_model_parallel_size=1; set it above 1, or "
            "parallel.sequence_parallel=false"
        )
    if data.system_prompt is not None and not data.apply_chat_template:
        yield (
            "data.system_prompt: only a chat template says where it belongs; set "
            "data.system_prompt=null, or data.apply_chat_template=true"
        )
    if data.chat_template_kwargs and not data.apply_chat_template:
        yield (
            "data.chat_template_kwargs: only a chat template reads them; leave them out, or set "
            "data.apply_chat_template=true"
        )
    if data.template_date is not None and not data.apply_chat_template:
        yield (
            "data.template_date: only a chat template prints it; leave it out, or set "
            "data.apply_chat_template=true"
        )
    for name, problems in evaluation.sets.items():
        if problems.system_prompt not in (None, "auto") and not data.apply_chat_template:
            yield (
                f"evaluation.sets.{name}.system_prompt: only a chat template says where it "
                f"belongs; set evaluation.sets.{name}.system_prompt=null, or "
                "data.apply_chat_template=true"
            )
    if loss.veto_coef > 0 and loss.name != "veto":
        yield (
            f"loss.veto_coef: {loss.name} does not use it; set loss.name=veto, or loss.veto_coef=0"
        )
    if max(evaluation.pass_at) > evaluation.samples:
        yield (
            f"evaluation.pass_at: pass@{max(evaluation.pass_at)} needs as many samples; set "
            f"evaluation.samples (now {evaluation.samples}) to at least {max(evaluation.pass_at)}"
        )
    if evaluation.temperature == 0 and evaluation.samples > 1:
        yield (
            "evaluation.samples: at evaluation.temperature=0 all samples are the same; set "
            "evaluation.samples=1, or a temperature above 0"
        )


def config_warnings(config: Config) -> list[str]:
    """Say what is allowed but probably not meant, one line each, for the start-up report."""
    warnings = []
    teacher = config.teacher
    if teacher is not None and teacher.path.resolve() == config.student.path.resolve():
        warnings.append(
            f"student.path and teacher.path are the same ({teacher.path}): the loss starts at zero"
        )
    return warnings


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Check that the ranks can be divided into whole model replicas.

    Raises ConfigError when tensor x pipeline parallel size does not divide `world_size`.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp) != 0:
        raise ConfigError(
            f"{world_size} ranks cannot be divided into replicas of "
            f"parallel.tensor_model_parallel_size={tp} x "
            f"parallel.pipeline_model_parallel_size={pp} = {tp * pp} ranks; start a multiple of "
            f"{tp * pp} ranks or change these keys"
        )
