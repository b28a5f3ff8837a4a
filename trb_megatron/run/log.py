"""The log of a run, which the trainer tells of each step."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

from trb_megatron.checkpoint.folders import written_together
from trb_megatron.config.options import Config
from trb_megatron.distributed.layout import is_rank_zero
from trb_megatron.run.metrics import MetricsLogger, Progress


class RunLog:
    """Shows and writes the steps of a run, on rank 0; a failed write ends the run on all ranks."""

    def __init__(self, config: Config, step: int) -> None:
        self._config = config
        self._step = step
        self._writing = partial(written_together, config.run.dir / "metrics.jsonl", config.run.dir)

    def __enter__(self) -> RunLog:
        with self._writing():
            if is_rank_zero():
                self._open()
        return self

    def _open(self) -> None:
        logging = self._config.logging
        self._metrics = MetricsLogger(
            self._config.run.dir, logging.tensorboard, logging.wandb_project, self._config
        )
        # A start that never reached a checkpoint is started over, initial evaluation included.
        self._metrics.truncate_after(self._step if self._step > 0 else -1)
        self._progress = Progress(self._config.training.steps, self._step).__enter__()

    def __exit__(self, error_type: type[BaseException] | None, *error: Any) -> None:
        if is_rank_zero():
            self._progress.__exit__(error_type, *error)
            # What made a record fail would do so again, and hide itself.
            with suppress(OSError) if error_type is not None else nullcontext():
                self._metrics.close()

    def write(self, line: str) -> None:
        """Print a line above the progress bar."""
        if is_rank_zero():
            self._progress.write(line)

    def leave_out_time(self) -> None:
        """Don't count the time since the last step for the estimate of what is left."""
        if is_rank_zero():
            self._progress.leave_out_time()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a finished step and show its progress."""
        with self._writing():
            if is_rank_zero():
                self._metrics.log(step, metrics)
        if is_rank_zero():
            self._progress.update(
                step,
                loss=metrics["loss"],
                reward=metrics.get("rollout/reward"),
                tokens_per_s=metrics["perf/tokens_per_s"],
            )

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Write further metrics of a step that is recorded already, or of step 0."""
        with self._writing():
            if is_rank_zero() and metrics:
                self._metrics.add(step, metrics)
