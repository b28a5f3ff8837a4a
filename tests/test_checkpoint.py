"""Stop and resume: bit for bit at the same layout, at any other one to rounding."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import megatron_to_hf
from tests.distributed import run_distributed
from tests.layouts import write_inputs
from tests.runs import make_trainer, read_metrics, train, weights_digest
from trb_megatron.checkpoint import (
    TrainingCheckpointError,
    _remove,
    read_training_state,
)
from trb_megatron.run_folder import RunFolderError, find_checkpoints

WORLD_SIZE = 2  # two data-parallel replicas share the optimizer state
OPTIONS = ("checkpoint.every=2", "checkpoint.keep=2", "training.prompts_per_step=4")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def undisturbed(config_file: Path) -> Path:
    run_dir = config_file.parent / "undisturbed"
    train(config_file, WORLD_SIZE, *OPTIONS, f"run.dir={run_dir}", "training.steps=6")
    return run_dir


@pytest.fixture(scope="module")
def interrupted(config_file: Path, undisturbed: Path) -> Path:
    """Stopped after step 3, one step past its checkpoint, and started again."""
    run_dir = config_file.parent / "interrupted"
    options = (*OPTIONS, f"run.dir={run_dir}")
    train(config_file, WORLD_SIZE, *options, "training.steps=3")
    # As a kill leaves it: while the checkpoint of step 3 was written and an old one was removed.
    (run_dir / "checkpoints" / "step_3").rename(run_dir / "checkpoints" / "step_3.partial")
    (run_dir / "checkpoints" / "step_1.removed").mkdir()
    shutil.copytree(run_dir, config_file.parent / "elsewhere")
    train(config_file, WORLD_SIZE, *options, "training.steps=6")
    return run_dir


def test_resumed_run_is_bit_identical(undisturbed: Path, interrupted: Path) -> None:
    assert weights_digest(interrupted / "hf") == weights_digest(undisturbed / "hf")
    left = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert left == ["step_4", "step_6"]
    assert read_metrics(interrupted) == read_metrics(undisturbed)


def test_checkpoint_exports_what_the_run_exported(undisturbed: Path, tmp_path: Path) -> None:
    """The distributed optimizer's state lies beside; the HF folder is not needed any more."""
    megatron_to_hf.main([str(undisturbed), str(tmp_path / "hf"), "--step", "6"])
    ours, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", undisturbed / "hf")
    )
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (undisturbed / "hf" / name).read_bytes()


def test_last_checkpoints_are_kept(undisturbed: Path) -> None:
    assert [folder.name for folder in find_checkpoints(undisturbed)] == ["step_4", "step_6"]
    state = read_training_state(undisturbed / "checkpoints" / "step_4")
    assert (state.step, state.prompt_position) == (4, 16)


def test_run_resumes_at_another_layout(
    config_file: Path, undisturbed: Path, interrupted: Path
) -> None:
    run_dir = config_file.parent / "elsewhere"
    layout = "parallel.tensor_model_parallel_size=2"
    train(config_file, 2, *OPTIONS, layout, f"run.dir={run_dir}", "training.steps=6")
    rows, expected = read_metrics(run_dir), read_metrics(undisturbed)
    assert len(rows) == len(expected) == 6
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert row["optim/grad_norm"] == pytest.approx(reference["optim/grad_norm"], rel=1e-4)


def _fail_to_save(config_file: Path, options: tuple[str, ...]) -> str:
    """Train one step of a run and fail to save it; the message of the failure."""
    from megatron.core import dist_checkpointing

    trainer = make_trainer(config_file, options)
    trainer.train_step()
    full_disk = OSError(28, "No space left on device")
    with (
        mock.patch.object(dist_checkpointing, "save", side_effect=full_disk),
        pytest.raises(RunFolderError) as caught,
    ):
        trainer._save()
    return str(caught.value)


def test_failed_save_leaves_the_last_checkpoint_and_names_it(
    config_file: Path, undisturbed: Path
) -> None:
    options = (*OPTIONS, f"run.dir={undisturbed}", "training.steps=9")
    before = find_checkpoints(undisturbed)
    messages = run_distributed(_fail_to_save, WORLD_SIZE, config_file, options)
    for message in messages:
        assert "step_7: could not be written (rank 0: No space left on device)" in message
        assert f"the last good checkpoint is {undisturbed}/checkpoints/step_6" in message
    assert find_checkpoints(undisturbed) == before
    assert not list((undisturbed / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=0.5", r"another configuration \(optimizer.lr: saved 0.001, now 0.5\)"),
        ("data.path={folder}/other.jsonl", "another configuration .data.path"),
        ("", "these are not the prompts"),
    ],
)
def test_run_folder_of_another_run_is_refused(
    config_file: Path, undisturbed: Path, change: str, message: str
) -> None:
    folder = config_file.parent
    prompts = (folder / "prompts.jsonl").read_text()
    (folder / "other.jsonl").write_text(prompts)
    options = [*OPTIONS, f"run.dir={undisturbed}", "training.steps=9"]
    if change:
        options.append(change.format(folder=folder))
    else:  # the same file name, other prompts
        (folder / "prompts.jsonl").write_text(prompts.replace("1+2=?", "2+1=?"))
    try:
        with pytest.raises(ValueError, match=message):
            run_distributed(_construct, 1, config_file, tuple(options))
    finally:
        (folder / "prompts.jsonl").write_text(prompts)


def _construct(config_file: Path, options: tuple[str, ...]) -> Any:
    make_trainer(config_file, options)


def test_broken_training_state_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_3"
    folder.mkdir(parents=True)
    (folder / "training_state.json").write_text(json.dumps({"step": 3})[:-1])
    (tmp_path / "checkpoints" / "step_5.partial").mkdir()
    assert find_checkpoints(tmp_path) == [folder]
    with pytest.raises(TrainingCheckpointError, match=r"step_3/training_state\.json"):
        read_training_state(folder)


def test_removal_that_was_killed_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    (folder / "common.pt").touch()
    killed = mock.patch(
        "trb_megatron.checkpoint.shutil.rmtree", side_effect=[None, KeyboardInterrupt]
    )
    with killed, pytest.raises(KeyboardInterrupt):
        _remove(folder)
    assert find_checkpoints(tmp_path) == []
