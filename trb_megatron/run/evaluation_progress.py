"""How far an evaluation is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from trb_megatron.rollout.generation import Watch

_LINE_EVERY_S = 15.0
"""Seconds between two lines where there is no terminal."""
_BAR_EVERY_S = 0.2


class EvaluationProgress:
    """Shows problems done of all, tokens per second and the time left.

    It sees one model replica and takes the others to be as far.

    Args:
        num_problems: of each set.
        num_samples: responses to each problem.
        num_replicas: that share the problems.
        enabled: whether this rank shows anything.
    """

    def __init__(
        self,
        num_problems: Mapping[str, int],
        num_samples: int,
        num_replicas: int,
        file: TextIO | None = None,
        *,
        enabled: bool = True,
    ) -> None:
        self._file = file or sys.stderr
        self._enabled = enabled
        self._num_problems = num_problems
        self._num_samples, self._num_replicas = num_samples, num_replicas
        self._total = sum(num_problems.values())
        self._num_before = self._tokens_before = 0  # of the sets that are done
        self._num_done = self._num_tokens = 0
        self._started = self._shown_at = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if enabled and self._file.isatty():
            self._bar = tqdm(
                total=self._total, file=self._file, unit="problem", dynamic_ncols=True, leave=False
            )

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def watch(self, name: str) -> Watch:
        """Begin a set; the result is told how many responses and tokens the replica has."""

        def update(num_finished: int, num_tokens: int) -> None:
            done = min(num_finished * self._num_replicas // self._num_samples, of_set)
            self._num_done = self._num_before + done
            self._num_tokens = self._tokens_before + num_tokens * self._num_replicas
            if self._enabled:
                self._show(name)

        of_set = self._num_problems[name]
        return update

    def finish(self, name: str) -> None:
        """Count a set as done."""
        self._num_before += self._num_problems[name]
        self._tokens_before = self._num_tokens

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def _show(self, name: str) -> None:
        now = time.monotonic()
        seconds = now - self._started
        if now - self._shown_at < (_LINE_EVERY_S if self._bar is None else _BAR_EVERY_S):
            return
        self._shown_at = now
        rate = f"{self._num_tokens / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.n = self._num_done
            self._bar.set_postfix_str(f"{name}, {rate}", refresh=True)
            return
        left = ""
        if self._num_done:
            to_go = seconds * (self._total - self._num_done) / self._num_done
            left = f" | {tqdm.format_interval(to_go)} left"
        self.write(f"problem {self._num_done:,}/{self._total:,} | {name} | {rate}{left}")
