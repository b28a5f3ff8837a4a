"""Models to blend, by their logits, and what else several tests of this folder share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.reference import blend_logprobs, kl
from trb_megatron.behavior.path import Point
from trb_megatron.behavior.stop_alignment import StopAlignment

NUM_VALID = 21
"""Ids of the small models that every number of ranks is given."""
ALIGNMENTS = [
    StopAlignment((3,), (15,)),
    StopAlignment((18, 2), (2, 9)),
    StopAlignment((4, 5), (4,)),
]
FAMILIES = [
    *("flat", "peaked", "scale_30", "scale_1000", "close", "very_close"),
    *("student_spike", "teacher_spike", "two_spikes"),
]
BUDGETS = [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3, 1, 3, 10, 100, 1e9]
SPIKES = [8, 12, 16, 20, 30, 100]


def build_pair(
    student_scale: float, teacher_scale: float, num_rows: int = 8, size: int = 150, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Normally distributed logits [N, V] of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student_NV = student_scale * torch.randn(num_rows, size, generator=generator)
    return student_NV, teacher_scale * torch.randn(num_rows, size, generator=generator)


def add_spikes(logits_NV: Tensor, height: float, seed: int) -> Tensor:
    """Logits of almost deterministic rows."""
    generator = torch.Generator().manual_seed(seed)
    ids_N1 = torch.randint(logits_NV.shape[-1], (len(logits_NV), 1), generator=generator)
    return logits_NV.scatter_add(-1, ids_N1, torch.full_like(ids_N1, height, dtype=torch.float32))


def build_family(name: str) -> tuple[Tensor, Tensor]:
    """Logits [16, 700] of student and teacher, of one kind."""
    student_NV, teacher_NV = build_pair(1, 1, num_rows=16, size=700)
    return {
        "flat": lambda: (student_NV, teacher_NV),
        "peaked": lambda: (3 * student_NV, 5 * teacher_NV),
        "scale_30": lambda: (30 * student_NV, 30 * teacher_NV),
        "scale_1000": lambda: (1e3 * student_NV, 1e3 * teacher_NV),
        "close": lambda: (5 * student_NV, 5 * student_NV + 0.1 * teacher_NV),
        "very_close": lambda: (5 * student_NV, 5 * student_NV + 1e-3 * teacher_NV + 20),
        "student_spike": lambda: (add_spikes(student_NV, 1e4, 1), teacher_NV),
        "teacher_spike": lambda: (student_NV, add_spikes(teacher_NV, 1e4, 2)),
        "two_spikes": lambda: (add_spikes(student_NV, 60, 1), add_spikes(teacher_NV, 40, 2)),
    }[name]()


def build_spikes(height: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Models of which one or both are nearly deterministic."""
    for scale in (1, 3):
        student_NV, teacher_NV = build_pair(scale, scale, num_rows=16, size=700, seed=seed)
        spiked_NV = add_spikes(student_NV, height, seed)
        yield spiked_NV, teacher_NV
        yield student_NV, add_spikes(teacher_NV, height, seed)
        yield spiked_NV, add_spikes(teacher_NV, height, seed + 50)
        yield spiked_NV, spiked_NV + teacher_NV


def build_shifted_halves() -> tuple[Tensor, Tensor]:
    """Models that agree on each shard of two seen alone, and are far apart across the shards."""
    student_NV = torch.cat((add_spikes(torch.zeros(4, 16), 500.0, 1), torch.zeros(4, 16)), dim=-1)
    return student_NV, student_NV + torch.tensor([0.0, 600.0]).repeat_interleave(16)


def dense_point(
    student_NV: Tensor, teacher_NV: Tensor, blend_coef_N: Tensor
) -> tuple[Point, Tensor]:
    """The blend at β by definition, and max |r|; float64."""
    logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
    ratio_NV = logq_NV - logp_NV
    ratio_NV = ratio_NV - (logp_NV.exp() * ratio_NV).sum(-1, keepdim=True)
    logmu_NV = blend_logprobs(student_NV, teacher_NV, blend_coef_N)

    def mean(values_NV: Tensor) -> Tensor:
        return (logmu_NV.exp() * values_NV).sum(-1)

    first_N = mean(ratio_NV)
    deviation_NV = ratio_NV - first_N[:, None]
    variance_N = mean(deviation_NV**2)
    point = Point(
        blend_coef=blend_coef_N.double(),
        kl=kl(logmu_NV, logp_NV),
        log_partition=(logp_NV + blend_coef_N[:, None] * ratio_NV).logsumexp(-1),
        mean=first_N,
        log_variance=variance_N.log(),
        growth=mean(deviation_NV**3) / variance_N,
    )
    return point, ratio_NV.abs().amax(-1)


def assert_solved(
    student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, blend_coef_N: Tensor
) -> None:
    """The KL, recomputed in float64, is within the budget and 2e-5 of it, or β fp32's last one."""
    logp_NV = student_NV.double().log_softmax(-1)
    kl_N = kl(blend_logprobs(student_NV, teacher_NV, blend_coef_N), logp_NV)
    assert (kl_N <= budget_N + (1e-3 * budget_N).clamp_min(2e-9)).all()
    next_N = blend_coef_N.nextafter(torch.ones_like(blend_coef_N))
    kl_next_N = kl(blend_logprobs(student_NV, teacher_NV, next_N), logp_NV)
    rounding_N = 3e-8 * (2 * budget_N).sqrt()
    is_close_N = kl_N >= budget_N * (1 - 2e-5) - rounding_N
    is_last_N = kl_next_N > budget_N * (1 - 2e-5)
    assert (is_close_N | is_last_N | (blend_coef_N == 1) | (budget_N == 0)).all()
