"""NaN and infinities planted in a step of a pipeline of two stages: what is said, and done."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.layouts import write_inputs
from tests.ranks import run_distributed
from tests.runs import make_trainer
from trb_megatron.batch import Microbatch, Rollout, build_microbatch

WORLD_SIZE = 2  # two stages: the last one alone sees logits
ROUND, ROW = 2, 1  # where a NaN is planted in the logits of rollouts
LOSS_ROW = 5
FAULTS = (
    "student logits",
    "teacher logits",
    "behavior policy",
    "student loss logits",
    "teacher loss logits",
    "loss",
    "gradient",
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("nonfinite"))


@pytest.fixture(scope="module")
def seen(config_file: Path) -> list[dict[str, Any]]:
    return run_distributed(_run_all, WORLD_SIZE, config_file, timeout_s=240)


def _run_all(config_file: Path) -> dict[str, Any]:
    """Messages of each fault, and what happens in a run that may skip one step."""
    options = ("parallel.pipeline_model_parallel_size=2", "behavior.schedule=constant")
    run_dir = f"run.dir={config_file.parent}/run"
    trainer = make_trainer(config_file, (*options, run_dir))
    before = _weights(trainer)
    seen: dict[str, Any] = {"messages": {}}
    for fault in FAULTS:
        with _plant(fault, trainer), pytest.raises(RuntimeError) as caught:
            trainer.train_step()
        seen["messages"][fault] = str(caught.value)
    seen["untouched"] = torch.equal(_weights(trainer), before)
    seen["prompts"] = [prompt.index for prompt in trainer.prompts()]

    options = (*options, "training.max_nonfinite_steps=1", "checkpoint.every=1")
    trainer = make_trainer(config_file, (*options, f"run.dir={config_file.parent}/skipping"))
    with _plant("student logits", trainer):
        seen["skipped"] = trainer.train_step()
    seen["untouched by skipped"] = torch.equal(_weights(trainer), before)
    trainer.save()
    trainer.lock.close()
    trainer = make_trainer(config_file, (*options, f"run.dir={config_file.parent}/skipping"))
    seen["next"] = trainer.train_step()
    seen["updated"] = not torch.equal(_weights(trainer), before)
    with _plant("gradient", trainer), pytest.raises(RuntimeError) as caught:
        trainer.train_step()
    seen["too many"] = str(caught.value)
    return seen


def _weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.models.student.parameters()])


@contextmanager
def _plant(fault: str, trainer: Any) -> Iterator[None]:
    """Spoil one place of the next step; only the last stage comes by."""
    from trb_megatron.update.gradients import StepGradients

    models, loss = trainer.models, StepGradients.loss

    def spoil_hidden(gradients: Any, hidden_NH: torch.Tensor, microbatch: Microbatch) -> Any:
        row = torch.tensor([LOSS_ROW])
        return loss(gradients, hidden_NH.index_fill(0, row, torch.nan), microbatch)

    def spoil_teacher(gradients: Any, hidden_NH: torch.Tensor, microbatch: Microbatch) -> Any:
        assert microbatch.teacher_hidden_NH is not None
        spoilt_NH = microbatch.teacher_hidden_NH.clone()
        spoilt_NH[LOSS_ROW] = torch.nan
        return loss(gradients, hidden_NH, replace(microbatch, teacher_hidden_NH=spoilt_NH))

    def spoil_value(gradients: Any, hidden_NH: torch.Tensor, microbatch: Microbatch) -> Any:
        from trb_megatron.loss.fused import FusedLossOutput

        per_token_N = hidden_NH.sum(dim=-1).detach().index_fill(0, torch.tensor([2]), torch.nan)
        output = FusedLossOutput(hidden_NH.sum() * torch.nan, per_token_N, {})
        with mock.patch("trb_megatron.update.gradients.fused_loss", return_value=output):
            return loss(gradients, hidden_NH, microbatch)

    def spoil_gradient(gradients: Any, hidden_NH: torch.Tensor, microbatch: Microbatch) -> Any:
        hidden_NH.register_hook(lambda gradient: gradient * torch.nan)
        return loss(gradients, hidden_NH, microbatch)

    faults: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "student logits": lambda: _spoil_rows(models.student, "project", torch.nan),
        "teacher logits": lambda: _spoil_rows(models.teacher, "project", torch.inf),
        "behavior policy": _spoil_blend,
        "student loss logits": lambda: mock.patch.object(StepGradients, "loss", spoil_hidden),
        "teacher loss logits": lambda: mock.patch.object(StepGradients, "loss", spoil_teacher),
        "loss": lambda: mock.patch.object(StepGradients, "loss", spoil_value),
        "gradient": lambda: mock.patch.object(StepGradients, "loss", spoil_gradient),
    }
    with faults[fault]():
        yield


@contextmanager
def _spoil_rows(owner: Any, method: str, value: float) -> Iterator[None]:
    original, count = getattr(owner, method), 0

    def spoilt(*args: Any) -> torch.Tensor:
        nonlocal count
        result_NU = original(*args)
        if count == ROUND:
            result_NU[ROW] = value
        count += 1
        return result_NU

    with mock.patch.object(owner, method, spoilt):
        yield


def _spoil_blend() -> AbstractContextManager[None]:
    from trb_megatron.behavior.solver import Behavior

    return _spoil_rows(Behavior, "logprobs", torch.nan)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("student logits", "student logits hold a NaN at token {token}"),
        ("teacher logits", r"teacher logits hold a \+inf at token {token}"),
        ("behavior policy", "the behavior policy is not finite at token {token}"),
    ],
)
def test_rollouts_name_tensor_and_prompt(
    seen: list[dict[str, Any]], fault: str, problem: str
) -> None:
    expected = problem.format(token=r"\d+") + r" of rollout [01] of prompt (\d+), on rank 1;"
    _check_message(seen, fault, expected)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("student loss logits", "student logits hold a NaN"),
        ("teacher loss logits", "teacher logits hold a NaN"),
        ("loss", "the loss is not finite"),
    ],
)
def test_loss_names_tensor_and_prompt(seen: list[dict[str, Any]], fault: str, problem: str) -> None:
    _check_message(seen, fault, problem + r" at token \d+ of rollout [01] of prompt (\d+), on rank")


def test_gradient_names_parameter_and_prompts(seen: list[dict[str, Any]]) -> None:
    # Both stages have the NaN; the first rank speaks.
    _check_message(
        seen,
        "gradient",
        r"the gradient of [\w.]*weight is not finite \(prompts (\d+).*\), on rank 0",
    )


def _check_message(seen: list[dict[str, Any]], fault: str, pattern: str) -> None:
    message = seen[0]["messages"][fault]
    found = re.match("step 0: " + pattern, message)
    assert found, message
    assert int(found[1]) in seen[0]["prompts"]
    assert message.endswith("; nothing was updated")
    assert message == seen[1]["messages"][fault]


def test_nothing_is_updated(seen: list[dict[str, Any]]) -> None:
    assert all(rank["untouched"] for rank in seen)


def test_a_limited_number_of_steps_is_skipped(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["untouched by skipped"]
        assert math.isnan(rank["skipped"]["loss"])
        assert rank["skipped"]["optim/skipped_steps"] == 1
        # The count outlives a restart.
        assert rank["next"]["optim/skipped_steps"] == 1
        assert math.isfinite(rank["next"]["loss"])
        assert rank["updated"]
        assert "training.max_nonfinite_steps=1 steps were skipped before" in rank["too many"]


def test_a_loss_position_is_described() -> None:
    rollouts = [
        Rollout(4, 1, (7, 8, 9), (1, 2), stopped=False),
        Rollout(6, 0, (7,), (1, 2, 3), stopped=True),
    ]
    microbatch = build_microbatch(rollouts, torch.device("cpu"), length_multiple=4)
    described = [microbatch.describe(n) for n in range(5)]
    assert described == [
        "token 0 of rollout 1 of prompt 4",
        "token 1 of rollout 1 of prompt 4",
        "token 0 of rollout 0 of prompt 6",
        "token 1 of rollout 0 of prompt 6",
        "token 2 of rollout 0 of prompt 6",
    ]
