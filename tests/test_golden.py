"""Blend and losses against the golden vectors, in fp32 at TP 1 to 16.

Where the vocabulary doesn't divide, columns of NaN pad it and `num_valid` gives the true size.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from tests.reference import blend_logprobs, entropy, kl
from trb_megatron.behavior.solver import solve_behavior
from trb_megatron.distributed.vocab_parallel import all_gather
from trb_megatron.loss.losses import LOSSES

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = {
    "forward_kl_full": ("forward_kl_full", {}),
    "jsd_0.1": ("jsd", {"jsd_weight": 0.1}),
    "jsd_0.5": ("jsd", {"jsd_weight": 0.5}),
    "jsd_0.9": ("jsd", {"jsd_weight": 0.9}),
    "reverse_kl_full": ("reverse_kl_full", {}),
    "reverse_kl_topk_policy_gradient": ("reverse_kl_topk_policy_gradient", {}),
    "reverse_kl_topk_renormalized": ("reverse_kl_topk", {}),
    "veto_topk": ("veto", {"veto_coef": 0.4}),
}


@cache
def load(name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    cases = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return cases, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def gather_columns(shard_NU: Tensor, group: dist.ProcessGroup | None, num_valid: int) -> Tensor:
    return all_gather(shard_NU, group).transpose(0, 1).flatten(1)[:, :num_valid]


def solve_all() -> list[dict[str, Tensor]]:
    group = current_group()
    cases, golden = load("blend")
    results = []
    for case in cases:
        i, num_valid = case["case"], case["vocab"]
        student_NU, teacher_NU = (
            vocab_shard(golden[f"{i}_{model}_logits"], group) for model in ("student", "teacher")
        )
        behavior = solve_behavior(
            student_NU, teacher_NU, golden[f"{i}_kl_budget"], tp_group=group, num_valid=num_valid
        )
        results.append(
            {
                "blend_coef": behavior.blend_coef,
                "kl_student": behavior.kl_student,
                "logprobs": gather_columns(behavior.logprobs(), group, num_valid),
            }
        )
    return results


def differentiate_all() -> dict[tuple[int, str], dict[str, Tensor]]:
    group = current_group()
    cases, golden = load("losses")
    results = {}
    for case in cases:
        i, num_valid = case["case"], case["vocab"]
        for golden_name in case["losses"]:
            name, options = GOLDEN_NAMES[golden_name]
            student_NU, teacher_NU = (
                vocab_shard(golden[f"{i}_{model}_logits"], group)
                for model in ("student", "teacher")
            )
            student_NU.requires_grad_()
            loss = LOSSES[name](
                student_NU,
                teacher_NU,
                tp_group=group,
                num_valid=num_valid,
                top_k=case["top_k"],
                **options,
            )
            (grad_NU,) = torch.autograd.grad(loss.per_token.sum(), student_NU)
            grad_NV = gather_columns(grad_NU, group, num_valid)
            results[i, golden_name] = {
                "value": loss.per_token.detach(),
                "grad": grad_NV,
                **loss.metrics,
            }
    return results


def measure() -> tuple[Any, Any]:
    return solve_all(), differentiate_all()


@pytest.fixture(scope="module", params=TP_SIZES)
def results(request: pytest.FixtureRequest) -> list[tuple[Any, Any]]:
    return on_ranks(measure, request.param)


def test_all_ranks_agree_bit_for_bit(results: list[tuple[Any, Any]]) -> None:
    blends, losses = results[0]
    for other_blends, other_losses in results[1:]:
        for blend, other in zip(blends, other_blends, strict=True):
            assert all(torch.equal(blend[key], other[key]) for key in blend)
        for key in losses:
            assert all(torch.equal(losses[key][k], other_losses[key][k]) for k in losses[key])


def test_blend(results: list[tuple[Any, Any]]) -> None:
    cases, golden = load("blend")
    assert len(cases) == 22
    for case, result in zip(cases, results[0][0], strict=True):
        i, num_valid = case["case"], case["vocab"]
        student_NV, teacher_NV = (
            golden[f"{i}_{model}_logits"][:, :num_valid] for model in ("student", "teacher")
        )
        budget_N, blend_coef_N = golden[f"{i}_kl_budget"].double(), golden[f"{i}_blend_coef"]
        tolerance_N = (1e-3 * blend_coef_N).clamp_min(1e-6)
        assert ((result["blend_coef"] - blend_coef_N).abs() <= tolerance_N).all(), case["name"]

        limit_N = budget_N + (1e-3 * budget_N).clamp_min(2e-9)
        logp_NV, logq_NV = (x.double().log_softmax(-1) for x in (student_NV, teacher_NV))
        from_coef_NV = blend_logprobs(student_NV, teacher_NV, result["blend_coef"])
        # fp32 log-probabilities sum to 1 within 1e-6 only: renormalize.
        from_logprobs_NV = result["logprobs"].double().log_softmax(-1)
        for logmu_NV in (from_coef_NV, from_logprobs_NV):
            assert (kl(logmu_NV, logp_NV) <= limit_N).all(), case["name"]
        torch.testing.assert_close(
            result["logprobs"].double(), from_coef_NV, rtol=1e-6, atol=5e-6, msg=case["name"]
        )
        # The blend coefficient is an fp32 number, which allows 6e-4 in KL where logits reach 1e4.
        for found_N, key, rtol, atol in (
            (result["kl_student"].double(), "kl_behavior_student", 1e-3, 2e-7),
            (kl(from_logprobs_NV, logq_NV), "kl_behavior_teacher", 1e-4, 1e-6),
            (entropy(from_logprobs_NV), "behavior_entropy", 1e-3, 1e-6),
        ):
            torch.testing.assert_close(found_N, golden[f"{i}_{key}"], rtol=rtol, atol=atol)


def test_losses_and_gradients(results: list[tuple[Any, Any]]) -> None:
    cases, golden = load("losses")
    assert sum(len(case["losses"]) for case in cases) == 32
    for case in cases:
        i = case["case"]
        for name in case["losses"]:
            result = results[0][1][i, name]
            value_N, grad_NV = golden[f"{i}_{name}_value"], golden[f"{i}_{name}_grad"]
            assert ((result["value"] - value_N).abs() <= 1e-5).all(), (i, name)
            assert (result["grad"] - grad_NV).abs().max() <= 5e-6 * grad_NV.abs().max(), (i, name)
            for model in ("student", "teacher"):
                mass_N = golden[f"{i}_support_mass_{model}"]
                assert ((result[f"{model}_topk_mass"] - mass_N).abs() <= 1e-6).all(), (i, name)
