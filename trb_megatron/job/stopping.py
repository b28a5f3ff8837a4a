"""Requests to stop: a signal or a file ends a run before its last step, after a save.

All ranks finish the step that they are in, save, and leave; started again, the run goes on. Ctrl-C
(SIGINT) is such a request, and a second one ends the job at once (see `supervision`).
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from trb_megatron.job.signals import handled, heard

STOPPED_STATUS = 75
"""Exit status of a run that was stopped and saved, and has steps left: EX_TEMPFAIL of sysexits.h,
"try again". See `stopped_status`."""

STOP_FILE_VARIABLE = "TRB_STOP_FILE"
"""Names the environment variable that names a file: where it exists, the run ends. (A batch script
can make a file on a shared file system, but hardly signal each rank on each node.)"""

STOPPED_FILE_VARIABLE = "TRB_STOPPED_FILE"
"""Names the environment variable by which a launcher names a file of its host: a run that was
stopped and saved makes it. (Its ranks end with status 0, for torchrun takes any other for a failure
and ends the ranks of all hosts.)"""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Notes SIGINT, SIGTERM and SIGUSR1 while it is entered as a context manager.

    Outside it, these signals end the process at once: during set-up there is nothing to save.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._agreed: str | None = None
        self._was_interrupted = False
        file = os.environ.get(STOP_FILE_VARIABLE)
        self._file = Path(file) if file else None

    def __enter__(self) -> StopRequests:
        with ExitStack() as stack:
            stack.enter_context(handled(self._note, *_SIGNALS))
            stack.enter_context(heard(self._answer))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def _answer(self, number: int) -> None:
        """Tell who pressed Ctrl-C what happens now, once on each host; not in the main thread."""
        if number == signal.SIGINT and not self._was_interrupted and _is_first_of_host():
            print(
                "interrupted: finishing the step, then saving; a second Ctrl-C ends the run at "
                "once, and what came after the last checkpoint is lost",
                flush=True,
            )
        self._was_interrupted |= number == signal.SIGINT

    def agree(self) -> str | None:
        """The reason to end the run now, the same on all ranks; None to go on.

        An all-gather over the world, unless they have agreed to end before. Rank 0 alone looks for
        the file.
        """
        if self._agreed is not None:
            return self._agreed
        reason = self._signal
        if reason is None and dist.get_rank() == 0 and self._file and self._file.exists():
            reason = str(self._file)
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        self._agreed = next((found for found in reasons if found is not None), None)
        return self._agreed

    def confirm(self, message: str) -> None:
        """Write a line into the stop file, on rank 0, and the launcher's, on each host; if named.

        It tells the batch script and the launcher that the run was saved and has steps left. A run
        that had just done its last step leaves the files as they are, and need not be started
        again.
        """
        if dist.get_rank() == 0 and self._file:
            self._file.write_text(message + "\n")
        launchers = os.environ.get(STOPPED_FILE_VARIABLE)
        if launchers and _is_first_of_host():
            Path(launchers).write_text(message + "\n")


def stopped_status() -> int:
    """The exit status of a launcher, or a run without one, whose run was stopped and saved.

    It is 0 where a stop file is named, which tells the same: srun would take another status for a
    failure, and end the launchers of the other hosts.
    """
    return 0 if os.environ.get(STOP_FILE_VARIABLE) else STOPPED_STATUS


def _is_first_of_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
