"""Which budget, and which policy, an optimizer step has."""

from typing import Any

import pytest

from trb_megatron.behavior.policies import (
    BlendPolicy,
    Policy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
)
from trb_megatron.behavior.schedule import kl_budget_at, policy_of_step
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.config.reading import parse_config

ALIGNMENT = StopAlignment((3,), (5,))
SHARED: dict[str, Any] = {
    "temperature": 0.7,
    "num_valid": 21,
    "alignment": ALIGNMENT,
    "tp_group": None,
}


def test_schedule() -> None:
    assert [kl_budget_at(k, 0.02, 4, "linear") for k in range(6)] == [
        *(0.02, 0.015, 0.01, 0.005),
        *(0, 0),
    ]
    assert [kl_budget_at(k, 0.02, 2, "constant") for k in range(4)] == [0.02, 0.02, 0, 0]
    assert kl_budget_at(0, 0.02, 0, "linear") == 0
    for arguments in ((0, -1.0, 4), (0, float("nan"), 4), (-1, 0.1, 4), (0, 0.1, -4)):
        for schedule in ("linear", "constant"):
            with pytest.raises(ValueError):
                kl_budget_at(*arguments, schedule)
    with pytest.raises(ValueError, match="cosine"):
        kl_budget_at(0, 0.1, 4, "cosine")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("trb", BlendPolicy(kl_budget=0.015, **SHARED)),
        ("skd", SKDPolicy(top_k=7, teacher_temperature=0.6, **SHARED)),
        ("teacher", TeacherPolicy(**SHARED)),
    ],
)
def test_the_policy_of_a_step_is_the_configured_one_then_the_student(
    policy: str, expected: Policy
) -> None:
    behavior: dict[str, Any] = {"policy": policy, "warmup_steps": 4}
    behavior |= {"kl_budget": 0.02} if policy == "trb" else {}
    behavior |= {"skd_top_k": 7, "skd_temperature": 0.6} if policy == "skd" else {}
    sections = ("student", "teacher", "data")
    config = parse_config(
        {
            "run": {"dir": "r"},
            **{name: {"path": name} for name in sections},
            "rollout": {"temperature": 0.7},
            "behavior": behavior,
        }
    )
    found = [
        policy_of_step(step, config, num_valid=21, alignment=ALIGNMENT, tp_group=None)
        for step in (1, 4)
    ]
    assert found == [expected, StudentPolicy(**SHARED)]
