"""Rewards: 1.0 for a response whose final answer is right, else 0.0.

Grading runs in worker processes with a time limit for each answer, because a response can hold an
expression that keeps sympy busy for hours or brings its process down. `grader` is what a worker
runs, and says what it reads and writes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

from trb_megatron.config.options import RewardsConfig
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.evaluation import grader

# -P keeps this folder, and thus the package's module names, off the worker's import path.
MATH_VERIFY_WORKER = (sys.executable, "-P", os.path.abspath(grader.__file__))
_START_S = 120.0
_PARENT_GRACE_S = 5.0  # beyond a worker's own limit, for one that was stopped and cannot keep it


@dataclass(frozen=True)
class Grade:
    """What grading made of a response.

    Attributes:
        extracted: its final answer as it was read; None where there is none.
        timed_out: grading took too long or ended its worker, so the response does not count as
            right.
    """

    is_right: bool
    extracted: str | None = None
    timed_out: bool = False

    @property
    def reward(self) -> float:
        return float(self.is_right)


class RewardWorkers:
    """A pool of grading processes; use it as a context manager.

    `num_timeouts` counts the responses of the last `grade` that got 0 because grading took longer
    than `timeout_s` or ended their worker, which was then replaced.
    """

    def __init__(
        self, workers: int, timeout_s: float, command: Sequence[str] = MATH_VERIFY_WORKER
    ) -> None:
        self._num_workers = workers
        self._command, self._timeout_s = command, timeout_s
        self.num_timeouts = 0

    def __enter__(self) -> RewardWorkers:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="rewards")
        for _ in range(self._num_workers):
            self._idle.put(_Worker(self._command, self._timeout_s))
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def score(
        self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]
    ) -> list[float]:
        """The rewards of `grade`."""
        return [grade.reward for grade in self.grade(responses, answers)]

    def grade(
        self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]
    ) -> list[Grade]:
        """Grade each response against its answer, or against several of which any one is right.

        Returns grades in the order of the responses. Raises RuntimeError when workers do not
        start.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        acceptable = [[a] if isinstance(a, str) else list(a) for a in answers]
        grades = list(self._threads.map(self._grade, responses, acceptable))
        self.num_timeouts = sum(grade.timed_out for grade in grades)
        return grades

    def _grade(self, response: str, answers: list[str]) -> Grade:
        """Grade in the next idle worker, which is replaced if it does not survive that."""
        worker = self._idle.get()
        try:
            grade = worker.grade(response, answers)
            if grade.timed_out:
                worker.stop()
                worker = _Worker(self._command, self._timeout_s)
            return grade
        finally:
            self._idle.put(worker)


def start_reward_workers(
    config: RewardsConfig, layout: ParallelLayout
) -> AbstractContextManager[RewardWorkers | None]:
    """Grading processes on the leader of each replica; other ranks get None."""
    return RewardWorkers(config.workers, config.timeout_s) if layout.is_leader else nullcontext()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # A session of its own: Ctrl-C in the terminal is for the parent alone.
        self._process = subprocess.Popen(
            [*command, str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._is_ready = False

    def grade(self, response: str, answers: list[str]) -> Grade:
        """Send one response and wait for its grade."""
        if not self._is_ready:
            self._wait_until_ready()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps([response, answers]).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return Grade(False, timed_out=True)
        line = self._read_line(self._timeout_s + _PARENT_GRACE_S)
        if line is None:
            return Grade(False, timed_out=True)
        return Grade(*json.loads(line))

    def _read_line(self, timeout_s: float) -> bytes | None:
        """The next line; None when the process ended before its end, or the time did."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(stdout.fileno(), 2**16) if ready else b""
            if not piece:
                return None
            line += piece
        return line

    def _wait_until_ready(self) -> None:
        if self._read_line(_START_S) is None:
            try:  # its pipe closes a moment before it has ended
                code = self._process.wait(_PARENT_GRACE_S)
            except subprocess.TimeoutExpired:
                self.stop()
                raise RuntimeError(
                    f"a reward worker did not start within {_START_S:.0f} s"
                ) from None
            raise RuntimeError(
                f"a reward worker ended with exit code {code} while starting; its own message is "
                "in the log above"
            )
        self._is_ready = True

    def stop(self) -> None:
        """End the process, whatever it is doing, and close the pipes."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass
