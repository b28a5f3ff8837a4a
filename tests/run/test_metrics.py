"""Metrics files, the progress bar and the meters."""

import io
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trb_megatron.config.options import Config
from trb_megatron.config.reading import parse_config
from trb_megatron.run.metrics import MetricsLogger, PeakMemory, PhaseTimer, Progress


@pytest.fixture
def config() -> Config:
    sections = ("student", "teacher", "data")
    return parse_config({"run": {"dir": "r"}, **{name: {"path": name} for name in sections}})


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_rows_are_on_disk_at_once_and_valid_json(tmp_path: Path, config: Config) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=True, wandb_project=None, config=config)
    logger.log(1, {"loss": 0.5, "reward": None, "tokens": 7})
    logger.log(2, {"loss": float("nan"), "reward": float("inf")})
    assert read_rows(tmp_path) == [
        {"step": 1, "loss": 0.5, "reward": None, "tokens": 7},
        {"step": 2, "loss": None, "reward": None},
    ]
    logger.close()
    assert read_curve(tmp_path, "loss") == [(1, 0.5)]


def test_tensorboard_can_be_left_out(tmp_path: Path, config: Config) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=False, wandb_project=None, config=config)
    logger.log(1, {"loss": 0.5})
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_run_has_no_duplicates(tmp_path: Path, config: Config) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=True, wandb_project=None, config=config)
    for step in range(1, 6):
        logger.log(step, {"loss": float(step)})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 6, "lo')  # the crash

    resumed = MetricsLogger(tmp_path, tensorboard=True, wandb_project=None, config=config)
    resumed.truncate_after(3)
    for step in (4, 5):
        resumed.log(step, {"loss": 10.0 * step})
    resumed.close()
    curve = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == curve
    assert read_curve(tmp_path, "loss") == curve


def test_missing_wandb_says_what_to_do(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb_project=trb.*pip install wandb"):
        MetricsLogger(tmp_path, tensorboard=False, wandb_project="trb", config=config)


def test_wandb_run_is_resumed_under_its_id(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(**options: Any) -> Any:
        starts.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (1, 2):
        logger = MetricsLogger(tmp_path, tensorboard=False, wandb_project="trb", config=config)
        logger.log(step, {"loss": 0.5, "reward": None})
        logger.close()
    assert logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    assert starts[0]["config"]["loss"]["top_k"] == 16


def test_plain_progress_is_one_line_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress(num_steps=10, num_done=2, file=out) as progress:
        now += 500.0
        progress.leave_out_time()  # of an evaluation
        now += 60.0
        progress.update(3, loss=0.25, reward=0.5, tokens_per_s=1234.4)
        now += 500.0
        progress.leave_out_time()
        now += 30.0
        progress.update(4, loss=0.125, reward=None, tokens_per_s=10)
        progress.write("saved")
    assert out.getvalue().splitlines() == [
        "step 3/10 | loss 0.2500 | reward 0.500 | 1,234 tokens/s | 07:00 left",
        "step 4/10 | loss 0.1250 | 10 tokens/s | 04:30 left",
        "saved",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal() -> None:
    out = Terminal()
    with Progress(num_steps=10, num_done=2, file=out) as progress:
        for num_done in (3, 4, 5):
            progress.update(num_done, loss=0.25, reward=0.5, tokens_per_s=1234)
        progress.write("saved\n")
    last = out.getvalue().split("\r")[-1]
    assert "5/10" in last and "loss 0.2500 | reward 0.500 | 1,234 tokens/s" in last
    assert "saved" in out.getvalue()


def test_timer_attributes_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer()
    now += 1
    with timer.phase("rollout"):
        now += 2
        with timer.phase("teacher"):
            now += 4
        now += 8
    with pytest.raises(RuntimeError), timer.phase("train"):
        now += 16
        raise RuntimeError
    now += 32
    assert timer.finish_step() == {
        "rollout": 10, "teacher": 4, "train": 16, "other": 33, "step": 63
    }  # fmt: skip
    now += 1
    assert timer.finish_step() == {"rollout": 0, "teacher": 0, "train": 0, "other": 1, "step": 1}


def test_peak_memory_is_that_of_the_step_and_of_the_run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = PeakMemory()
    before = memory.finish_step()
    assert 0 <= before["step"] <= before["run"] < 1000
    block = torch.ones(200_000_000, dtype=torch.uint8, device=device)
    assert block[-1] == 1
    large = memory.finish_step()
    del block
    memory.finish_step()  # began while the block was there
    small = memory.finish_step()
    assert large["step"] >= small["step"] + 0.18
    assert small["run"] >= large["step"] > before["step"] - 0.001


def test_peak_of_a_step_is_unknown_where_it_cannot_start_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peaks = PeakMemory().finish_step()
    assert math.isnan(peaks["step"]) and 0 < peaks["run"] < 1000
