"""Rewards: 1.0 for a response whose final answer math-verify finds right, else 0.0.

Grading runs in worker processes with a time limit for each answer, because a response can hold an
expression that keeps sympy busy for hours or brings its process down. A worker is this very file,
run as a script: it starts in a fraction of a second and imports math-verify, but neither torch nor
the program that asked. It reads one JSON line `[response, answers]` at a time from standard input
and writes one byte: `r` once when it is ready, then `1` or `0` for each line.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker must not import the package
    from trb_megatron.config.options import RewardsConfig
    from trb_megatron.distributed.layout import ParallelLayout

# -P keeps this folder, and thus the package's module names, off the worker's import path.
MATH_VERIFY_WORKER = (sys.executable, "-P", os.path.abspath(__file__))
_START_S = 120.0
_PARENT_GRACE_S = 5.0  # beyond a worker's own limit, for one that was stopped and cannot keep it
_WORKER_MEMORY_BYTES = 4 * 2**30  # of address space: 9^{9^{9^9}} is refused, not computed


class RewardWorkers:
    """A pool of grading processes; use it as a context manager.

    `num_timeouts` counts the responses of the last `score` that got 0 because grading took longer
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
        """Grade each response against its answer, or against several of which any one is right.

        Returns rewards in the order of the responses. Raises RuntimeError when workers do not
        start.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        acceptable = [[a] if isinstance(a, str) else list(a) for a in answers]
        verdicts = list(self._threads.map(self._grade, responses, acceptable))
        self.num_timeouts = verdicts.count(None)
        return [1.0 if verdict else 0.0 for verdict in verdicts]

    def _grade(self, response: str, answers: list[str]) -> bool | None:
        """Grade in the next idle worker; None when the worker did not survive it."""
        worker = self._idle.get()
        try:
            verdict = worker.grade(response, answers)
            if verdict is None:
                worker.stop()
                worker = _Worker(self._command, self._timeout_s)
            return verdict
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

    def grade(self, response: str, answers: list[str]) -> bool | None:
        """Send one response and wait for its verdict; None when there is none in time."""
        if not self._is_ready:
            self._wait_until_ready()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps([response, answers]).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        verdict = self._read(self._timeout_s + _PARENT_GRACE_S)
        return None if verdict == b"" else verdict == b"1"

    def _read(self, timeout_s: float) -> bytes:
        """The next byte; empty when the process ended, or the time did."""
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        return stdout.read(1) if ready else b""

    def _wait_until_ready(self) -> None:
        if self._read(_START_S) != b"r":
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


# ---------------------------------------------------------------- inside a worker


def serve(is_correct: Callable[[str, list[str]], bool], timeout_s: float) -> None:
    """Grade what arrives on standard input until it closes; the body of a worker process.

    The kernel ends the process when grading one line takes longer than `timeout_s`: SIGALRM keeps
    its default action, so no code, in whatever language, can miss it, and a worker whose parent is
    gone does not outlive its line. SIGTERM, which SLURM sends to every process of a preempted job,
    is for the ranks, which still grade the step that they are in.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))
    logging.disable()  # math-verify reports every expression it cannot compare
    verdicts = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no verdict
    os.write(verdicts, b"r")
    for line in sys.stdin.buffer:
        response, answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        verdict = is_correct(response, answers)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(verdicts, b"1" if verdict else b"0")


def _serve_math_verify(timeout_s: float) -> None:
    import math_verify

    # math-verify's own limits are off (0): they need SIGALRM, which here ends the process.
    def is_correct(response: str, answers: list[str]) -> bool:
        found = math_verify.parse(response, parsing_timeout=0)
        return any(
            math_verify.verify(
                math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=0),
                found,
                timeout_seconds=0,
            )
            for answer in answers
        )

    serve(is_correct, timeout_s)


if __name__ == "__main__":
    _serve_math_verify(float(sys.argv[1]))
