"""Training checkpoints: written beside and renamed into place, resumed at any parallel layout.

A checkpoint is a folder `checkpoints/step_N` of `megatron.core.dist_checkpointing` files (student
and optimizer), `training_state.json`, what an export needs of the HF checkpoint that the student
began as, and the sums of all these files. N is the number of updates done. A folder with that name
was complete and on the disk when it got it; one that is being written is called `step_N.partial`.
Before a run resumes, the newest folder is read against its sums, and if need be the one before it.
"""

from __future__ import annotations

import functools
import json
import pickle
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from trb_megatron.atomic_folder import PARTIAL_SUFFIX, finish_folder, start_folder
from trb_megatron.checkpoint.checksums import find_damage, write_sums
from trb_megatron.checkpoint.folders import (
    RunFolderError,
    TrainingCheckpointError,
    find_checkpoints,
    written_together,
)
from trb_megatron.checkpoint.megatron_tensors import carry_hf_files
from trb_megatron.checkpoint.safe_loading import no_code_from
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.tensors import CheckpointError
from trb_megatron.job.shared_failure import SharedFailure, from_rank_zero
from trb_megatron.update.optimizer import load_optimizer_state

STATE_FILE = "training_state.json"
# The one sharding type of the distributed optimizer that reshards over TP, PP and DP.
_CONTENT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class TrainingState:
    """The state of a run besides tensors.

    Attributes:
        step: updates done; also the next step's number, counted from 0.
        prompt_position: prompts consumed from the endless prompt order.
        num_skipped: steps without an update, because of a NaN or infinity.
        evaluation_is_due: the run was stopped before the evaluation that belongs to this step.
        inputs: digests of what the run reads (`run.inputs`), the prompts of `prompt_position` too.
        config: the resolved configuration as plain data.
        sampling: the rule by which random numbers become tokens (`behavior.sampling.RULE`).
    """

    step: int
    prompt_position: int
    num_skipped: int
    evaluation_is_due: bool
    inputs: dict[str, str]
    config: dict[str, Any]
    sampling: str = "inverse CDF"
    """The default is the rule of checkpoints that don't say theirs."""


def read_training_state(checkpoint: Path) -> TrainingState:
    """Read the plain part of a checkpoint.

    Raises:
        TrainingCheckpointError: the file is missing or broken.
    """
    file = checkpoint / STATE_FILE
    try:
        return TrainingState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise TrainingCheckpointError(f"{file}: cannot be read ({error})") from error


def find_good_checkpoint(
    run_dir: Path, say: Callable[[str], None]
) -> tuple[Path, TrainingState] | None:
    """The newest checkpoint that reads as it was written; None before the first one.

    Collective over all ranks, which read a share each. Once a good one is found, rank 0 renames
    newer, damaged ones to `step_N.damaged`. `say` gets a line for each.

    Raises:
        TrainingCheckpointError: there are checkpoints, and none is good; nothing was renamed.
        RunFolderError: a damaged one cannot be renamed.
    """
    folder = run_dir / "checkpoints"
    damages: dict[Path, str] = {}
    for checkpoint in from_rank_zero(lambda: find_checkpoints(run_dir)[::-1]):
        state = _check(checkpoint)
        if isinstance(state, TrainingState):
            with written_together(folder, run_dir):
                if dist.get_rank() == 0:
                    _set_aside(damages, say)
            return checkpoint, state
        damages[checkpoint] = state
    set_aside = from_rank_zero(lambda: sorted(path.name for path in folder.glob("step_*.damaged")))
    if damages or set_aside:
        found = [*(f"{path.name}: {damage}" for path, damage in damages.items()), *set_aside]
        raise TrainingCheckpointError(
            f"{folder}: no checkpoint is good ({'; '.join(found)}); put a good copy of one there, "
            "or start over with another run.dir"
        )
    return None


def _check(checkpoint: Path) -> TrainingState | str:
    """The state in a checkpoint, or what is wrong with it. Collective like `find_damage`."""
    damage = find_damage(checkpoint)
    if damage is not None:
        return damage

    def read() -> TrainingState | str:
        try:
            return read_training_state(checkpoint)
        except TrainingCheckpointError as error:
            return str(error)

    return from_rank_zero(read)


def _set_aside(damages: dict[Path, str], say: Callable[[str], None]) -> None:
    for checkpoint, damage in damages.items():
        aside = checkpoint.with_name(checkpoint.name + ".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)
        say(f"warning: {checkpoint} is damaged ({damage}) and now called {aside.name}")


def sharded_state(
    student: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """Student and optimizer as Megatron's distributed checkpoints describe them."""
    model_state = student.module.sharded_state_dict(metadata=_CONTENT)
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=_CONTENT
    )
    return {"model": model_state, "optimizer": optimizer_state}


def save_checkpoint(
    run_dir: Path,
    student: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    state: TrainingState,
    hf_config: HFModelConfig,
    keep: int,
) -> Path:
    """Write `checkpoints/step_N` and delete all but the last `keep` checkpoints.

    Collective over all ranks. `hf_config` is of the HF checkpoint that the student began as; what
    an export needs of it goes along.

    Raises:
        RunFolderError: the write failed, on a full disk for example; what was half written is
            removed, older checkpoints are untouched, and the message names the last one.
    """
    target = run_dir / "checkpoints" / f"step_{state.step}"
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    is_rank_zero = dist.get_rank() == 0
    writing = functools.partial(written_together, target, run_dir)
    try:
        with writing():
            if is_rank_zero:
                start_folder(target)
        with writing() as failure, _kept_in_megatron(failure):
            dist_checkpointing.save(
                sharded_state(student, optimizer, is_loading=False),
                str(partial),
                content_metadata=_CONTENT,
            )
        with writing():
            if is_rank_zero:
                carry_hf_files(hf_config, partial)
                text = json.dumps(asdict(state), indent=2)
                (partial / STATE_FILE).write_text(text, encoding="utf-8")
        with writing():
            write_sums(partial)
        with writing():
            if is_rank_zero:
                finish_folder(partial, target)
                _remove_old(run_dir, keep)
    except RunFolderError:
        if is_rank_zero:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


@contextmanager
def _kept_in_megatron(failure: SharedFailure) -> Iterator[None]:
    """Let the ranks stay together in `dist_checkpointing.save` when one of them cannot write.

    Between its collectives it writes files, some on rank 0 alone. An exception there would leave
    the other ranks waiting, so it is kept for later. For the same reason the writers report to a
    queue of this process: Megatron's own is a process more, which stays for all saves to come, and
    which a signal to all processes of the job ends.
    """

    def keep(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def keeping(*args: Any, **kwargs: Any) -> None:
            with failure.kept():
                write(*args, **kwargs)

        return keeping

    def get_save_function(writer: filesystem_async.FileSystemWriterAsync) -> tuple[Any, ...]:
        write, *others = original_get(writer)
        return None if write is None else keep(write), *others

    writer = filesystem_async.FileSystemWriterAsync
    original_get = writer.get_save_function_and_args
    replaced: list[tuple[Any, str, Any]] = [
        (filesystem_async, "_results_queue", queue.SimpleQueue()),
        (writer, "get_save_function_and_args", get_save_function),  # the tensors
        (writer, "finish", keep(writer.finish)),  # .metadata
        (serialization, "save_config", keep(serialization.save_config)),  # metadata.json
    ]
    if hasattr(common, "TorchCommonSaveStrategy"):  # megatron-core 0.16 writes common.pt
        strategy = common.TorchCommonSaveStrategy
        replaced.append((strategy, "save_common", keep(strategy.save_common)))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def _remove_old(run_dir: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what runs left that were killed."""
    for old in find_checkpoints(run_dir)[:-keep]:
        remove_checkpoint(old)
    for pattern in ("step_*.partial", "step_*.removed", "step_*.old"):
        for leftover in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(leftover)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks complete."""
    removed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)  # of a removal that was killed
    folder.rename(removed)
    shutil.rmtree(removed)


def load_checkpoint(
    checkpoint: Path, student: DistributedDataParallel, optimizer: MegatronOptimizer
) -> None:
    """Load student and optimizer, at the layout of this job, whatever layout wrote them.

    Collective over all ranks.

    Raises:
        TrainingCheckpointError: the checkpoint cannot be read.
    """
    state = _load(checkpoint, sharded_state(student, optimizer, is_loading=True))
    # Not strict: Transformer Engine's extra states are not saved.
    student.module.load_state_dict(state["model"], strict=False)
    load_optimizer_state(optimizer, state["optimizer"])


def _load(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    try:
        with no_code_from(checkpoint):
            return dist_checkpointing.load(sharded_state, str(checkpoint))
    except (
        *(CheckpointError, CheckpointingException, CheckpointException, OSError),
        pickle.UnpicklingError,
    ) as error:
        hint = ""
        if not (checkpoint / "common.pt").is_file():
            # megatron-core 0.19 stopped writing this file, which 0.16 needs.
            hint = "; common.pt is missing: was it written by a newer megatron-core than this one?"
        raise TrainingCheckpointError(
            f"{checkpoint}: cannot be loaded ({error}){hint}; remove the folder to resume from the "
            "checkpoint before it"
        ) from error
