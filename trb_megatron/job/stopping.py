"""Requests to stop: a signal or a file ends a run before its last step, after a save.

All ranks finish the step that they are in, save, and leave; started again, the run goes on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

STOP_FILE_VARIABLE = "TRB_STOP_FILE"
"""Names the environment variable that names a file: where it exists, the run ends. (A batch script
can make a file on a shared file system, but hardly signal each rank on each node.)"""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Notes SIGTERM and SIGUSR1 while it is entered as a context manager.

    Outside it, both signals end the process at once: during set-up there is nothing to save.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._agreed: str | None = None
        file = os.environ.get(STOP_FILE_VARIABLE)
        self._file = Path(file) if file else None

    def __enter__(self) -> StopRequests:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

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
        """Write a line into the stop file, if one is named; on rank 0 only.

        It tells the batch script that the run was saved and has steps left. A run that had just
        done its last step leaves the file empty, and need not be started again.
        """
        if dist.get_rank() == 0 and self._file:
            self._file.write_text(message + "\n")
