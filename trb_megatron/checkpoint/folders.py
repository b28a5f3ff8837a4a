"""Which checkpoints the folder of a run holds, and failures to write there.

Whatever cannot be written into a run's folder ends the job, and the message names the last good
checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trb_megatron.job.shared_failure import SharedFailure
from trb_megatron.job.supervision import RunError


class TrainingCheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it."""


class RunFolderError(RunError):
    """Something that could not be written into the folder of a run; the message names it."""


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {
        int(match[1]): folder
        for folder in (run_dir / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, or the newest.

    Raises:
        TrainingCheckpointError: there is none; names those that exist.
    """
    found = {folder.name: folder for folder in find_checkpoints(run_dir)}
    name = f"step_{step}" if step is not None else next(reversed(found), "")
    if name not in found:
        raise TrainingCheckpointError(
            f"{run_dir / 'checkpoints'}: no checkpoint {name or 'at all'}; "
            f"found: {', '.join(found) or 'none'}"
        )
    return found[name]


@contextmanager
def written_together(what: Path, run_dir: Path) -> Iterator[SharedFailure]:
    """Let a block that writes fail on all ranks when it fails on one.

    Collective over all ranks: an all-gather follows the block. Where ranks communicate inside it,
    what may fail on one of them in between goes under `kept` of the object yielded.

    Raises:
        RunFolderError: names `what`, the reason, and the last good checkpoint.
    """
    failure = SharedFailure(what.parent)
    with failure.kept():
        yield failure

    def describe(reason: str) -> RunFolderError:
        checkpoints = find_checkpoints(run_dir)
        last = "there is no checkpoint"
        if checkpoints:
            last = f"the last good checkpoint is {checkpoints[-1]}"
        return RunFolderError(f"{what}: could not be written ({reason}); {last}")

    failure.raise_together(describe)
