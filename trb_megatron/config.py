"""The whole configuration of a run: every option, its default, and what cannot be combined.

A configuration is one YAML file plus `section.key=value` overrides. `load_config` checks all of it
before anything else starts, and `save_config` writes the resolved result into the run folder.
Relative paths are relative to the current directory.
"""

import argparse
import difflib
import os
import re
import reprlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from trb_megatron.atomic_folder import write_file
from trb_megatron.plain_yaml import BrokenYAML, dump_yaml, parse_yaml

MATH_SYSTEM_PROMPT = (
    "Please reason step by step, and put your final answer within \\boxed{}."  # arXiv 2605.31159
)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the keys and the fix."""


def _check_path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("expected a path; put quotes around a name that is a number or a flag")
    if value == "":
        raise ValueError("an empty path; name a file or folder")  # Path("") would be the cwd
    if re.search("[\0\ud800-\udfff]", str(value)):
        raise ValueError("no file can have this name")
    return value


def _refuse_duplicates(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("the same number is listed twice")
    return values


def _between(least: float, most: float) -> FieldInfo:
    """A number within bounds, strictly: `steps: true` and `seed: '3'` are mistakes, no numbers."""
    info: FieldInfo = Field(strict=True, ge=least, le=most)
    return info


def _zero_or_between(least: float, most: float) -> AfterValidator:
    def check(value: float) -> float:
        if value != 0 and not least <= value <= most:
            raise ValueError(f"expected 0 or a number from {least:g} to {most:g}")
        return value

    return AfterValidator(check)


def _auto_or_between(least: int, most: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"expected auto or a whole number from {least} to {most:,}")
        return value

    return BeforeValidator(check)


# Lengths and indices have 32 bits in many places.
_MOST = 2**31 - 1

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, _between(1, _MOST)]
CountFromZero = Annotated[int, _between(0, _MOST)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, _between(0, 1)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1)]
# Logits divided by less overflow, and what is left of them by more is noise.
Temperature = Annotated[float, _between(0.01, 100)]
TemperatureOrGreedy = Annotated[float, Field(strict=True), _zero_or_between(0.01, 100)]
Name = Annotated[str, Field(min_length=1)]
ConfigPath = Annotated[Path, BeforeValidator(_check_path), AfterValidator(Path.expanduser)]
# A set's name becomes part of metric names and of override keys.
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]

LossName = Literal[
    "reverse_kl_topk",
    "reverse_kl_topk_policy_gradient",
    "reverse_kl_full",
    "reverse_kl_sampled",
    "forward_kl_full",
    "jsd",
    "veto",
    "cross_entropy",
]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise"]


class Section(BaseModel):
    """A group of options: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """Where a run lives and which random numbers it draws."""

    dir: ConfigPath
    """Folder of the run: configuration, metrics, checkpoints, export. A run that is started again
    with the same folder resumes from its newest checkpoint."""
    seed: Annotated[int, _between(0, 2**63 - 1)] = 0
    """Seed of the prompt order and of every token that is sampled."""


class ModelConfig(Section):
    """A model as a Hugging Face checkpoint folder."""

    path: ConfigPath
    """Hugging Face checkpoint folder: `config.json`, safetensors weights, tokenizer."""


def _refuse_expert_parallelism(size: int) -> int:
    if size != 1:
        raise ValueError(
            "expert parallelism is not built yet; tensor parallelism cuts the experts, too: raise "
            "parallel.tensor_model_parallel_size instead"
        )
    return size


class ParallelConfig(Section):
    """How both models are spread over the ranks."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer. What tensor x pipeline size leaves of the ranks is data
    parallel."""
    pipeline_model_parallel_size: Count = 1
    """Stages that the layers are cut into."""
    sequence_parallel: Flag = False
    """Split the activations between layers over the tensor-parallel ranks, by tokens."""
    expert_model_parallel_size: Annotated[Count, AfterValidator(_refuse_expert_parallelism)] = 1
    """Only 1 is built. The experts of a mixture are cut over the tensor-parallel ranks."""
    timeout_minutes: Annotated[float, _between(0.02, 43_200)] = 30.0
    """Minutes that a collective operation may take. After that the job ends with an error."""


class DataConfig(Section):
    """The training prompts."""

    path: ConfigPath
    """File of prompts, or folder of parquet files, or Hugging Face dataset folder."""
    format: Literal["auto", "jsonl", "parquet", "hf"] = "auto"
    """Format of `data.path`; `auto` tells it by the name of a file and the content of a folder."""
    prompt_column: Name = "prompt"
    """Column of the prompts: text, or a list of chat messages."""
    answer_column: Name | None = "answer"
    """Column of the right answers, by which responses are rewarded; `null`: no rewards during
    training."""
    response_column: Name | None = None
    """Column of the responses that supervised training imitates; not used for distillation."""
    system_prompt: str | None = MATH_SYSTEM_PROMPT
    """System message before each prompt that brings none of its own; `null`: none."""
    apply_chat_template: Flag = True
    """Render prompts with the chat template of the student's tokenizer; `false`: prompts are plain
    text."""
    max_prompt_tokens: Count = 1024
    """Longest prompt in tokens, chat template included. Longer ones are dropped and counted."""
    shuffle: Flag = True
    """Visit the prompts in a new random order in each epoch; `false`: in the order of the file."""


class TrainingConfig(Section):
    """What is trained, for how long, and how it is fitted into memory."""

    task: Literal["distill", "supervised"] = "distill"
    """`distill`: learn from the teacher on sampled responses; `supervised`: imitate the responses
    of `data.response_column`."""
    steps: Count = 400
    """Steps of the run, each with one optimizer update."""
    prompts_per_step: Annotated[int, _between(1, 2**20)] = 64
    """Prompts of a step, over all data-parallel replicas."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Number format of both models; `fp8`: the layers' matrix products, with all else as in
    `bf16`."""
    fp8_recipe: FP8Recipe = "tensorwise"
    """How FP8 scales are found. `tensorwise` needs the least hardware and keeps nothing between
    passes, so that rollouts and resumes leave no trace."""
    max_tokens_per_microbatch: Count = 16384
    """Prompt and response tokens that one forward and backward pass of a replica takes. A longer
    sequence gets a pass of its own."""
    teacher_hidden_device: Literal["device", "host"] = "device"
    """Where the teacher's hidden states wait for the loss; `host` (pinned memory) makes room on a
    GPU."""
    recompute_activations: Flag = False
    """Compute the student's layers a second time in the backward pass instead of keeping their
    activations."""
    max_nonfinite_steps: CountFromZero = 0
    """Steps with a NaN or infinity that the run skips, without an update, before it stops; 0: it
    stops at the first."""


AUTO_PAGE_TOKENS = 64
AUTO_CACHE_SHARE = 0.8
"""Of a GPU's free memory."""


class RolloutConfig(Section):
    """How responses are sampled during training."""

    rollouts_per_prompt: Annotated[int, _between(1, 2**16)] = 4
    """Responses that are sampled for each prompt."""
    max_response_tokens: Count = 7168
    """Tokens after which a response is cut off."""
    temperature: TemperatureOrGreedy = 1.0
    """Temperature of both models when tokens are sampled; 0: greedy."""
    stop_ids: (
        Annotated[
            tuple[CountFromZero, ...], Field(min_length=1), AfterValidator(_refuse_duplicates)
        ]
        | None
    ) = None
    """Token ids that end a response, for both models; `null`: those of each model's
    `generation_config.json`, or else `config.json`."""
    max_sequences: Annotated[int, _between(1, 2**16)] = 256
    """Sequences that one data-parallel replica generates at a time (cache slots)."""
    page_tokens: Annotated[Literal["auto"] | int, _auto_or_between(1, 2**16)] = "auto"
    """Tokens of one page of the key/value cache; `auto`: 64, or the 256 that flash-attention 2
    needs."""
    cache_gb: Annotated[float, _between(1e-9, 1e6)] | None = None
    """GB (10^9 bytes) of each rank for the key/value caches of both models; `null`: on a GPU up to
    80 % of what is free, on a CPU as much as all slots can ever need."""
    max_prefill_tokens: Count = 16384
    """Prompt tokens of one forward pass when sequences enter the cache."""
    cuda_graphs: Flag = True
    """Record the student's single-token steps as CUDA graphs, on GPUs with flash-attention and one
    pipeline stage."""
    draft_tokens: Annotated[Literal["auto"] | int, _auto_or_between(0, 255)] = "auto"
    """Tokens that the student proposes per call of the teacher; 0: token by token; `auto`: by
    costs that are measured when the run first starts. Never changes a token."""
    keep_teacher_hidden: Flag = True
    """Keep the teacher's hidden states from the rollouts for the loss, which then runs no
    teacher."""


