"""Trainings on ranks that can be killed, forked from a process that has imported everything."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ranks import get_context

WORLD_SIZE = 2  # two data-parallel replicas share the optimizer state
TIMEOUT_S = 300.0

# Functions in which a rank is in a phase.
PHASES = {
    "Trainer.rollout": "rollout",
    "Trainer.gradients": "update",
    "Trainer.update": "update",
    "save_checkpoint": "save",
    "save_hf_checkpoint": "export",
}


class Job:
    """A training under way, one process for each rank, as torchrun would start it.

    Args:
        folder: to be made; for the ranks' output and what they report of themselves.
    """

    def __init__(self, config_file: Path, overrides: Sequence[str], folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        context = get_context()
        self._marks = [folder / f"mark_{rank}" for rank in range(WORLD_SIZE)]
        self._ranks: list[BaseProcess] = []
        for rank in range(WORLD_SIZE):
            process = context.Process(
                target=_train_rank, args=(rank, folder, config_file, tuple(overrides))
            )
            process.start()
            self._ranks.append(process)

    def mark(self, rank: int) -> tuple[str, int]:
        """The phase that a rank is in ("" between phases), and the steps it has done."""
        with suppress(OSError, ValueError):  # not there yet
            phase, step = self._marks[rank].read_text().split(",")
            return phase.strip(), int(step)
        return "", -1

    def seconds(self, phase: str, step: int) -> float:
        """How long rank 0 was in a phase of a step."""
        lines = (self._folder / "seconds").read_text().splitlines()
        found = [line.split(",") for line in lines]
        return max(float(s) for name, at, s in found if (name, int(at)) == (phase, step))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, at most until a rank has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition() and all(process.is_alive() for process in self._ranks):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.0005)

    def kill(self, ranks: Sequence[int], grace_s: float = 1.0) -> None:
        """Kill some ranks, and like torchrun the others if they don't end by themselves."""
        for rank in ranks:
            self._ranks[rank].kill()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(p.is_alive() for p in self._ranks):
            time.sleep(0.02)
        for process in self._ranks:
            process.kill()
            process.join()

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the ranks and all processes that they have started."""
        for process in self._ranks:
            assert process.pid is not None
            os.killpg(process.pid, number)

    def finish(self) -> None:
        """Wait until all ranks have ended well."""
        assert self.wait() == [0] * WORLD_SIZE, self.output()

    def wait(self) -> list[int | None]:
        """Wait until all ranks have ended; their exit statuses, None for one that has not."""
        deadline = time.monotonic() + TIMEOUT_S
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self._ranks]

    def resumed_step(self) -> int:
        """The step that the job began at."""
        return int((self._folder / "resumed").read_text())

    def output(self) -> str:
        """What the ranks have printed."""
        return "\n".join(
            f"{log.name}:\n{log.read_text()}" for log in sorted(self._folder.glob("*.log"))
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left: ranks, and processes that a killed rank left behind."""
        for process in self._ranks:
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _train_rank(rank: int, folder: Path, config_file: Path, overrides: tuple[str, ...]) -> None:
    os.setpgrp()
    # A shell that runs the tests in its background ignores SIGINT, and so would the rank.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from tests.runs import make_trainer

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    trainer = make_trainer(config_file, overrides)
    (folder / "resumed").write_text(str(trainer.step))
    for function, phase in PHASES.items():
        _mark_phase(function, phase, trainer, folder)
    trainer.train()
    dist.destroy_process_group()
    sys.exit(0)


def _mark_phase(function: str, phase: str, trainer: Any, folder: Path) -> None:
    """Let a function of the trainer's module report when it begins and ends."""
    import torch.distributed as dist

    from trb_megatron import trainer as module

    owner = module.Trainer if "." in function else module
    name = function.split(".")[-1]
    original: Callable[..., Any] = getattr(owner, name)
    mark = os.open(folder / f"mark_{dist.get_rank()}", os.O_WRONLY | os.O_CREAT)

    def marked(*args: Any, **kwargs: Any) -> Any:
        started, step = time.monotonic(), trainer.step
        os.pwrite(mark, f"{phase:>10},{step:>5}".encode(), 0)
        result = original(*args, **kwargs)
        os.pwrite(mark, f"{'':>10},{step:>5}".encode(), 0)
        if dist.get_rank() == 0:
            with (folder / "seconds").open("a") as file:
                file.write(f"{phase},{step},{time.monotonic() - started}\n")
        return result

    setattr(owner, name, marked)
