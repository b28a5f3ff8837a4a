"""Rewards: 1.0 for a response whose final answer is right, else 0.0; or what a user's grader says.

Grading runs in worker processes with a time limit for each answer, because a response can hold an
expression that keeps sympy busy for hours or brings its process down. `grader` is what a worker
runs, and says what it reads and writes.
"""

from __future__ import annotations

import json
import os
import reprlib
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
from trb_megatron.config.values import ConfigError
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.job.supervision import RunError

WORKER = (sys.executable, "-P", "-m", "trb_megatron.evaluation.grader")
_START_S = 120.0
_shorten = reprlib.Repr()
_shorten.maxstring = 200
_PARENT_GRACE_S = 5.0  # beyond a worker's own limit, for one that was stopped and cannot keep it


@dataclass(frozen=True)
class Grade:
    """What grading made of a response.

    Attributes:
        reward: from 0 to 1.
        extracted: its final answer as it was read; None where there is none, and from a grader of
            the user's.
        timed_out: grading took too long or ended its worker, so the reward is 0.
    """

    reward: float
    extracted: str | None = None
    timed_out: bool = False

    @property
    def is_right(self) -> bool:
        return self.reward == 1


class RewardWorkers:
    """A pool of grading processes; use it as a context manager.

    `grader` names a function of the user's, `module:function`, which `grader.user_grader`
    describes; None: math-verify grades.

    `num_timeouts` counts the responses of the last `grade` that got 0 because grading took longer
    than `timeout_s` or ended their worker, which was then replaced.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        grader: str | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self._num_workers = workers
        self._grader, self._timeout_s = grader, timeout_s
        self._command = [*command, str(timeout_s), *([] if grader is None else [grader])]
        self.num_timeouts = 0

    def __enter__(self) -> RewardWorkers:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="rewards")
        for _ in range(self._num_workers):
            self._idle.put(self._start_worker())
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

    def check(self) -> None:
        """Wait until a worker has loaded the user's grader, if there is one.

        Raises:
            ConfigError: it cannot be imported, or not be called.
        """
        if self._grader is not None:
            worker = self._idle.get()
            try:
                worker.wait_until_ready()
            finally:
                self._idle.put(worker)

    def score(
        self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]
    ) -> list[float]:
        """The rewards of `grade`."""
        return [grade.reward for grade in self.grade(responses, answers)]

    def grade(
        self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]
    ) -> list[Grade]:
        """Grade each response against its answer, or against several of which any one is right.

        Returns grades in the order of the responses.

        Raises:
            RuntimeError: workers do not start.
            RunError: the user's grader raised an exception or returned no reward.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        acceptable = [[a] if isinstance(a, str) else list(a) for a in answers]
        grades = list(self._threads.map(self._grade, responses, acceptable))
        self.num_timeouts = sum(grade.timed_out for grade in grades)
        return grades

    def _start_worker(self) -> _Worker:
        return _Worker(self._command, self._timeout_s, self._grader)

    def _grade(self, response: str, answers: list[str]) -> Grade:
        """Grade in the next idle worker, which is replaced if it does not survive that."""
        worker = self._idle.get()
        try:
            grade = worker.grade(response, answers)
            if grade.timed_out:
                worker.stop()
                worker = self._start_worker()
            return grade
        finally:
            self._idle.put(worker)


def start_reward_workers(
    config: RewardsConfig, layout: ParallelLayout
) -> AbstractContextManager[RewardWorkers | None]:
    """Grading processes on the leader of each replica; other ranks get None."""
    if not layout.is_leader:
        return nullcontext()
    return RewardWorkers(config.workers, config.timeout_s, config.grader)


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, command: Sequence[str], timeout_s: float, grader: str | None) -> None:
        self._timeout_s, self._grader = timeout_s, grader
        # It imports what this process can import, whichever way that was started.
        paths = [os.path.abspath(path) for path in (*sys.path, ".")]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
            env=os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
        )
        self._is_ready = False

    def grade(self, response: str, answers: list[str]) -> Grade:
        """Send one response and wait for its grade."""
        self.wait_until_ready()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps([response, answers]).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return Grade(0.0, timed_out=True)
        line = self._read_line(self._timeout_s + _PARENT_GRACE_S)
        if line is None:
            return Grade(0.0, timed_out=True)
        reply = json.loads(line)
        if "error" in reply:
            raise RunError(
                f"rewards.grader={self._grader} {reply['error']}; it was given the response "
                f"{_shorten.repr(response)} and the answers {_shorten.repr(answers)}"
            )
        return Grade(**reply)

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

    def wait_until_ready(self) -> None:
        """Wait until it has started. Raises ConfigError where the user's grader cannot be used."""
        if self._is_ready:
            return
        line = self._read_line(_START_S)
        if line is None:
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
        if reply := json.loads(line):
            raise ConfigError(f"rewards.grader={self._grader}: {reply['error']}")
        self._is_ready = True

    def stop(self) -> None:
        """End the process, whatever it is doing, and close the pipes."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass
