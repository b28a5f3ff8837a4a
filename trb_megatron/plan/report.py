"""The start-up report of a job: versions, code paths in use, and the plan."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from trb_megatron.config.options import AUTO_CACHE_SHARE, Config
from trb_megatron.models.fp8 import frozen_recipe
from trb_megatron.models.sources import ModelSources
from trb_megatron.plan.memory import GB
from trb_megatron.plan.plan import Plan


def describe_environment(device: torch.device, flash_attention: int | None) -> list[str]:
    """Lines on versions, optional accelerators of Megatron-Core, and the device.

    `flash_attention` is the version that reads the paged cache, if any.
    """
    optional = {
        "Transformer Engine": installed_version("transformer-engine", "transformer_engine.pytorch"),
        "Apex": installed_version("apex", "apex.multi_tensor_apply"),
    }
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        **{name: found or "absent" for name, found in optional.items()},
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kernel = f"flash-attention {flash_attention}" if flash_attention else "masked SDPA"
    return [
        ", ".join(f"{name} {found}" for name, found in versions.items()),
        f"device: {name}; rollout attention: {kernel} over pages",
    ]


def describe_precision(config: Config) -> list[str]:
    """Lines on the number format that each part of a run computes in."""
    training = config.training
    dtype = "fp32" if training.precision == "fp32" else "bf16"
    student = teacher = rollouts = dtype
    if training.precision == "fp8":
        recipe, frozen = training.fp8_recipe, frozen_recipe(training.fp8_recipe)
        student, teacher = f"fp8 ({recipe})", f"fp8 ({frozen})"
        rollouts = dtype if recipe == "delayed" else student
    products = [f"student {student}", f"the student's rollouts and evaluation {rollouts}"]
    if config.is_distilling:
        products.insert(1, f"teacher {teacher}")
    return [
        f"matrix products of the layers: {', '.join(products)}",
        f"{dtype}: weights, attention, norms, embeddings, vocabulary projection, key/value cache",
        "fp32: master weights, gradient sums, optimizer state, solver, losses, sampling",
    ]


def installed_version(distribution: str, module: str) -> str | None:
    """Version of an installed package; None when it lacks `module`.

    The module tells NVIDIA's Apex from the unrelated "apex" of the package index.
    """
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return version(distribution)
    except (ModuleNotFoundError, PackageNotFoundError):
        return None


# ---------------------------------------------------------------- the plan

_STAGES_PER_TABLE = 8


def describe_plan(
    plan: Plan, sources: ModelSources, config: Config, memory: int | None = None
) -> list[str]:
    """Lines on a run's layout, models, step and memory; `memory` is that of a GPU in bytes."""
    return [
        *_describe_layout(plan),
        *_describe_vocabulary(plan, sources),
        *_describe_models(plan),
        _describe_step(plan, config),
        "",
        *_describe_stages(plan),
        "",
        *_describe_memory(plan, config, memory),
        *_describe_cache(plan, config, memory),
        *_describe_host(plan),
    ]


def _describe_layout(plan: Plan) -> list[str]:
    tp, pp, dp = plan.tp_size, plan.pp_size, plan.dp_size
    place = ""
    if plan.world_size > 1:
        place = f" (rank r: tensor rank r % {tp}, replica r // {tp} % {dp}, stage r // {tp * dp})"
    return [f"layout: {_count(plan.world_size, 'rank')} = TP {tp} x PP {pp} x DP {dp}{place}"]


def _describe_vocabulary(plan: Plan, sources: ModelSources) -> list[str]:
    rows = " and ".join(f"{name} {model.vocab_size:,}" for name, model in sources.models.items())
    size = plan.vocab_rows
    cut = f"; tensor rank t holds rows from {size:,} t to {size:,} (t + 1)"
    alignment = sources.alignment
    stops = f"student {list(alignment.student_ids)}"
    if sources.teacher is not None:
        stops += f", teacher {list(alignment.teacher_ids)}, "
        stops += "the same" if alignment.is_trivial else f"merged into {alignment.stop_id}"
    return [
        f"vocabulary: {sources.tokenizer_size:,} ids; {rows} rows, padded to {plan.vocab_size:,}"
        + (cut if plan.tp_size > 1 else ""),
        f"stop ids: {stops}",
    ]


def _describe_models(plan: Plan) -> list[str]:
    return [
        f"{name}: {model.config.path} ({model.config.family}, {model.config.num_layers} layers, "
        f"{model.num_parameters:,} parameters"
        + (", tied embeddings)" if model.config.tied_embeddings else ")")
        for name, model in plan.models.items()
    ]


def _describe_step(plan: Plan, config: Config) -> str:
    step = plan.step
    if step.max_length is None:
        return (
            f"step: {step.num_responses:,} given responses, in microbatches of up to "
            f"{step.microbatch_tokens:,} tokens"
        )
    assert step.num_microbatches is not None
    return (
        f"step: {config.training.prompts_per_step:,} prompts x "
        f"{config.rollout.rollouts_per_prompt:,} responses of up to {step.max_length:,} tokens = "
        f"{step.num_responses * step.max_length:,}; {_count(step.num_microbatches, 'microbatch')} "
        f"of {step.microbatch_tokens:,} a replica"
    )


def _describe_stages(plan: Plan) -> list[str]:
    """A table of who holds which layers, and how many parameters that makes."""
    rows = [["stage", "ranks"]]
    for name in plan.models:
        rows[0] += [f"{name}'s layers", "parameters"]
    ranks_per_stage = plan.world_size // plan.pp_size
    for stage in range(plan.pp_size):
        first = stage * ranks_per_stage
        row = [str(stage), _span(first, first + ranks_per_stage - 1)]
        for model in plan.models.values():
            share = model.stages[stage]
            layers = _span(share.layers.start, share.layers.stop - 1)
            row += [layers + _ends(stage, plan.pp_size), f"{share.num_parameters:,}"]
        rows.append(row)
    return _table(rows)


def _ends(stage: int, pp_size: int) -> str:
    """Names of the parts that a stage holds besides layers."""
    held = ["embedding"] * (stage == 0) + ["output"] * (stage == pp_size - 1)
    return "".join(f" + {part}" for part in held)


def _describe_memory(plan: Plan, config: Config, memory: int | None) -> list[str]:
    """Tables of gigabytes on each rank of a stage, a column for each stage."""
    parts = {
        "student's weights": [need.weights for need in plan.memory],
        "gradients": [need.gradients for need in plan.memory],
        "optimizer": [need.optimizer for need in plan.memory],
        "teacher's weights": [need.teacher for need in plan.memory],
        "FP8 copies of weights*": [need.fp8_copies for need in plan.memory],
        "activations*": [need.activations for need in plan.memory],
        "loss*": [need.loss for need in plan.memory],
        "teacher's hidden states*": [need.hidden for need in plan.memory],
        "= most in training": [need.training for need in plan.memory],
    }
    if config.training.precision != "fp8":
        del parts["FP8 copies of weights*"]
    if plan.step.max_length is not None:
        caches = [need.cache(config.rollout, memory) for need in plan.memory]
        parts["key/value cache"] = caches
        parts["other parts of rollouts*"] = [need.rollouts for need in plan.memory]
        parts["= most in rollouts"] = [
            need.held + cache + need.rollouts
            for need, cache in zip(plan.memory, caches, strict=True)
        ]
    unit, divisor = _unit(max(need.training for need in plan.memory))
    lines = []
    for start in range(0, plan.pp_size, _STAGES_PER_TABLE):
        shown = range(start, min(start + _STAGES_PER_TABLE, plan.pp_size))
        rows = [[f"{unit} on each rank, * estimated", *(f"stage {stage}" for stage in shown)]]
        for name, values in parts.items():
            rows.append([name, *(f"{values[stage] / divisor:,.2f}" for stage in shown)])
        lines += _table(rows)
    return lines


def _describe_cache(plan: Plan, config: Config, memory: int | None) -> list[str]:
    if plan.step.max_length is None:
        return []
    need = max(plan.memory, key=lambda need: need.cache_one)
    size = need.cache(config.rollout, memory)
    line = (
        f"cache: {_size(need.cache_one)} for a sequence of {plan.step.max_length:,} tokens, "
        f"{_size(need.cache_all)} for all slots"
    )
    if size < need.cache_all:
        line += f"; {_size(size)} hold {need.num_sequences(size):,} of that length at a time"
    elif config.rollout.cache_gb is None and memory is None:
        line += f"; at most {AUTO_CACHE_SHARE:.0%} of what the others leave"
    return [line]


def _describe_host(plan: Plan) -> list[str]:
    host = plan.memory[-1].host
    if host == 0:
        return []
    return [
        f"host memory: up to {_size(host)} for each rank of stage {plan.pp_size - 1}, where the "
        "teacher's hidden states wait"
    ]


def _unit(num_bytes: int) -> tuple[str, int]:
    return ("GB", GB) if num_bytes >= GB else ("MB", 10**6)


def _size(num_bytes: int) -> str:
    unit, divisor = _unit(num_bytes)
    return f"{num_bytes / divisor:,.2f} {unit}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("h") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns aligned to the right, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
