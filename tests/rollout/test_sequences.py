"""Whole responses of the speculative engine follow the exact law of their policy.

Over a vocabulary of four ids, one of which stops, all responses of up to three tokens are listed
and their probabilities computed densely from transformers' logits; the engine must agree.
"""

import itertools
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.ranks import run_distributed
from tests.reference import dense_blend, dense_skd, dense_teacher
from tests.runs import load_frozen
from tests.tiny import make_checkpoint

NUM_IDS, STOP_ID, LENGTH, BUDGET = 4, 0, 3, 0.1
PROMPT = (1, 2, 3)
NUM_ROLLOUTS = 20_000
DRAFTS = (0, 1, 4)
SKD_TOP_K, SKD_TEMPERATURE = 2, 0.6

Counts = dict[tuple[int, ...], int]


def _always_accept(student_N: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(student_N, dtype=torch.bool)


def _sample(folder: Path) -> dict[str, Counts]:
    """How often each response was drawn: blended, by draft length; with a rule that always accepts;
    by the other policies."""
    from trb_megatron.config.options import ParallelConfig, RolloutConfig
    from trb_megatron.distributed.layout import initialize

    layout = initialize(ParallelConfig())

    from trb_megatron.behavior.policies import (
        BlendPolicy,
        Policy,
        SKDPolicy,
        TeacherPolicy,
    )
    from trb_megatron.behavior.stop_alignment import StopAlignment
    from trb_megatron.rollout.engine import RolloutEngine
    from trb_megatron.rollout.sequences import Request, ResponseSpec

    models = [load_frozen(folder / name, layout) for name in ("student", "teacher")]
    spec = ResponseSpec(max_response_tokens=LENGTH, stop_ids=(STOP_ID,), seed=3, step=0)
    shared: Any = {
        "temperature": 1.0,
        "num_valid": NUM_IDS,
        "alignment": StopAlignment((STOP_ID,), (STOP_ID,)),
        "tp_group": layout.tp_group,
    }
    blend = BlendPolicy(kl_budget=BUDGET, **shared)
    skd = SKDPolicy(top_k=SKD_TOP_K, teacher_temperature=SKD_TEMPERATURE, **shared)
    teacher = TeacherPolicy(**shared)
    requests = [Request(i, 0, PROMPT) for i in range(NUM_ROLLOUTS)]

    def count(drafts: int, policy: Policy = blend) -> Counts:
        config = RolloutConfig(max_sequences=4096, draft_tokens=drafts)
        engine = RolloutEngine(models[0], models[1], layout, config)
        return Counter(r.response_ids for r in engine.generate(requests, policy, spec))

    counts = {f"{drafts} drafts": count(drafts) for drafts in DRAFTS}
    with mock.patch("trb_megatron.behavior.coupling.accept_tokens", _always_accept):
        counts["always accept"] = count(1)
    return counts | {"skd": count(4, skd), "teacher": count(4, teacher)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    make_checkpoint(folder / "student", num_layers=1)
    make_checkpoint(folder / "teacher", seed=1, num_layers=2)
    return folder


@pytest.fixture(scope="module")
def counts(folder: Path) -> dict[str, Counts]:
    return run_distributed(_sample, 1, folder)[0]


@pytest.fixture(scope="module")
def probabilities(folder: Path) -> dict[str, dict[tuple[int, ...], float]]:
    """By policy, of every response: it stops, or it has LENGTH tokens."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name).eval()
        for name in ("student", "teacher")
    ]

    @cache
    def next_token(prefix: tuple[int, ...]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            student, teacher = (
                model(torch.tensor([PROMPT + prefix])).logits[0, -1:, :NUM_IDS].double()
                for model in models
            )
        behaviors = {
            "blend": dense_blend(student, teacher, torch.tensor([BUDGET]).double()),
            "skd": dense_skd(student, teacher, teacher / SKD_TEMPERATURE, SKD_TOP_K),
            "teacher": dense_teacher(student, teacher),
        }
        return {policy: behavior.logprobs[0].exp() for policy, behavior in behaviors.items()}

    def probability(policy: str, response: tuple[int, ...]) -> float:
        steps = (next_token(response[:i])[policy][token] for i, token in enumerate(response))
        return float(np.prod([float(p) for p in steps]))

    others = [i for i in range(NUM_IDS) if i != STOP_ID]
    responses = [
        (*body, last)
        for length in range(1, LENGTH + 1)
        for body in itertools.product(others, repeat=length - 1)
        for last in (range(NUM_IDS) if length == LENGTH else (STOP_ID,))
    ]
    found = {
        policy: {response: probability(policy, response) for response in responses}
        for policy in ("blend", "skd", "teacher")
    }
    assert all(sum(of_policy.values()) == pytest.approx(1) for of_policy in found.values())
    return found


def _p_value(counts: Counts, probabilities: dict[tuple[int, ...], float]) -> float:
    assert set(counts) <= set(probabilities)
    # Rare responses are counted together, as the chi-square approximation asks.
    common = [r for r, p in probabilities.items() if p * NUM_ROLLOUTS >= 10]
    observed = [counts.get(r, 0) for r in common]
    expected = [probabilities[r] * NUM_ROLLOUTS for r in common]
    observed.append(NUM_ROLLOUTS - sum(observed))
    expected.append(NUM_ROLLOUTS - sum(expected))
    kept = [(o, e) for o, e in zip(observed, expected, strict=True) if e >= 1]
    observed_kept, expected_kept = zip(*kept, strict=True)
    scale = sum(observed_kept) / sum(expected_kept)
    return float(chisquare(observed_kept, [e * scale for e in expected_kept]).pvalue)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_frequencies_of_all_responses_are_exact(
    counts: dict[str, Counts], probabilities: dict[str, dict[tuple[int, ...], float]], drafts: int
) -> None:
    assert _p_value(counts[f"{drafts} drafts"], probabilities["blend"]) > 1e-3


@pytest.mark.parametrize("policy", ["skd", "teacher"])
def test_frequencies_of_other_policies_are_exact(
    counts: dict[str, Counts], probabilities: dict[str, dict[tuple[int, ...], float]], policy: str
) -> None:
    assert _p_value(counts[policy], probabilities[policy]) > 1e-3
    assert _p_value(counts[policy], probabilities["blend"]) < 1e-6


def test_every_draft_length_draws_the_same_responses(counts: dict[str, Counts]) -> None:
    assert counts["0 drafts"] == counts["1 drafts"] == counts["4 drafts"]


def test_a_wrong_rule_is_noticed(
    counts: dict[str, Counts], probabilities: dict[str, dict[tuple[int, ...], float]]
) -> None:
    assert _p_value(counts["always accept"], probabilities["blend"]) < 1e-6
