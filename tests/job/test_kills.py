"""Trainings killed with SIGKILL wherever they are: they resume, and end as if nothing had been."""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import WORLD_SIZE, Job
from tests.layouts import write_inputs
from tests.runs import read_metrics, weights_digest
from trb_megatron.checkpoint.checksums import find_damage
from trb_megatron.checkpoint.folders import find_checkpoints

SEED = 0
STEPS, SAVE_EVERY = 4, 2
OPTIONS = (
    *(f"training.steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", "checkpoint.keep=1"),
    *("training.prompts_per_step=2", "rollout.max_response_tokens=8"),
)
PHASES = ("rollout", "update", "save", "export")
VICTIMS = (*((rank,) for rank in range(WORLD_SIZE)), tuple(range(WORLD_SIZE)))


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed, and the job that did it."""

    run_dir: Path
    job: Job


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(config_file: Path) -> Undisturbed:
    run_dir = config_file.parent / "undisturbed"
    with Job(config_file, (*OPTIONS, f"run.dir={run_dir}"), config_file.parent / "job") as job:
        job.finish()
    return Undisturbed(run_dir, job)


def _wait_for_moment(
    phase: str, job: Job, run_dir: Path, expected: Undisturbed, moment: random.Random
) -> int:
    """Draw a step and a moment in its phase and wait for it; the rank that is waited for."""
    rank = moment.randrange(WORLD_SIZE)
    step = {
        "save": moment.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY),
        "export": STEPS,
    }.get(phase, moment.randrange(STEPS))
    job.wait_until(lambda: job.mark(rank) == (phase, step))
    seconds = expected.job.seconds(phase, step)
    if phase in ("save", "export"):  # measured by what is there, since it takes how long it likes
        name, last = (
            ("hf", "hf")
            if phase == "export"
            else (f"checkpoints/step_{step}", f"checkpoints/step_{STEPS}")
        )
        target, partial = run_dir / name, run_dir / f"{name}.partial"
        all_files = len(os.listdir(expected.run_dir / last))
        num_files = moment.randint(0, all_files + 1)
        job.wait_until(
            lambda: target.exists() or (partial.exists() and len(os.listdir(partial)) >= num_files)
        )
        seconds = min(0.01, seconds / (all_files + 1))  # until about the next file
    time.sleep(moment.uniform(0, seconds))
    return rank


def _kill_one_run(config_file: Path, undisturbed: Undisturbed, number: int, name: str) -> str:
    """Kill a training once, check what is left, resume it, check its end; the phase it died in."""
    moment = random.Random(f"{SEED}-{number}")
    aim = PHASES[number % len(PHASES)]
    run_dir = config_file.parent / name
    options = (*OPTIONS, f"run.dir={run_dir}")
    with Job(config_file, options, config_file.parent / f"{name}-killed") as killed:
        rank = _wait_for_moment(aim, killed, run_dir, undisturbed, moment)
        killed.kill(ranks := moment.choice([v for v in VICTIMS if rank in v]))
        phase, at = killed.mark(rank)
        where = f"{name}: ranks {ranks} in {phase or 'no phase'} at step {at}"

        checkpoints = find_checkpoints(run_dir)
        assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
        last_saved = max((int(c.name.split("_")[1]) for c in checkpoints), default=0)
        file = run_dir / "metrics.jsonl"
        last_done = file.read_text().count("\n") if file.exists() else 0
        assert 0 <= last_done - last_saved <= SAVE_EVERY, where

        with Job(config_file, options, config_file.parent / f"{name}-resumed") as resumed:
            resumed.finish()
    assert resumed.resumed_step() == last_saved, where
    assert weights_digest(run_dir / "hf") == weights_digest(undisturbed.run_dir / "hf"), where
    assert read_metrics(run_dir) == read_metrics(undisturbed.run_dir), where
    assert find_checkpoints(run_dir)[-1].name == f"step_{STEPS}", where
    assert not (run_dir / "hf.partial").exists(), where
    return phase


def _kill_runs(config_file: Path, undisturbed: Undisturbed, num_runs: int) -> Counter[str]:
    """How many runs died in each phase."""
    return Counter(
        _kill_one_run(config_file, undisturbed, i, f"run{i}of{num_runs}") for i in range(num_runs)
    )


def test_killed_runs_end_like_undisturbed_ones(config_file: Path, undisturbed: Undisturbed) -> None:
    _kill_runs(config_file, undisturbed, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_killed_runs_end_like_undisturbed_ones(
    config_file: Path, undisturbed: Undisturbed
) -> None:
    phases = _kill_runs(config_file, undisturbed, 30)
    assert all(phases[phase] >= 3 for phase in PHASES), phases
