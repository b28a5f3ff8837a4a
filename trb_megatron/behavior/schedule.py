"""The policy that samples in each optimizer step, and the schedule of its KL budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trb_megatron.behavior.policies import (
    BlendPolicy,
    Policy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
)
from trb_megatron.behavior.stop_alignment import StopAlignment

if TYPE_CHECKING:
    from trb_megatron.config.options import BehaviorConfig, Config


def kl_budget_at(step: int, kl_budget: float, warmup_steps: int, schedule: str) -> float:
    """Return the KL budget in nats of optimizer step `step`, counted from 0.

    "linear" is kl_budget * (1 - step / warmup_steps), "constant" is kl_budget; both are 0 from
    step `warmup_steps` on (Plyusov et al., arXiv 2605.31159). Raises ValueError for a negative or
    non-finite budget, a negative step or number of steps, or another schedule.
    """
    if schedule not in ("linear", "constant"):
        raise ValueError(f"schedule {schedule!r} is neither 'linear' nor 'constant'")
    if not (math.isfinite(kl_budget) and kl_budget >= 0):
        raise ValueError(f"kl_budget={kl_budget} must be finite and at least 0")
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step={step} and warmup_steps={warmup_steps} must be at least 0")
    if step >= warmup_steps:
        return 0.0
    return kl_budget * (1 - step / warmup_steps) if schedule == "linear" else kl_budget


def kl_budget_of_step(step: int, behavior: BehaviorConfig) -> float:
    """The configured KL budget in nats of an optimizer step, counted from 0."""
    return kl_budget_at(step, behavior.kl_budget, behavior.warmup_steps, behavior.schedule)


def policy_of_step(
    step: int,
    config: Config,
    *,
    num_valid: int,
    alignment: StopAlignment,
    tp_group: dist.ProcessGroup | None,
) -> Policy:
    """The policy that samples the rollouts of an optimizer step; after the warmup, the student's.

    `num_valid` and `alignment` as in the policies.
    """
    behavior, kl_budget = config.behavior, kl_budget_of_step(step, config.behavior)
    shared: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "num_valid": num_valid,
        "alignment": alignment,
        "tp_group": tp_group,
    }
    if not config.asks_teacher or step >= behavior.warmup_steps:
        return StudentPolicy(**shared)
    if behavior.policy == "skd":
        return SKDPolicy(
            top_k=behavior.skd_top_k, teacher_temperature=behavior.skd_temperature, **shared
        )
    if behavior.policy == "teacher":
        return TeacherPolicy(**shared)
    return BlendPolicy(kl_budget=kl_budget, **shared)