class BehaviorConfig(Section):
    """The policy that rollouts are sampled from, and for how long it may leave the student."""

    policy: Literal["trb", "skd", "teacher"] = "trb"
    """`trb`: nearest the teacher within a KL budget of the student; `skd`: the student's draw, or
    the teacher's where the teacher finds it unlikely; `teacher`: the teacher's own."""
    warmup_steps: CountFromZero = 50
    """Steps with this policy, counted from 0; from this step on rollouts are the student's own."""
    kl_budget: NonNegative = 0.01
    """`trb`: budget in nats per token at step 0; 0: plain on-policy distillation."""
    schedule: Literal["linear", "constant"] = "linear"
    """`trb`: `linear` lowers the budget to 0 over the warmup; `constant` keeps it until the warmup
    ends."""
    skd_top_k: Count = 25
    """`skd`: number of the teacher's likeliest tokens; the student's draw is kept if it is one of
    them."""
    skd_temperature: Temperature = 1.0
    """`skd`: temperature of the teacher's draw that replaces another."""


class LossConfig(Section):
    """The training loss and its parameters (names as in `trb_megatron.loss`)."""

    name: LossName = "reverse_kl_topk"
    """The loss."""
    top_k: Count = 16
    """Size of the student's top-k, for the losses on it and for the metrics of every loss."""
    temperature: Temperature = 1.0
    """What the logits of both models are divided by in the loss."""
    jsd_weight: Annotated[float, _between(0.001, 0.999)] = 0.5
    """`jsd`: weight of the teacher in the mixture; 0 and 1 would give zero loss."""
    veto_coef: Fraction = 0.0
    """`veto`: coefficient at step 0; it decays linearly to 0 over the run."""
    workspace_mb: Annotated[int, _between(1, 10**6)] = 512
    """MB (10^6 bytes) for the logits of a chunk of tokens. More is a little faster; results stay
    the same."""


