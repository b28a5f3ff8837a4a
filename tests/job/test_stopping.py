"""A run that is asked to stop, by signals and by a file, three times, and its undisturbed twin."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.faults import Job
from tests.layouts import write_inputs
from tests.ranks import run_distributed
from tests.runs import make_trainer, read_metrics, weights_digest
from trb_megatron.checkpoint.checksums import find_damage
from trb_megatron.checkpoint.folders import find_checkpoints
from trb_megatron.checkpoint.training import read_training_state
from trb_megatron.job.stopping import STOP_FILE_VARIABLE

WORLD_SIZE = 2
STEPS = 5


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_file = write_inputs(tmp_path_factory.mktemp("stopping"))
    problems = [{"prompt": f"{n}+1=?", "answer": str(n + 1)} for n in range(3)]
    (config_file.parent / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return config_file


@pytest.fixture(scope="module")
def seen(config_file: Path) -> dict[str, Any]:
    """What the stopped run's folder held after each of its starts, as rank 0 saw it."""
    return run_distributed(_run_all, WORLD_SIZE, config_file, timeout_s=240)[0]


def _run_all(config_file: Path) -> dict[str, Any]:
    folder = config_file.parent
    _run(config_file, folder / "undisturbed", stop_in_step=None)
    stopped = folder / "stopped"
    seen = {}
    for name, step, number in (("USR1", 1, signal.SIGUSR1), ("TERM", 2, signal.SIGTERM)):
        _run(config_file, stopped, stop_in_step=step, number=number)
        seen[name] = _look_at(stopped)
    with mock.patch.dict(os.environ, {STOP_FILE_VARIABLE: str(folder / "stop")}):
        (folder / "stop").touch()
        _run(config_file, stopped, stop_in_step=None)
        seen["file"] = _look_at(stopped)
        seen["content of the file"] = (folder / "stop").read_text()
    _run(config_file, stopped, stop_in_step=None)
    return seen


def _run(
    config_file: Path, run_dir: Path, stop_in_step: int | None, number: int = signal.SIGUSR1
) -> None:
    """Train until the end or the stop; the signal reaches rank 1 alone."""
    from trb_megatron.evaluation.rewards import start_reward_workers
    from trb_megatron.trainer import Trainer

    overrides = (
        f"run.dir={run_dir}",
        f"training.steps={STEPS}",
        "checkpoint.every=100",
        "evaluation.every=2",
        "evaluation.at_start=true",
        "evaluation.at_end=true",
        f"evaluation.sets.sums.path={config_file.parent}/problems.jsonl",
        "rewards.workers=1",
    )
    roll_out = Trainer.rollout

    def signal_in_rollout(trainer: Trainer, *args: Any) -> Any:
        if trainer.step == stop_in_step and trainer.layout.dp_rank == 1:
            os.kill(os.getpid(), number)
        return roll_out(trainer, *args)

    trainer = make_trainer(config_file, overrides)
    with start_reward_workers(trainer.config.rewards, trainer.layout) as rewards:
        trainer.rewards = trainer.evaluator.rewards = rewards
        with mock.patch.object(Trainer, "rollout", signal_in_rollout):
            trainer.train()


def _look_at(run_dir: Path) -> dict[str, Any]:
    newest = find_checkpoints(run_dir)[-1]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoint": newest.name,
        "evaluation is due": read_training_state(newest).evaluation_is_due,
        "evaluated": [row["step"] for row in rows if "eval/sums/pass@1" in row],
        "exported": (run_dir / "hf").exists(),
    }


def test_stop_request_finishes_the_step_and_saves(seen: dict[str, Any]) -> None:
    # Step 2 is due for an evaluation, which waits; it is made up for at the next start.
    assert seen["USR1"] == {
        "checkpoint": "step_2",
        "evaluation is due": True,
        "evaluated": [0],
        "exported": False,
    }
    assert seen["TERM"] == {
        "checkpoint": "step_3",
        "evaluation is due": False,
        "evaluated": [0, 2],
        "exported": False,
    }
    assert seen["file"]["checkpoint"] == "step_4"
    assert seen["file"]["evaluation is due"]


def test_stop_file_says_that_the_run_has_steps_left(
    config_file: Path, seen: dict[str, Any]
) -> None:
    """The batch script reads it to know whether to start the run again (`launch/train.sbatch`)."""
    assert seen["content of the file"].startswith(
        f"stopped by {config_file.parent}/stop after step 4 of {STEPS};"
    )


def test_stopped_run_ends_as_if_never_stopped(config_file: Path, seen: dict[str, Any]) -> None:
    stopped, undisturbed = (config_file.parent / name for name in ("stopped", "undisturbed"))
    assert weights_digest(stopped / "hf") == weights_digest(undisturbed / "hf")
    assert read_metrics(stopped) == read_metrics(undisturbed)
    assert [row["step"] for row in read_metrics(stopped)] == list(range(STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_breaks_no_save(number: signal.Signals, tmp_path: Path) -> None:
    """A cluster or a terminal signals also what ranks have started; in a save, and after one."""
    config_file, run_dir = write_inputs(tmp_path), tmp_path / "run"
    partial = run_dir / "checkpoints/step_2.partial"
    options = (f"run.dir={run_dir}", f"training.steps={STEPS}", "checkpoint.keep=9")

    with Job(config_file, (*options, "checkpoint.every=2"), tmp_path / "in a save") as job:
        job.wait_until(lambda: partial.exists() and any(partial.glob("*.distcp")))
        job.signal_all(number)
        job.finish()
    assert [checkpoint.name for checkpoint in find_checkpoints(run_dir)] == ["step_2"]

    with Job(config_file, (*options, "checkpoint.every=1"), tmp_path / "after a save") as job:
        job.wait_until(lambda: job.mark(0) == ("update", 3))
        job.signal_all(number)
        job.finish()
    checkpoints = find_checkpoints(run_dir)
    assert [checkpoint.name for checkpoint in checkpoints] == ["step_2", "step_3", "step_4"]
    assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None, None, None]
