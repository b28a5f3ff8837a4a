"""Disks that fill up, become read-only or vanish, and folders with two jobs: one clear error."""

import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.faults import WORLD_SIZE, Job
from tests.layouts import write_inputs
from tests.runs import make_trainer

OPTIONS = (
    *("training.prompts_per_step=2", "rollout.max_response_tokens=8", "logging.tensorboard=true"),
    *("training.steps=4", "checkpoint.every=1"),
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", "size=16m", "none", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)


def _on_rank_zero(action: Callable[[], object]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _message(action: Callable[[], object]) -> str | None:
    """What an action says that cannot write; None when it can."""
    from trb_megatron.run_folder import RunFolderError

    try:
        action()
    except RunFolderError as error:
        return str(error)
    return None


def _make_read_only(run_dir: Path) -> None:
    _mount("--bind", str(run_dir), str(run_dir))
    _mount("-o", "remount,bind,ro", str(run_dir))


BREAKS: dict[str, Callable[[Path], None]] = {
    "vanished": shutil.rmtree,
    "read-only": _make_read_only,
}


def _break_folder(config_file: Path, run_dir: Path, how: str) -> list[str | None]:
    """What a record, a save and an export say on this rank once the folder is broken."""
    from trb_megatron.trainer import RunLog

    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    with RunLog(trainer.config, trainer.step) as log:
        metrics = trainer.train_step()
        log.record(1, metrics)
        trainer._save()
        trainer._export()
        trainer.train_step()
        _on_rank_zero(lambda: BREAKS[how](run_dir))
        return [
            _message(action)
            for action in (lambda: log.record(2, metrics), trainer._save, trainer._export)
        ]


def _check_broken_folder(config_file: Path, run_dir: Path, how: str, reason: str) -> None:
    files = ("metrics.jsonl", "checkpoints/step_2", "hf")
    last = {
        "vanished": "there is no checkpoint",
        "read-only": f"the last good checkpoint is {run_dir}/checkpoints/step_1",
    }[how]
    arguments = (config_file, run_dir, how)
    for messages in run_distributed(
        _break_folder, WORLD_SIZE, *arguments, start_method="forkserver"
    ):
        for file, message in zip(files, messages, strict=True):
            assert message is not None, file
            assert message.startswith(f"{run_dir}/{file}: could not be written (rank 0: ")
            assert reason in message and message.endswith(last), message
            assert "\n" not in message


def test_vanished_folder_is_named_and_not_made_again(config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _check_broken_folder(config_file, run_dir, "vanished", "No such file or directory")
    assert not run_dir.exists()


@pytest.mark.slow
def test_read_only_folder_is_named(config_file: Path, disk: Path) -> None:
    _check_broken_folder(config_file, disk / "run", "read-only", "Read-only file system")


def _limit_disk(disk: Path, *, free_files: int | None = None, free_pages: int | None = None) -> None:
    """Let so many files, or pages of 4 KB, more fit on the disk."""
    state = os.statvfs(disk)
    options = "remount,size=16m,nr_inodes=100000"
    if free_files is not None:
        options += f",nr_inodes={state.f_files - state.f_ffree + free_files}"
    if free_pages is not None:
        options += f",size={(state.f_blocks - state.f_bfree + free_pages) * state.f_bsize}"
    _mount("-o", options, str(disk))


def _fill_disk(config_file: Path, disk: Path) -> dict[str, list[str]]:
    """What a save and an export say when the disk is full at each file or page in turn."""
    from trb_megatron.checkpoint import find_good_checkpoint

    run_dir = disk / "run"
    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    trainer.train_step()
    trainer._save()
    found: dict[str, list[str]] = {}
    for name, action in (("save", trainer._save), ("export", trainer._export)):
        for kind, stride in (("free_files", 1), ("free_pages", 12)):
            trainer.step += name == "save"
            messages = found[f"{name}, {kind}"] = []
            for free in range(0, 10_000, stride):
                _on_rank_zero(lambda limit={kind: free}: _limit_disk(disk, **limit))
                message = _message(action)
                if message is None:
                    break
                messages.append(message)
                dist.barrier()  # rank 0 tidies up
                assert not list(disk.glob("run/**/*.partial"))
                good = find_good_checkpoint(run_dir, lambda line: pytest.fail(line))
                assert good is not None and message.endswith(str(good[0]))
            _on_rank_zero(lambda: _limit_disk(disk))
    return found


@pytest.mark.slow
def test_disk_that_is_full_at_any_file_or_page_ends_all_ranks(
    config_file: Path, disk: Path
) -> None:
    results = run_distributed(
        _fill_disk, WORLD_SIZE, config_file, disk, start_method="forkserver", timeout_s=500
    )
    assert results[0] == results[1]
    for case, messages in results[0].items():
        assert len(messages) >= 3, case
        for message in messages:
            assert "could not be written (rank" in message and "\n" not in message
            assert "No space left on device" in message, message


def _fill_records(config_file: Path, disk: Path) -> list[str | None]:
    """What a record says when metrics.jsonl, or the file of TensorBoard, does not fit."""
    from trb_megatron.trainer import RunLog

    run_dir = disk / "run"
    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    metrics = trainer.train_step()
    messages = []
    for pattern in ("metrics.jsonl", "tensorboard/*"):
        with pytest.raises(OSError) as caught, RunLog(trainer.config, 0) as log:
            log.record(1, metrics)
            _on_rank_zero(lambda name=pattern: [_fill_page(file) for file in run_dir.glob(name)])
            _on_rank_zero(lambda: _limit_disk(disk, free_pages=0))
            for step in range(2, 10):  # TensorBoard's library has a buffer
                log.record(step, metrics)
        messages.append(str(caught.value))
        _on_rank_zero(lambda: _limit_disk(disk))
    return messages


def _fill_page(file: Path) -> None:
    """Let the next byte of a file need another page of the disk."""
    os.truncate(file, -(-file.stat().st_size // 4096) * 4096)


@pytest.mark.slow
def test_records_on_a_full_disk_end_all_ranks(config_file: Path, disk: Path) -> None:
    for messages in run_distributed(
        _fill_records, WORLD_SIZE, config_file, disk, start_method="forkserver"
    ):
        for message in messages:
            assert "metrics.jsonl: could not be written (rank 0: " in message
            assert "No space left on device" in message
