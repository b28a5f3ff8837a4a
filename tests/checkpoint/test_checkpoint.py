"""Stop and resume: bit for bit at the same layout, at any other one to rounding."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from checkpoints_tools import inspect_checkpoint, megatron_to_hf
from tests.layouts import write_inputs
from tests.ranks import run_distributed
from tests.runs import make_trainer, read_metrics, train, weights_digest
from trb_megatron.checkpoint.checksums import SUMS_FILE, write_sums
from trb_megatron.checkpoint.folders import (
    RunFolderError,
    TrainingCheckpointError,
    find_checkpoints,
)
from trb_megatron.checkpoint.training import read_training_state, remove_checkpoint

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
    """Stopped after step 3, whose checkpoint is damaged, and started again."""
    run_dir = config_file.parent / "interrupted"
    options = (*OPTIONS, f"run.dir={run_dir}")
    train(config_file, WORLD_SIZE, *options, "training.steps=3")
    _flip_bit(run_dir / "checkpoints" / "step_3" / "metadata.json")
    # As a kill leaves it: while a checkpoint was written and an old one was removed.
    (run_dir / "checkpoints" / "step_5.partial").mkdir()
    (run_dir / "checkpoints" / "step_1.removed").mkdir()
    shutil.copytree(run_dir, config_file.parent / "elsewhere")
    train(config_file, WORLD_SIZE, *options, "training.steps=6")
    return run_dir


def test_resumed_run_is_bit_identical(undisturbed: Path, interrupted: Path) -> None:
    assert weights_digest(interrupted / "hf") == weights_digest(undisturbed / "hf")
    left = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert left == ["step_3.damaged", "step_4", "step_6"]
    assert read_metrics(interrupted) == read_metrics(undisturbed)


def _flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _find_good_ones(run_dir: Path, folder: Path) -> dict[str, tuple[str, int, list[str]]]:
    """For each damage done to the newest checkpoint: what is found instead, and what is said."""
    from trb_megatron.checkpoint.training import find_good_checkpoint

    newest = run_dir / "checkpoints" / "step_6"
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    found = {}
    for damage, name in itertools.product((Path.unlink, _flip_bit, _truncate), names):
        copy = folder / f"{damage.__name__} {name}".replace("/", " ")
        if dist.get_rank() == 0:
            shutil.copytree(run_dir, copy)
            damage(copy / "checkpoints" / "step_6" / name)
        dist.barrier()
        said: list[str] = []
        good = find_good_checkpoint(copy, said.append)
        assert good is not None
        dist.barrier()
        left = sorted(path.name for path in (copy / "checkpoints").iterdir())
        assert left == ["step_4", "step_6.damaged"]
        found[copy.name] = (str(good[0].relative_to(copy)), good[1].step, said)
    return found


def test_damage_to_any_file_makes_the_checkpoint_before_it_the_last_good_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    results = run_distributed(_find_good_ones, WORLD_SIZE, undisturbed, tmp_path)
    first, second = results
    files = [path for path in find_checkpoints(undisturbed)[-1].rglob("*") if path.is_file()]
    assert len(first) == 3 * len(files)
    for case, (good, step, said) in first.items():
        assert second[case] == (good, step, [])
        assert (good, step) == ("checkpoints/step_4", 4)
        name = case.split(maxsplit=1)[1].split()[-1]
        (line,) = said
        assert line.startswith(f"warning: {tmp_path / case}/checkpoints/step_6 is damaged (")
        assert f"{name} " in line or name == SUMS_FILE  # one bit less of it belies another file
        assert line.endswith(" and now called step_6.damaged")


def _fail_to_find(run_dir: Path) -> str:
    from trb_megatron.checkpoint.training import find_good_checkpoint

    with pytest.raises(TrainingCheckpointError) as caught:
        find_good_checkpoint(run_dir, print)
    return str(caught.value)


def test_run_without_a_good_checkpoint_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    first, last = find_checkpoints(run_dir)
    (first / SUMS_FILE).unlink()
    (last / "training_state.json").write_text('{"step": 6')
    write_sums(last)  # so it was written like this
    before = sorted(run_dir.rglob("*"))
    messages = run_distributed(_fail_to_find, WORLD_SIZE, run_dir)
    for message in messages:
        assert message.startswith(f"{run_dir}/checkpoints: no checkpoint is good (step_6: ")
        assert "step_6/training_state.json: cannot be read" in message
        assert "step_4: SHA256SUMS is missing" in message
        assert "start over with another run.dir" in message
    assert sorted(run_dir.rglob("*")) == before

    for checkpoint in (first, last):
        checkpoint.rename(checkpoint.with_name(checkpoint.name + ".damaged"))
    messages = run_distributed(_fail_to_find, 1, run_dir)
    assert "no checkpoint is good (step_4.damaged; step_6.damaged)" in messages[0]


def test_damaged_checkpoint_is_not_exported(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_6"
    file = min(checkpoint.glob("*.distcp"))
    _flip_bit(file)
    said = f"step_6: damaged: {file.name} differs from its sum in SHA256SUMS"
    for tool, arguments in (
        (megatron_to_hf, [str(tmp_path / "run"), str(tmp_path / "hf")]),
        (inspect_checkpoint, [str(checkpoint)]),
    ):
        with pytest.raises(SystemExit) as stop:
            tool.main(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    inspect_checkpoint.main([str(checkpoint), "--headers-only"])
    megatron_to_hf.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--step", "4"])


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


@pytest.mark.parametrize("sizes", [{6: 2}, {5: 4, 6: 2}], ids=str)
def test_run_resumes_at_another_layout(
    config_file: Path, undisturbed: Path, interrupted: Path, sizes: dict[int, int]
) -> None:
    """At TP 2 to step 6; at TP 4, where ranks share query groups, to step 5 and then at TP 2."""
    run_dir = config_file.parent / f"elsewhere-{len(sizes)}"
    shutil.copytree(config_file.parent / "elsewhere", run_dir)
    for steps, tp in sizes.items():
        layout = f"parallel.tensor_model_parallel_size={tp}"
        train(config_file, tp, *OPTIONS, layout, f"run.dir={run_dir}", f"training.steps={steps}")
    rows, expected = read_metrics(run_dir), read_metrics(undisturbed)
    assert len(rows) == len(expected) == 6
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert row["optim/grad_norm"] == pytest.approx(reference["optim/grad_norm"], rel=1e-4)


def _fail_to_save(config_file: Path, options: tuple[str, ...]) -> list[str]:
    """Train one step of a run and fail to save it, on all ranks and on the one that has to write.

    Returns:
        The messages of both failures.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    get_write = FileSystemWriterAsync.get_save_function_and_args
    fail = mock.Mock(side_effect=OSError(28, "No space left on device"))

    def get_failing_write(writer: FileSystemWriterAsync) -> tuple[Any, ...]:
        write, *others = get_write(writer)
        return None if write is None else fail, *others

    trainer = make_trainer(config_file, options)
    trainer.train_step()
    messages = []
    for owner, name, failing in (
        (dist_checkpointing, "save", fail),
        (FileSystemWriterAsync, get_write.__name__, get_failing_write),
    ):
        with mock.patch.object(owner, name, failing), pytest.raises(RunFolderError) as caught:
            trainer.save()
        messages.append(str(caught.value))
    return messages


