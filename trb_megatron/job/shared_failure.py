"""Failures of one rank, raised on all ranks, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")

_PROBE_BYTES = 2**20


class SharedFailure:
    """The first exception of this rank while it kept communicating; later, of all ranks.

    Args:
        folder: where the ranks write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.error: Exception | CheckpointException | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the first exception of the blocks under it for `raise_together`."""
        try:
            yield
        # Whatever it is, the other ranks must not wait for this one; torch's is no Exception.
        except (Exception, CheckpointException) as error:
            self.error = self.error or error

    def raise_together(self, describe: Callable[[str], Exception]) -> None:
        """Raise `describe(reason)` on all ranks when one of them failed.

        An all-gather of objects over the world. `reason` is one line that begins with the rank;
        what the system refused goes before what a library said.
        """
        reasons: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, self._reason())
        failed = [
            (not by_system, rank, text)
            for rank, (by_system, text) in ((r, found) for r, found in enumerate(reasons) if found)
        ]
        if failed:
            _, rank, text = min(failed)
            raise describe(f"rank {rank}: {text}") from self.error

    def _reason(self) -> tuple[bool, str] | None:
        """Whether the system refused something, and what failed; None when nothing did."""
        if self.error is None:
            return None
        error = self.error
        if not isinstance(error, OSError):
            # torch and Megatron hide a full disk behind messages of their own: see for ourselves.
            error = _write_error(self._folder) or error
        if isinstance(error, OSError) and error.strerror:
            file = "" if error.filename is None else f"{error.filename}: "
            return True, file + error.strerror
        return False, f"{type(error).__name__}: {error}".strip().splitlines()[-1]


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Compute something on rank 0 for all ranks: a broadcast of an object, if there is a job.

    Raises:
        OSError: rank 0 met it.
    """
    shared: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            shared[0] = compute()
        except OSError as error:
            shared[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    value, failure = shared
    if failure is not None:
        raise failure
    return value


def _write_error(folder: Path) -> OSError | None:
    """Write a file into `folder`, remove it, and return the error of the system, if any."""
    file = folder / f".probe-{dist.get_rank()}"
    try:
        file.write_bytes(bytes(_PROBE_BYTES))
        file.unlink()
    except OSError as error:
        file.unlink(missing_ok=True)
        return error
    return None