class OptimizerConfig(Section):
    """AdamW with a cosine warmup, then a constant learning rate."""

    lr: Annotated[float, _between(1e-12, 1)] = 1e-5
    """Learning rate after its warmup."""
    beta1: Momentum = 0.9
    """AdamW's decay rate of the mean of gradients."""
    beta2: Momentum = 0.999
    """AdamW's decay rate of the mean of squared gradients."""
    eps: Annotated[float, _between(1e-20, 1)] = 1e-8
    """AdamW's term in the denominator; far less is 0 in fp32."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay, multiplied with the learning rate."""
    clip_grad: Annotated[float, Field(strict=True), _zero_or_between(1e-6, 1e6)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it; 0: no clipping."""
    warmup_steps: CountFromZero = 15
    """Steps over which the learning rate rises to `lr`, as a half cosine."""
    distributed: Flag = True
    """Shard master weights and optimizer state over the data-parallel ranks."""


class CheckpointConfig(Section):
    """How often the run is saved, how many saves stay, and whether it ends in an export."""

    every: Count = 50
    """Steps between saves; the last step is always saved."""
    keep: Count = 2
    """Newest saves that stay; older ones are deleted."""
    export_hf: Flag = True
    """Write the student to `RUN/hf` as a Hugging Face checkpoint after the last step."""


class EvaluationSet(Section):
    """One file of problems with known answers."""

    path: ConfigPath
    """File or folder of problems, in any format that `data.format=auto` reads."""
    prompt_column: Name = "prompt"
    """Column of the problems."""
    answer_column: Name = "answer"
    """Column of the right answers."""
    limit: Count | None = None
    """Use only the first so many problems; `null`: all."""


class EvaluationConfig(Section):
    """When and how the student's answers are graded."""

    sets: dict[SetName, EvaluationSet] = {}
    """Problem sets by name; the name appears in the metrics, as in `eval/NAME/pass@1`."""
    every: Count = 20
    """Steps between evaluations."""
    at_start: Flag = True
    """Evaluate before the first step."""
    at_end: Flag = True
    """Evaluate after the last step."""
    samples: Annotated[int, _between(1, 2**16)] = 1
    """Responses per problem."""
    pass_at: Annotated[
        tuple[Count, ...], Field(min_length=1), AfterValidator(_refuse_duplicates)
    ] = (1,)
    """Values of k for which pass@k is reported, each at most `samples`."""
    temperature: TemperatureOrGreedy = 1.0
    """Temperature of the student; 0: greedy."""
    max_response_tokens: Count = 8192
    """Tokens after which a response is cut off."""


class RewardsConfig(Section):
    """The processes that grade answers."""

    workers: Annotated[int, _between(1, 1024)] = 2
    """Grading processes of each data-parallel replica."""
    timeout_s: Annotated[float, _between(0.01, 86_400)] = 10.0
    """Seconds for one answer. An answer that takes longer scores 0."""


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: Flag = True
    """Write TensorBoard files to `RUN/tensorboard`."""
    wandb_project: Name | None = None
    """Weights & Biases project that gets the metrics; `null`: none."""


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig
    """Where the run lives."""
    student: ModelConfig
    """The model that is trained."""
    teacher: ModelConfig | None = None
    """The model that teaches; `null` only with `training.task=supervised`."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of both models over the ranks."""
    data: DataConfig
    """The prompts."""
    training: TrainingConfig = TrainingConfig()
    """Steps, precision and memory."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of responses in training."""
    behavior: BehaviorConfig = BehaviorConfig()
    """Who samples the responses."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saves and export."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """pass@1 and pass@k on problem sets."""
    rewards: RewardsConfig = RewardsConfig()
    """Grading processes."""
    logging: LoggingConfig = LoggingConfig()
    """TensorBoard and Weights & Biases."""

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> "Config":
        problems = list(_find_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


# ---------------------------------------------------------------- what cannot be combined


def _find_conflicts(config: Config) -> Iterator[str]:
    if config.training.task == "distill":
        yield from _find_distillation_conflicts(config)
    else:
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
    asks_teacher = policy != "trb" or behavior.kl_budget > 0
    plain = "behavior.kl_budget=0"
    if policy != "trb":
        plain = "behavior.policy=trb with behavior.kl_budget=0"
        if behavior.kl_budget == 0:
            yield (
                f"behavior.kl_budget: 0 is plain on-policy distillation, but behavior.policy="
                f"{policy} has no budget; leave it out, or set behavior.policy=trb"
            )
    if asks_teacher and behavior.warmup_steps == 0:
        yield (
            f"behavior.warmup_steps: 0 leaves no step to behavior.policy={policy}; set it to at "
            f"least 1, or {plain} for plain on-policy distillation"
        )
    if asks_teacher and config.rollout.temperature == 0:
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


def _find_general_conflicts(config: Config) -> Iterator[str]:
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


# ---------------------------------------------------------------- reading and writing


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides in order, and check the result.

    Override values have YAML syntax. Raises ConfigError naming the file and the line of broken
    YAML, or every unknown key, wrong value and impossible combination.
    """
    values = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values, source=f"{path} and overrides" if overrides else str(path))


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A command's arguments: `config` and `overrides`, as `load_config` takes them.

    Options may stand anywhere between them: parse with `parse_intermixed_args`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options of the configuration to replace, in YAML syntax",
    )
    return parser


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check nested plain values and build the configuration; `source` names them in errors.

    Raises ConfigError with one line for each unknown key, wrong value or impossible combination.
    """
    # A section whose keys are all commented out reads as null: it has its defaults.
    present = {name: section for name, section in values.items() if section is not None}
    try:
        return Config.model_validate(present)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_describe(detail) for detail in details[:_MAX_LINES]]
        if len(details) > _MAX_LINES:
            lines.append(f"and {len(details) - _MAX_LINES} more")
        raise ConfigError("\n  ".join([f"{source}:", *lines])) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal.

    The file is complete or absent: it is written beside its place and renamed.
    """
    write_file(Path(path), dump_yaml(config.model_dump(mode="json")))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        values = parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from None
    except BrokenYAML as error:
        raise ConfigError(f"{path}:{error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` at the top level")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys, shown = name.strip().split("."), _shorten.repr(override)
    if not equals or not all(keys):
        raise ConfigError(f"override {shown}: write it as section.key=value")
    try:
        value = parse_yaml(text)
    except BrokenYAML as error:
        raise ConfigError(f"override {shown}: the value's line {error}") from None
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = {} if section.get(key) is None else section[key]
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {shown}: {'.'.join(keys[: depth + 1])} is a value, not a section"
            )
        section[key] = dict(inner)  # an alias may stand for the same mapping elsewhere
        section = section[key]
    section[keys[-1]] = value


