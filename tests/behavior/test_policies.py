"""SKD and teacher policies: against dense twins at TP 1 to 16, and the same at every layout."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.layouts import LAYOUTS, SKD_TEMPERATURE, SKD_TOP_K, Layout, ProbeResult
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import ShardWidthGuard, vocab_shard
from tests.reference import DenseBehavior, dense_skd, dense_teacher
from tests.tiny import END_OF_TEXT, IM_END, TOKENIZER_SIZE
from trb_megatron.behavior.policies import (
    BlendPolicy,
    GuidedPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    is_in_topk,
)
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.distributed.vocab_parallel import all_gather, mask_invalid
from trb_megatron.uniforms import position_keys, rollout_key

NUM_ROWS, NUM_VALID, NUM_IDS = 6, 21, 23
TEMPERATURE = 0.7
ALIGNMENT = StopAlignment((18, 2), (2, 9))
KEPT_IDS = [i for i in range(NUM_VALID) if i not in ALIGNMENT.removed_ids]
TRIVIAL = StopAlignment((0,), (0,))
SKD_CASES = [(1, 0.2), (5, 1.0), (5, TEMPERATURE), (len(KEPT_IDS), 0.6)]


def build_logits() -> tuple[Tensor, Tensor]:
    """Student and teacher [N, V]; the teacher has many ties, padding holds garbage."""
    generator = torch.Generator().manual_seed(3)
    student_NV = 2 * torch.randn(NUM_ROWS, NUM_IDS, generator=generator)
    teacher_NV = (2 * torch.randn(NUM_ROWS, NUM_IDS, generator=generator)).round()
    student_NV[:, NUM_VALID:], teacher_NV[:, NUM_VALID:] = torch.nan, torch.inf
    return student_NV, teacher_NV


def align_by_definition(logits_NV: Tensor, own_ids: tuple[int, ...], temperature: float) -> Tensor:
    """Tempered float64 logits of the ids that exist, own stop ids merged into one."""
    tempered_NV = logits_NV.double() / temperature
    tempered_NV[:, ALIGNMENT.stop_id] = tempered_NV[:, own_ids].logsumexp(-1)
    return tempered_NV[:, KEPT_IDS]


def dense_guidance(policy: GuidedPolicy) -> DenseBehavior:
    """What an SKD or teacher policy is by definition, over KEPT_IDS."""
    student_NV, teacher_NV = build_logits()
    student_NV = align_by_definition(student_NV, ALIGNMENT.student_ids, TEMPERATURE)
    aligned_NV = align_by_definition(teacher_NV, ALIGNMENT.teacher_ids, TEMPERATURE)
    if isinstance(policy, TeacherPolicy):
        return dense_teacher(student_NV, aligned_NV)
    assert isinstance(policy, SKDPolicy)
    fresh_NV = align_by_definition(teacher_NV, ALIGNMENT.teacher_ids, policy.teacher_temperature)
    return dense_skd(student_NV, aligned_NV, fresh_NV, policy.top_k)


def shared_options(**changes: Any) -> dict[str, Any]:
    """What all policies are given, at the temperature of these tests."""
    return {
        "temperature": TEMPERATURE,
        "num_valid": NUM_VALID,
        "alignment": ALIGNMENT,
        "tp_group": None,
        **changes,
    }


def build_policies(group: dist.ProcessGroup | None) -> list[GuidedPolicy]:
    shared = shared_options(tp_group=group)
    skd = [SKDPolicy(top_k=k, teacher_temperature=tau, **shared) for k, tau in SKD_CASES]
    return [*skd, TeacherPolicy(**shared)]


# The checks below run on one rank and on several.


class Solved(NamedTuple):
    """A `Guidance` with its shards put together."""

    logprobs_3NV: Tensor  # log p, log q and log mu
    blend_coef_N: Tensor
    kl_student_N: Tensor


def solve_all() -> list[Solved]:
    """The guidance of every policy."""
    group = current_group()
    shards = [vocab_shard(full_NV, group) for full_NV in build_logits()]
    found = []
    for policy in build_policies(group):
        guidance = policy.solve(*shards)
        student_NU, teacher_NU = guidance.student.logprobs(), guidance.teacher.logprobs()
        shards_R3NU = all_gather(torch.stack((student_NU, teacher_NU, guidance.behavior_NU)), group)
        full_3NV = torch.cat(list(shards_R3NU), dim=-1)
        found.append(Solved(full_3NV, guidance.blend_coef_N, guidance.kl_student_N))
    return found


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_guidance_is_that_of_a_dense_computation(tp_size: int) -> None:
    for result in on_ranks(solve_all, tp_size):
        for policy, guidance in zip(build_policies(None), result, strict=True):
            expected = dense_guidance(policy)
            behavior_NV = guidance.logprobs_3NV[2, :, KEPT_IDS].double()
            torch.testing.assert_close(behavior_NV, expected.logprobs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                guidance.kl_student_N.double(), expected.kl_student, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                guidance.blend_coef_N.double(), expected.blend_coef, equal_nan=True
            )
            absent = [i for i in range(NUM_IDS) if i not in KEPT_IDS]
            assert (guidance.logprobs_3NV[:, :, absent] == -torch.inf).all()


def find_ties() -> Tensor:
    """Membership where equal logits lie on both sides of a cut."""
    group = current_group()
    ties_NV = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0, 3.0, 3.0]])
    ties_NU = mask_invalid(vocab_shard(ties_NV, group), 6, group)
    return torch.cat(list(all_gather(is_in_topk(ties_NU, 3, tp_group=group), group)), dim=-1)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_ties_of_the_top_k_go_to_the_lowest_ids(tp_size: int) -> None:
    for is_in_NV in on_ranks(find_ties, tp_size):
        assert is_in_NV[:, :6].int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]]
        assert not is_in_NV[:, 6:].any()


def guard_widths() -> None:
    """Solve without any tensor beyond the shard."""
    group = current_group()
    generator = torch.Generator().manual_seed(0)
    student_NU, teacher_NU = (
        vocab_shard(torch.randn(4, 700, generator=generator), group) for _ in range(2)
    )
    shared = shared_options(temperature=1.0, num_valid=690, tp_group=group)
    policy = SKDPolicy(top_k=50, teacher_temperature=0.6, **shared)
    with ShardWidthGuard(torch.empty(3 * 5, student_NU.shape[-1] + 1)):
        policy.solve(student_NU, teacher_NU)


def test_nothing_exceeds_the_shard() -> None:
    on_ranks(guard_widths, 2)


def test_skd_that_keeps_every_draw_is_the_student() -> None:
    policy = build_policies(None)[len(SKD_CASES) - 1]
    assert isinstance(policy, SKDPolicy) and policy.top_k == len(KEPT_IDS)
    student_NU, teacher_NU = build_logits()
    guidance = policy.solve(student_NU, teacher_NU)
    assert torch.equal(guidance.behavior_NU, guidance.student.logprobs())
    assert (guidance.kl_student_N == 0).all()


def test_a_top_k_beyond_the_ids_that_exist_is_refused() -> None:
    shared = shared_options(temperature=1.0)
    policy = SKDPolicy(top_k=len(KEPT_IDS) + 1, teacher_temperature=1.0, **shared)
    with pytest.raises(ValueError, match=f"top_k={len(KEPT_IDS) + 1} exceeds the number of valid"):
        policy.solve(*build_logits())


def test_a_draw_among_the_likely_ids_is_always_kept() -> None:
    policy = SKDPolicy(top_k=5, teacher_temperature=1.0, **shared_options())
    student_NU, teacher_NU = (
        logits_NV.repeat_interleave(2000, dim=0) for logits_NV in build_logits()
    )
    rows = torch.arange(len(student_NU))
    key_N = position_keys(rollout_key(0, 0, rows, 0), torch.tensor(0))
    proposal = policy.propose(student_NU, key_N)
    proposed_N = proposal.token_ids
    token_ids_N, record = policy.draw(proposal, student_NU, teacher_NU, key_N)
    aligned_NU = policy.solve(student_NU, teacher_NU).teacher.logits_NU
    is_likely_N = is_in_topk(aligned_NU, 5, tp_group=None).gather(1, proposed_N[:, None])[:, 0]
    assert record.accepted[is_likely_N].all() and is_likely_N.any()
    assert torch.equal(token_ids_N[record.accepted], proposed_N[record.accepted])
    assert not record.accepted.all()


def test_least_acceptance() -> None:
    shared = shared_options(temperature=1.0)
    assert StudentPolicy(**shared).least_acceptance == 1.0
    assert BlendPolicy(kl_budget=0.02, **shared).least_acceptance == pytest.approx(0.9)
    assert BlendPolicy(kl_budget=9.0, **shared).least_acceptance == 0.0
    assert all(policy.least_acceptance == 0.0 for policy in build_policies(None))


@pytest.mark.parametrize("kl_budget", [0.001, 0.005, 0.01, 0.02, 0.05, 0.5])
def test_acceptance_of_the_worst_models_meets_the_bound(kl_budget: float) -> None:
    """Where the teacher favors half of the student's mass, Pinsker's inequality is almost tight."""
    shared = shared_options(temperature=1.0, num_valid=20, alignment=TRIVIAL)
    policy = BlendPolicy(kl_budget=kl_budget, **shared)
    rows = torch.arange(40_000)
    key_N = position_keys(rollout_key(0, 0, rows, 0), torch.tensor(0))
    student_NU = torch.zeros(len(rows), 20)
    teacher_NU = student_NU + 9.0 * (torch.arange(20) % 2)
    proposal = policy.propose(student_NU, key_N)
    _, record = policy.draw(proposal, student_NU, teacher_NU, key_N)
    acceptance = float(record.accepted.double().mean())
    error = (acceptance * (1 - acceptance) / len(rows)) ** 0.5
    assert policy.least_acceptance - 3 * error < acceptance
    assert acceptance < policy.least_acceptance + 0.15 * kl_budget + 3 * error


@pytest.fixture(scope="module")
def hf_models(probe_config: Path) -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(
            probe_config.parent / name, dtype=torch.float32
        ).eval()
        for name in ("student", "teacher")
    }


def _dense_logits(model: Any, row: dict[str, Any], own_ids: tuple[int, ...], tau: float) -> Tensor:
    """Tempered float64 logits [len(response), tokenizer_size], own stop ids merged into one."""
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
    logits = logits[len(row["prompt_ids"]) - 1 : -1, :TOKENIZER_SIZE].double() / tau
    logits[:, END_OF_TEXT] = logits[:, own_ids].logsumexp(-1)
    logits[:, IM_END] = -1e9
    return logits


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("policy", ["skd", "teacher"])
def test_records_are_those_of_a_dense_computation(
    probe_results: dict[Layout, ProbeResult],
    hf_models: dict[str, Any],
    layout: Layout,
    policy: str,
) -> None:
    rows = probe_results[layout].rollouts[policy]
    assert not all(row["record"]["accepted"].all() for row in rows)
    for row in rows[::4]:
        stops = (IM_END, END_OF_TEXT)
        student = _dense_logits(hf_models["student"], row, (END_OF_TEXT,), 1.0)
        teacher = _dense_logits(hf_models["teacher"], row, stops, 1.0)
        expected = dense_teacher(student, teacher)
        if policy == "skd":
            fresh = _dense_logits(hf_models["teacher"], row, stops, SKD_TEMPERATURE)
            expected = dense_skd(student, teacher, fresh, SKD_TOP_K)
        ids = torch.tensor(row["response_ids"])[:, None]
        record = row["record"]
        for name, found in (
            ("student_logprobs", student.log_softmax(-1).gather(1, ids)[:, 0]),
            ("teacher_logprobs", teacher.log_softmax(-1).gather(1, ids)[:, 0]),
            ("behavior_logprobs", expected.logprobs.gather(1, ids)[:, 0]),
            ("kl_student", expected.kl_student),
            ("blend_coef", expected.blend_coef),
        ):
            torch.testing.assert_close(
                record[name].double(), found, rtol=1e-3, atol=1e-4, equal_nan=True
            )
