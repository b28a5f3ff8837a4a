"""The writers behind the log: metrics.jsonl, TensorBoard, W&B, the progress bar; and the meters.

Only rank 0 builds `MetricsLogger` and `Progress`; every rank may time its own phases.
"""

import json
import math
import os
import re
import resource
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trb_megatron.atomic_folder import write_file
from trb_megatron.config.options import Config


class MetricsLogger:
    """Writes each step's metrics to metrics.jsonl and, where asked, to TensorBoard and W&B.

    JSON has no NaN or infinity: such values, like None, are written as null and shown by neither
    TensorBoard nor W&B. Raises ValueError when `wandb_project` is set but W&B is not installed, and
    OSError, here or from `log`, when something cannot be written, such as a file that has vanished.
    """

    def __init__(
        self, run_dir: Path, tensorboard: bool, wandb_project: str | None, config: Config
    ) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        self._path.touch()
        self._has_tensorboard = tensorboard
        self._purge_step: int | None = None
        self._wandb_run = _start_wandb(run_dir, wandb_project, config) if wandb_project else None

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the metrics of a step as one flushed line, `{"step": step, ...}`."""
        finite = {name: _finite_or_none(value) for name, value in values.items()}
        # Opened anew each time, and never made anew: so a folder that has vanished is noticed.
        with self._path.open("r+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._show(step, finite)

    def add(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write metrics of a step that came later than the rest of its row."""
        finite = {name: _finite_or_none(value) for name, value in values.items()}
        rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        row = rows.pop() if rows and rows[-1]["step"] == step else {"step": step}
        write_file(self._path, "".join(json.dumps(r) + "\n" for r in (*rows, row | finite)))
        self._show(step, finite)

    def _show(self, step: int, finite: Mapping[str, float | int | None]) -> None:
        shown = {name: value for name, value in finite.items() if value is not None}
        if self._has_tensorboard:
            for name, value in shown.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb_run is not None:
            self._wandb_run.log(shown, step=step)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps past `step`, which a resumed run is about to repeat.

        Call it before the first `log`. Lines that a crash left half-written go, too.
        """
        assert "_tensorboard" not in self.__dict__, "truncate_after follows log"
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_file(self._path, "".join(line for line in lines if _step_of(line) <= step))
        self._purge_step = step + 1

    def close(self) -> None:
        """Write what is buffered and close every file."""
        if "_tensorboard" in self.__dict__:
            self._tensorboard.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    @cached_property
    def _tensorboard(self) -> SummaryWriter:
        # purge_step makes TensorBoard forget what the interrupted run wrote from there on.
        return SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)


def _step_of(line: str) -> float:
    """The step of a row of metrics.jsonl; infinity when it is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _finite_or_none(value: float | int | None) -> float | int | None:
    return value if value is not None and math.isfinite(value) else None


def _start_wandb(run_dir: Path, project: str, config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"logging.wandb_project={project}: W&B is not installed; `pip install wandb`, or set "
            "logging.wandb_project=null"
        ) from None
    id_file = run_dir / "wandb_id"  # a resumed run continues its own curves
    if not id_file.exists():
        write_file(id_file, uuid.uuid4().hex)
    return wandb.init(
        project=project,
        name=run_dir.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
    )


class Progress:
    """A progress bar over training steps; one plain line per step where there is no terminal."""

    def __init__(self, num_steps: int, num_done: int = 0, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._num_steps = num_steps
        self._num_done_before = num_done
        self._started = self._last_step_ended = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if self._file.isatty():
            self._bar = tqdm(
                total=num_steps, initial=num_done, file=self._file, unit="step", dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(
        self, num_done: int, *, loss: float, reward: float | None, tokens_per_s: float
    ) -> None:
        """Show the step that was just finished; `num_done` counts all steps of the run so far."""
        shown = f"loss {loss:.4f} | " + ("" if reward is None else f"reward {reward:.3f} | ")
        shown += f"{tokens_per_s:,.0f} tokens/s"
        self._last_step_ended = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(num_done - self._bar.n)
        else:
            left = tqdm.format_interval(self._seconds_left(num_done))
            self.write(f"step {num_done}/{self._num_steps} | {shown} | {left} left")

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def leave_out_time(self) -> None:
        """Don't count the time since the last step for the estimate of what is left."""
        now = time.monotonic()
        self._started += now - self._last_step_ended
        self._last_step_ended = now
        if self._bar is not None:
            self._bar.unpause()

    def _seconds_left(self, num_done: int) -> float:
        seconds_per_step = (self._last_step_ended - self._started) / (
            num_done - self._num_done_before
        )
        return seconds_per_step * (self._num_steps - num_done)


class PhaseTimer:
    """Seconds that each phase of a step took on this rank.

    Phases may be nested: the time of an inner one is not counted in the outer one. A phase ends
    when the device has finished its work.
    """

    PHASES = ("rollout", "teacher", "train")

    def __init__(self) -> None:
        self._running: list[str] = []
        self._start_step()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside the `with` block to one of PHASES."""
        assert name in self.PHASES
        self._attribute_time()
        self._running.append(name)
        try:
            yield
        finally:
            self._attribute_time()
            self._running.pop()

    def finish_step(self) -> dict[str, float]:
        """Return the seconds of each phase, of the rest and of the whole step; start the next."""
        assert not self._running
        self._attribute_time()
        seconds = self._seconds
        self._start_step()
        return {**seconds, "step": sum(seconds.values())}

    def _start_step(self) -> None:
        self._seconds = dict.fromkeys((*self.PHASES, "other"), 0.0)
        self._last = time.perf_counter()

    def _attribute_time(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._running[-1] if self._running else "other"] += now - self._last
        self._last = now


class PeakMemory:
    """The most memory that this process used in each step, and in the whole run.

    Of a GPU it is what PyTorch has allocated, on a CPU the process's resident memory, in units of
    1e9 bytes. Only Linux can set a process's peak back (`/proc/PID/clear_refs`, proc(5)); elsewhere
    a step's figure on a CPU is NaN.
    """

    _CLEAR = Path("/proc/self/clear_refs")
    _STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self._of_run = 0.0
        self._can_start_over = torch.cuda.is_available() or os.access(self._CLEAR, os.W_OK)
        self._start_step()

    def finish_step(self) -> dict[str, float]:
        """The peaks of the step, and of the run since the process began; start the next step."""
        of_step = self._start_step()
        return {"step": of_step if self._can_start_over else math.nan, "run": self._of_run}

    def _start_step(self) -> float:
        """Begin at the memory in use; return the peak before that."""
        peak = self._read()
        self._of_run = max(self._of_run, peak)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif self._can_start_over:
            self._CLEAR.write_text("5")
        return peak

    def _read(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e9
        if self._can_start_over:
            (line,) = re.findall(r"VmHWM:\s*(\d+) kB", self._STATUS.read_text())
            return int(line) * 1024 / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
