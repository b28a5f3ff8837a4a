"""The metrics of a step: sums of each replica, added up and averaged over all.

A new metric of rollouts is a sum in `sum_step` and its average in `average_step`. Metrics of the
loss at each token are made in `loss/views.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from trb_megatron.batch import Rollout
from trb_megatron.distributed.layout import ParallelLayout, gather_from_leaders

Sums = dict[str, float]


def sum_step(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    loss_sums: Mapping[str, Tensor],
    counts: Mapping[str, float],
) -> Sums:
    """Sums over the rollouts that this replica drew, and of the loss over the tokens it trained on.

    Args:
        rewards: of the rollouts whose prompts have answers.
        loss_sums: "loss" and its metrics, "loss/...".
        counts: what is added up over replicas and shown as it is, named as in "rollout/...".
    """
    sums = {name: float(value) for name, value in loss_sums.items()}
    sums |= {f"rollout/{name}": count for name, count in counts.items()}
    sums |= {
        "rollouts": len(rollouts),
        "tokens": sum(len(r.response_ids) for r in rollouts),
        "stopped": sum(r.stopped for r in rollouts),
        "rewards": len(rewards),
        "reward": sum(rewards),
    }
    records = [r.record for r in rollouts if r.record is not None]
    if records:
        sums["blend_coef"] = sum(float(r.blend_coef.sum()) for r in records)
        sums["kl_student"] = sum(float(r.kl_student.sum()) for r in records)
        sums["accepted"] = sum(int(r.accepted.sum()) for r in records)
        sums["teacher_calls"] = sum(r.teacher_calls for r in rollouts)
    return sums


def average_step(sums: Sums, layout: ParallelLayout) -> dict[str, float]:
    """Averages over all replicas, by the names that metrics.jsonl has.

    Collective over all ranks; the sums of leaders count.
    """
    total: Sums = {}
    for share in gather_from_leaders(sums, layout):
        for name, value in share.items():
            total[name] = total.get(name, 0.0) + value
    tokens, rollouts = total["tokens"], total["rollouts"]
    metrics = {n: v / tokens for n, v in total.items() if n == "loss" or n.startswith("loss/")}
    metrics |= {n: v for n, v in total.items() if n.startswith("rollout/")}
    metrics |= {
        "rollout/tokens": tokens,
        "rollout/response_length": tokens / rollouts,
        "rollout/stop_fraction": total["stopped"] / rollouts,
    }
    if "blend_coef" in total:
        metrics |= {
            "behavior/blend_coef": total["blend_coef"] / tokens,
            "behavior/kl_per_token": total["kl_student"] / tokens,
            "behavior/kl_per_sequence": total["kl_student"] / rollouts,
            "behavior/acceptance": total["accepted"] / tokens,
            "rollout/teacher_calls_per_token": total["teacher_calls"] / tokens,
        }
    if total["rewards"] > 0:
        metrics["rollout/reward"] = total["reward"] / total["rewards"]
    return metrics


def describe_costs(
    seconds: Mapping[str, float], peaks_gb: Mapping[str, float], num_tokens: float
) -> dict[str, float]:
    """Times of the step's phases, what they make of its tokens on all replicas, and memory.

    `seconds` are from `PhaseTimer`, `peaks_gb` from `PeakMemory`.
    """
    return {
        **{f"time/{phase}": value for phase, value in seconds.items()},
        "perf/tokens_per_s": num_tokens / seconds["step"],
        "perf/peak_memory_gb": peaks_gb["step"],
        "perf/peak_memory_run_gb": peaks_gb["run"],
    }
