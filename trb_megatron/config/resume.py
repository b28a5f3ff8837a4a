"""Whether two configurations describe the same run, so that one may resume the other."""

from typing import Any

from trb_megatron.config.options import Config

# What may change between a run and its resume: none of it alters what the next step computes
# (except by rounding, for another layout or FP8 recipe).
_MAY_CHANGE = (
    "run.dir",
    # Inputs are known by content (`run.inputs`).
    *("student.path", "teacher.path", "data.path", "data.format"),
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