def test_failed_save_leaves_the_last_checkpoint_and_names_it(
    config_file: Path, undisturbed: Path
) -> None:
    options = (*OPTIONS, f"run.dir={undisturbed}", "training.steps=9")
    before = find_checkpoints(undisturbed)
    messages = run_distributed(_fail_to_save, WORLD_SIZE, config_file, options)
    for message in itertools.chain(*messages):
        assert "step_7: could not be written (rank 0: No space left on device)" in message
        assert f"the last good checkpoint is {undisturbed}/checkpoints/step_6" in message
    assert find_checkpoints(undisturbed) == before
    assert not list((undisturbed / "checkpoints").glob("*.partial"))


def _other_prompts(folder: Path) -> str:
    prompts = (folder / "prompts.jsonl").read_text()
    (folder / "other.jsonl").write_text(prompts.replace("1+2=?", "2+1=?"))
    return f"data.path={folder}/other.jsonl"


def _other_weights(folder: Path) -> str:
    """One value of one tensor is another, in a file of the same size and modification time."""
    shutil.copytree(folder / "teacher", folder / "other-teacher")
    file = folder / "other-teacher" / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"teacher.path={folder}/other-teacher"


def _other_config(folder: Path) -> str:
    shutil.copytree(folder / "student", folder / "other-student")
    file = folder / "other-student" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    return f"student.path={folder}/other-student"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "optimizer.lr=0.5", r"another configuration \(optimizer.lr: saved 0.001, now "),
        (_other_prompts, r"other\.jsonl: these are not the prompts that .*step_6 was trained"),
        (_other_weights, r"other-teacher: these are not the teacher's weights with which .*step_6"),
        (_other_config, r"other-student: these are not the student's configuration with which"),
    ],
)
def test_run_folder_of_another_run_is_refused(
    config_file: Path,
    undisturbed: Path,
    tmp_path: Path,
    change: Callable[[Path], str],
    message: str,
) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(config_file.parent, folder, ignore=shutil.ignore_patterns("run*"))
    options = (*OPTIONS, f"run.dir={undisturbed}", "training.steps=9", change(folder))
    with pytest.raises(ValueError, match=message):
        run_distributed(_construct, 1, config_file, options)


def test_same_inputs_under_other_names_are_the_same_run(
    config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A link, a detour, a copy in two files, and a copied file of prompts."""
    folder = config_file.parent
    (tmp_path / "link").symlink_to(folder / "student")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    tensors = sorted(load_file(folder / "teacher" / "model.safetensors").items())
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for number, name in enumerate(files):
        save_file(dict(tensors[number::2]), tmp_path / "teacher" / name, metadata={"format": "pt"})
    weight_map = {tensor: files[number % 2] for number, (tensor, _) in enumerate(tensors)}
    (tmp_path / "teacher" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    shutil.copy(folder / "prompts.jsonl", tmp_path / "copy.jsonl")
    options = (
        *(*OPTIONS, f"run.dir={undisturbed}", "training.steps=9"),
        f"student.path={tmp_path}/teacher/../link",
        f"teacher.path={tmp_path}/teacher",
        f"data.path={tmp_path}/copy.jsonl",
    )
    run_distributed(_construct, 1, config_file, options)


def test_run_that_draws_by_another_rule_is_refused(
    config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    newest = find_checkpoints(run_dir)[-1]
    state = json.loads((newest / "training_state.json").read_text())
    del state["sampling"]  # as the first versions wrote it
    (newest / "training_state.json").write_text(json.dumps(state))
    write_sums(newest)
    options = (*OPTIONS, f"run.dir={run_dir}", "training.steps=9")
    with pytest.raises(
        TrainingCheckpointError, match=r"another rule \(inverse CDF; now Gumbel-max"
    ):
        run_distributed(_construct, 1, config_file, options)


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
        "trb_megatron.checkpoint.training.shutil.rmtree", side_effect=[None, KeyboardInterrupt]
    )
    with killed, pytest.raises(KeyboardInterrupt):
        remove_checkpoint(folder)
    assert find_checkpoints(tmp_path) == []
