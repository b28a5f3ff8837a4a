"""Training checkpoints: written beside and renamed into place, resumed at any parallel layout.

A checkpoint is a folder `checkpoints/step_N` of `megatron.core.dist_checkpointing` files (student
and optimizer), `training_state.json`, and what an export needs of the HF checkpoint that the
student began as. N is the number of updates done. A folder with that name is complete; one that is
being written is called `step_N.partial`.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from trb_megatron.hf_checkpoint import CheckpointError
from trb_megatron.hf_config import HFModelConfig
from trb_megatron.hf_weights import expected_tensors
from trb_megatron.megatron_tensors import carry_hf_files
from trb_megatron.optimizer import load_optimizer_state
from trb_megatron.safe_loading import check_scaling_states, no_code_from

STATE_FILE = "training_state.json"
# The one sharding type of the distributed optimizer that reshards over TP, PP and DP.
_CONTENT = {"distrib_optim_sharding_type": "fully_reshardable"}


class TrainingCheckpointError(ValueError):
    """A checkpoint that could not be written or read; the message names it."""


@dataclass(frozen=True)
class TrainingState:
    """What a run must remember besides tensors.

    Attributes:
        step: updates done; also the next step's number, counted from 0.
        prompt_position: prompts consumed from the endless prompt order.
        num_skipped: steps without an update, because of a NaN or infinity.
        evaluation_is_due: the run was stopped before the evaluation that belongs to this step.
        data_fingerprint: of the prompt set that the position refers to.
        config: the resolved configuration as plain data.
    """

    step: int
    prompt_position: int
    num_skipped: int
    evaluation_is_due: bool
    data_fingerprint: str
    config: dict[str, Any]


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


def _sharded_state(
    student: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
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
        TrainingCheckpointError: the write failed, on a full disk for example; what was half written
            is removed, older checkpoints are untouched, and the message names the last one.
    """
    target = run_dir / "checkpoints" / f"step_{state.step}"
    partial = target.with_name(target.name + ".partial")
    error: Exception | None = None
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as failure:
        error = failure
    _raise_together(error, run_dir, target)

    try:
        dist_checkpointing.save(
            _sharded_state(student, optimizer, is_loading=False),
            str(partial),
            content_metadata=_CONTENT,
        )
        if dist.get_rank() == 0:
            names = expected_tensors(hf_config, student.module.vocab_size)
            carry_hf_files(hf_config.path, names, partial)
            (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    except Exception as failure:  # any failure of any rank must stop all ranks, with the reason
        error = failure
    _raise_together(error, run_dir, target)

    if dist.get_rank() == 0:
        _remove(target)
        partial.rename(target)
        for old in find_checkpoints(run_dir)[:-keep]:
            _remove(old)
        for pattern in ("step_*.partial", "step_*.removed"):  # of runs that were killed
            for leftover in target.parent.glob(pattern):
                shutil.rmtree(leftover)
    dist.barrier()
    return target


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks complete."""
    removed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)  # of a removal that was killed
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)


def _raise_together(error: Exception | None, run_dir: Path, target: Path) -> None:
    """Raise on all ranks when one of them failed. An all-gather over the world."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    failed = [(rank, message) for rank, message in enumerate(errors) if message is not None]
    if not failed:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
    checkpoints = find_checkpoints(run_dir)
    last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is none yet"
    rank, message = failed[0]
    raise TrainingCheckpointError(
        f"{target}: the checkpoint could not be written (rank {rank}: {message}); {last}"
    ) from error


def load_checkpoint(
    checkpoint: Path, student: DistributedDataParallel, optimizer: MegatronOptimizer
) -> None:
    """Load student and optimizer, at the layout of this job, whatever layout wrote them.

    Collective over all ranks.

    Raises:
        TrainingCheckpointError: the checkpoint cannot be read.
    """
    state = _load(checkpoint, _sharded_state(student, optimizer, is_loading=True))
    # Not strict: Transformer Engine's extra states are not saved.
    student.module.load_state_dict(state["model"], strict=False)
    load_optimizer_state(optimizer, state["optimizer"])


def _load(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    try:
        with no_code_from(checkpoint):
            state = dist_checkpointing.load(sharded_state, str(checkpoint))
            check_scaling_states(state["model"])
            return state
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