_MAX_LINES = 20

# What an error shows of a value is short, even if it names itself or its parts a million times.
_shorten = reprlib.Repr()
_shorten.maxlevel = 2
_shorten.maxstring = 80


def _describe(detail: Any) -> str:
    """Turn one pydantic error into a line with the key, what is wrong and what to do."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        if "." in detail["loc"][-1]:
            return f"{key}: unknown key; a dotted key is an override: a file has sections with keys"
        return f"{key}: unknown key; did you mean {_nearest_key(key[:100])}?"
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    if detail["type"] == "model_type":
        return f"{key}: expected a section with keys (now {_shorten.repr(detail['input'])})"
    message = detail["msg"].removeprefix("Value error, ")
    if not key:  # a conflict between sections names its keys itself
        return message.replace("\n", "\n  ")
    return f"{key}: {message[0].lower()}{message[1:]} (now {_shorten.repr(detail['input'])})"


def _nearest_key(unknown: str) -> str:
    def similarity(known: str) -> float:
        whole = difflib.SequenceMatcher(None, unknown, known).ratio()
        leaf = difflib.SequenceMatcher(None, unknown.split(".")[-1], known.split(".")[-1]).ratio()
        return whole + leaf + (leaf == 1)  # a right key in the wrong section

    return max(_key_names(Config), key=similarity)


def _key_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                in_dict = get_origin(field.annotation) is dict
                yield from _key_names(candidate, f"{key}.NAME." if in_dict else f"{key}.")


# ---------------------------------------------------------------- is this the same run?

# What may change between a run and its resume: none of it alters what the next step computes
# (except by rounding, for another layout or FP8 recipe).
_MAY_CHANGE = (
    "run.dir",
    "parallel",
    "training.steps",
    "training.fp8_recipe",
    "training.max_tokens_per_microbatch",
    "training.teacher_hidden_device",
    "training.max_nonfinite_steps",
    "rollout.max_sequences",
    "rollout.page_tokens",
    "rollout.cache_gb",
    "rollout.max_prefill_tokens",
    "rollout.cuda_graphs",
    "rollout.draft_tokens",
    "loss.workspace_mb",
    "checkpoint",
    "evaluation",
    "rewards",
    "logging",
)


def fingerprint_difference(saved: Config, now: Config) -> list[str]:
    """Name the keys, with both values, because of which two configurations are different runs.

    Empty exactly when one may resume the other.
    """
    before, after = _fixed_values(saved), _fixed_values(now)
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: saved {before.get(name)!r}, now {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _fixed_values(config: Config) -> dict[str, Any]:
    flat = {}
    for section, options in config.model_dump(mode="json").items():
        for key, value in (options or {}).items():
            if config.loss.name == "veto" and f"{section}.{key}" == "training.steps":
                flat["training.steps"] = value  # the veto coefficient decays over them
            elif section not in _MAY_CHANGE and f"{section}.{key}" not in _MAY_CHANGE:
                flat[f"{section}.{key}"] = value
    if config.training.precision == "fp8":
        flat["training.precision"] = "bf16"  # what weights and optimizer state are, in both
    return flat


def git_commit() -> str | None:
    """The commit this package's source was checked out at, with "-dirty" if it was changed since.

    Outside its own git checkout, the commit that a container image was built from (TRB_COMMIT), or
    None.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside somebody else's repository
        return os.environ.get("TRB_COMMIT") or None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(root), *describe]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
