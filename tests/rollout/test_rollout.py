"""Rollouts: the same at every layout, equal to naive loops, and recorded as they were drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.layouts import LAYOUTS, ONE_RANK, PROBE_POLICIES, Layout, ProbeResult
from tests.reference import dense_blend
from tests.tiny import END_OF_TEXT, IM_END, TOKENIZER_SIZE

BUDGET = 0.05


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("policy", PROBE_POLICIES)
def test_same_tokens_at_every_layout_number_of_slots_and_draft_length(
    probe_results: dict[Layout, ProbeResult], layout: Layout, policy: str
) -> None:
    keys = ("prompt_index", "rollout_index", "prompt_ids", "response_ids", "stopped")
    one, other = (
        [{key: row[key] for key in keys} for row in probe_results[which].rollouts[policy]]
        for which in (ONE_RANK, layout)
    )
    assert one == other


def test_small_caches_are_too_small(probe_results: dict[Layout, ProbeResult]) -> None:
    """What is compared above is compared after preemption, too."""
    for layout, result in probe_results.items():
        is_small = any("cache_gb" in override for override in layout.overrides)
        assert (result.preemptions["blend"] > 0) == is_small


def test_rollouts_of_a_prompt_differ_and_policies_differ(
    probe_results: dict[Layout, ProbeResult],
) -> None:
    rollouts = probe_results[ONE_RANK].rollouts
    assert len({row["response_ids"] for row in rollouts["student"]}) > 20
    assert len({row["response_ids"] for row in rollouts["greedy"]}) <= 8  # three alike per prompt
    assert rollouts["student"] != rollouts["blend"]


def test_responses_end_with_a_stop_id_or_at_the_limit(
    probe_results: dict[Layout, ProbeResult],
) -> None:
    rows = [row for rows in probe_results[ONE_RANK].rollouts.values() for row in rows]
    assert any(row["stopped"] for row in rows) and not all(row["stopped"] for row in rows)
    for row in rows:
        *body, last = row["response_ids"]
        assert END_OF_TEXT not in body
        assert row["stopped"] == (last == END_OF_TEXT)
        assert row["stopped"] or len(row["response_ids"]) == 12


@pytest.fixture(scope="module")
def hf_models(probe_config: Path) -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(
            probe_config.parent / name, dtype=torch.float32
        ).eval()
        for name in ("student", "teacher")
    }


def test_greedy_equals_a_loop_that_recomputes_everything(
    probe_results: dict[Layout, ProbeResult], hf_models: dict[str, Any]
) -> None:
    for row in probe_results[ONE_RANK].rollouts["greedy"][::3]:
        ids = list(row["prompt_ids"])
        response: list[int] = []
        while len(response) < 12 and END_OF_TEXT not in response:
            with torch.no_grad():
                logits = hf_models["student"](torch.tensor([ids + response])).logits[0, -1]
            response.append(int(logits[:TOKENIZER_SIZE].argmax()))
        assert tuple(response) == row["response_ids"]


def _dense_logits(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """fp64 logits [len(response), tokenizer_size] at the positions that predict the response."""
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
    return logits[len(row["prompt_ids"]) - 1 : -1, :TOKENIZER_SIZE].double()


def _aligned(logits: torch.Tensor, own_ids: tuple[int, ...]) -> torch.Tensor:
    """Stopping as one event: END_OF_TEXT takes the mass of the own ids, IM_END is removed."""
    merged = logits.clone()
    merged[:, END_OF_TEXT] = logits[:, own_ids].logsumexp(-1)
    merged[:, IM_END] = -1e9
    return merged


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blend_records_are_those_of_a_dense_solution(
    probe_results: dict[Layout, ProbeResult], hf_models: dict[str, Any], layout: Layout
) -> None:
    for row in probe_results[layout].rollouts["blend"][::4]:
        student = _aligned(_dense_logits(hf_models["student"], row), (END_OF_TEXT,))
        teacher = _aligned(_dense_logits(hf_models["teacher"], row), (IM_END, END_OF_TEXT))
        expected = dense_blend(student, teacher, torch.full((len(student),), BUDGET).double())
        record = row["record"]
        ids = torch.tensor(row["response_ids"])[:, None]
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(
            record["blend_coef"].double(), expected.blend_coef, rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(record["kl_student"].double(), expected.kl_student, **close)
        for name, logprobs in (
            ("student", student.log_softmax(-1)),
            ("teacher", teacher.log_softmax(-1)),
            ("behavior", expected.logprobs),
        ):
            torch.testing.assert_close(
                record[f"{name}_logprobs"].double(), logprobs.gather(1, ids)[:, 0], **close
            )
        assert (record["kl_student"] <= BUDGET * (1 + 1e-3)).all()
        # A token that the student did not propose is one that the blend makes more likely.
        is_likelier = record["behavior_logprobs"] >= record["student_logprobs"] - 1e-5
        assert (record["accepted"] | is_likelier).all()


def test_acceptance_keeps_its_bound(probe_results: dict[Layout, ProbeResult]) -> None:
    """At least 1 - sqrt(budget / 2) by Pinsker's inequality, beyond sampling error."""
    for result in probe_results.values():
        accepted = torch.cat([row["record"]["accepted"] for row in result.rollouts["blend"]])
        error = 0.5 / len(accepted) ** 0.5
        assert 1 - (BUDGET / 2) ** 0.5 - 3 * error < accepted.double().mean() < 1


def test_drafts_save_teacher_calls(probe_results: dict[Layout, ProbeResult]) -> None:
    def calls_per_token(rows: list[dict[str, Any]]) -> float:
        return sum(r["teacher_calls"] for r in rows) / sum(len(r["response_ids"]) for r in rows)

    for layout, result in probe_results.items():
        calls = calls_per_token(result.rollouts["blend"])
        if layout == ONE_RANK:  # rollout.draft_tokens: 0
            assert calls == 1.0
        elif "rollout.draft_tokens=8" in layout.overrides:
            assert calls < 0.35
        assert calls_per_token(result.rollouts["student"]) == 0


def test_student_records_have_no_teacher(probe_results: dict[Layout, ProbeResult]) -> None:
    for row in probe_results[ONE_RANK].rollouts["student"]:
        record = row["record"]
        assert record["teacher_logprobs"].isnan().all()
        assert (record["blend_coef"] == 0).all() and (record["kl_student"] == 0).all()
        assert torch.equal(record["behavior_logprobs"], record["student_logprobs"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_teacher_is_called_only_while_the_budget_lasts(
    probe_results: dict[Layout, ProbeResult], layout: Layout
) -> None:
    first, second, third = probe_results[layout].teacher_calls
    assert first > 0 and second > 0
    assert third == 0  # behavior.warmup_steps: 2
