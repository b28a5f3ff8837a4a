"""Ctrl-C, as a terminal sends it: to the process group of the command that was typed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.layouts import write_inputs
from trb_megatron.checkpoint.folders import find_checkpoints
from trb_megatron.job.stopping import STOP_FILE_VARIABLE, STOPPED_STATUS
from trb_megatron.job.supervision import SAME_SIGNAL_S

NUM_RANKS = 2
TIMEOUT_S = 120
REPOSITORY = Path(__file__).parents[2]
RANKS_OF = {"python": 1, "torch.distributed.run": NUM_RANKS, "trb_megatron.launch": NUM_RANKS}
FIRST = "interrupted: finishing the step, then saving"
SECOND = "interrupted again: ended at once"


class Command:
    """A module on all ranks of a launcher ("python": without one), in a process group of its own.

    A shell that runs the tests in its background ignores SIGINT, and so would what they start.
    """

    def __init__(self, launcher: str, *module: str) -> None:
        options = () if launcher == "python" else (launcher, f"--nproc-per-node={NUM_RANKS}", "-m")
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", *options, *module],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,
        )

    def read_until(self, start: str, count: int = 1) -> list[str]:
        """The last words of the next `count` lines that begin so."""
        assert self.process.stdout is not None
        found: list[str] = []
        seen = ""
        while len(found) < count:
            line = self.process.stdout.readline()
            seen += line
            assert line, f"ended before {start!r}:\n{seen}"
            if line.startswith(start):
                found.append(line.split()[-1])
        return found

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def finish(self) -> tuple[int, str]:
        """Its exit status, and the rest of what it prints."""
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, output


def start_ranks(launcher: str, place: str, folder: Path) -> tuple[Command, list[int]]:
    """Ranks that are in a place of their run, and their process ids."""
    command = Command(launcher, "tests.stoppable_rank", place, str(folder))
    return command, [int(pid) for pid in command.read_until("ready", RANKS_OF[launcher])]


@pytest.mark.parametrize(
    ("launcher", "status"),
    [
        ("python", STOPPED_STATUS),
        ("trb_megatron.launch", STOPPED_STATUS),
        ("torch.distributed.run", 1),
    ],
)
def test_the_first_saves(launcher: str, status: int, tmp_path: Path) -> None:
    command, _ = start_ranks(launcher, "steps", tmp_path)
    command.signal(signal.SIGINT)
    ended, output = command.finish()
    assert ended == status, output
    assert output.count(FIRST) == 1
    assert (tmp_path / "saved").read_text() == "SIGINT"


@pytest.mark.parametrize(
    ("launcher", "status"),
    [("python", 130), ("trb_megatron.launch", 130), ("torch.distributed.run", 1)],
)
def test_the_second_ends_at_once(launcher: str, status: int, tmp_path: Path) -> None:
    command, pids = start_ranks(launcher, "long step", tmp_path)
    command.signal(signal.SIGINT)
    command.read_until(FIRST)
    time.sleep(2 * SAME_SIGNAL_S)
    started = time.monotonic()
    command.signal(signal.SIGINT)
    ended, output = command.finish()
    assert time.monotonic() - started < 10
    assert ended == status, output
    assert output.count(SECOND) == 1
    assert "error: " not in output
    assert not (tmp_path / "saved").exists()
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("launcher", "status"),
    [("python", 130), ("trb_megatron.launch", 130), ("torch.distributed.run", 1)],
)
def test_set_up_ends_at_once(launcher: str, status: int, tmp_path: Path) -> None:
    command, pids = start_ranks(launcher, "set-up", tmp_path)
    command.signal(signal.SIGINT)
    ended, output = command.finish()
    assert ended == status, output
    assert output.count("interrupted: there was nothing to save") == 1
    assert "error: " not in output
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_launcher_and_ranks_is_one_request(
    number: signal.Signals, tmp_path: Path
) -> None:
    """A cluster may signal every process of a job; the launcher passes its own on besides."""
    command, pids = start_ranks("trb_megatron.launch", "steps", tmp_path)
    for pid in pids:
        os.kill(pid, number)
    command.signal(number)
    status, output = command.finish()
    assert status == STOPPED_STATUS, output
    assert (tmp_path / "saved").read_text() == number.name


def test_a_stop_file_tells_instead_of_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To srun, a status other than 0 is a failure, which ends the launchers of other hosts."""
    file = tmp_path / "stop"
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(file))
    command, _ = start_ranks("trb_megatron.launch", "steps", tmp_path)
    file.touch()
    status, output = command.finish()
    assert status == 0, output
    assert file.read_text() == f"stopped by {file}\n"


def test_a_launcher_without_ranks_ends_at_once() -> None:
    """It waits for the other host."""
    options = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "x")
    command = Command("trb_megatron.launch", *options)
    while not catches(command.process.pid, signal.SIGUSR1):
        time.sleep(0.05)
    command.signal(signal.SIGINT)
    status, output = command.finish()
    assert status == 130, output
    assert output == "ended by SIGINT: no rank was running\n"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_training_saves_and_says_so_to_the_shell(tmp_path: Path) -> None:
    """On two ranks under the launcher; then it goes on as one process, and is stopped again."""
    config_file, run_dir = write_inputs(tmp_path), tmp_path / "run"
    saved = 0
    for launcher in ("trb_megatron.launch", "python"):
        command = Command(
            *(launcher, "trb_megatron.train", str(config_file), f"run.dir={run_dir}"),
            *("training.steps=1000", "checkpoint.every=1000", "checkpoint.keep=9"),
        )
        command.read_until(f"step {saved + 2}/1000")
        command.signal(signal.SIGINT)
        status, output = command.finish()
        assert status == STOPPED_STATUS, output
        assert output.count(FIRST) == 1
        checkpoint = find_checkpoints(run_dir)[-1]
        saved = int(checkpoint.name.removeprefix("step_"))
        assert f"stopped by SIGINT after step {saved} of 1000;" in output
        rows = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, saved + 1))
