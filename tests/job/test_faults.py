"""Disks that fill up, become read-only or vanish, and folders with two jobs: one clear error."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults import WORLD_SIZE, Job
from tests.layouts import write_inputs
from tests.ranks import get_context, run_distributed
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
    from trb_megatron.checkpoint.folders import RunFolderError

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
    from trb_megatron.run.log import RunLog

    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    with RunLog(trainer.config, trainer.step) as log:
        metrics = trainer.train_step()
        log.record(1, metrics)
        trainer.save()
        trainer.export()
        trainer.train_step()
        _on_rank_zero(lambda: BREAKS[how](run_dir))
        return [
            _message(action)
            for action in (lambda: log.record(2, metrics), trainer.save, trainer.export)
        ]


def _check_broken_folder(config_file: Path, run_dir: Path, how: str, reason: str) -> None:
    files = ("metrics.jsonl", "checkpoints/step_2", "hf")
    last = {
        "vanished": "there is no checkpoint",
        "read-only": f"the last good checkpoint is {run_dir}/checkpoints/step_1",
    }[how]
    arguments = (config_file, run_dir, how)
    for messages in run_distributed(_break_folder, WORLD_SIZE, *arguments):
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


def _limit_disk(
    disk: Path, *, free_files: int | None = None, free_pages: int | None = None
) -> None:
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
    from trb_megatron.checkpoint.training import find_good_checkpoint

    run_dir = disk / "run"
    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    trainer.train_step()
    trainer.save()
    found: dict[str, list[str]] = {}
    for name, action in (("save", trainer.save), ("export", trainer.export)):
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
    results = run_distributed(_fill_disk, WORLD_SIZE, config_file, disk, timeout_s=500)
    assert results[0] == results[1]
    for case, messages in results[0].items():
        assert len(messages) >= 3, case
        for message in messages:
            assert "could not be written (rank" in message and "\n" not in message
            assert "No space left on device" in message, message


def _fill_records(config_file: Path, disk: Path) -> list[str | None]:
    """What a record says when metrics.jsonl, or the file of TensorBoard, does not fit."""
    from trb_megatron.checkpoint.folders import RunFolderError
    from trb_megatron.run.log import RunLog

    run_dir = disk / "run"
    trainer = make_trainer(config_file, (*OPTIONS, f"run.dir={run_dir}"))
    metrics = trainer.train_step()
    messages = []
    for pattern in ("metrics.jsonl", "tensorboard/*"):
        with pytest.raises(RunFolderError) as caught, RunLog(trainer.config, 0) as log:
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
    for messages in run_distributed(_fill_records, WORLD_SIZE, config_file, disk):
        for message in messages:
            assert "metrics.jsonl: could not be written (rank 0: " in message
            assert "No space left on device" in message


def test_job_ends_when_its_folder_vanishes(config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Job(config_file, (*OPTIONS, f"run.dir={run_dir}"), tmp_path / "job") as job:
        job.wait_until(lambda: job.mark(0) == ("rollout", 1))
        shutil.rmtree(run_dir)
        statuses = job.wait()
    assert len(statuses) == WORLD_SIZE and all(statuses), job.output()
    for rank in range(WORLD_SIZE):
        last_line = (tmp_path / "job" / f"rank_{rank}.log").read_text().splitlines()[-1]
        assert f"RunFolderError: {run_dir}/" in last_line
        assert "could not be written (rank 0: " in last_line
    assert not run_dir.exists()


# The lock


def _hold_lock(run_dir: Path, ready: Any, leave_child: bool) -> None:
    """Hold the lock, in this process or only in a child that it leaves behind."""
    from trb_megatron.run.folder import lock_run_folder

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lock = lock_run_folder(run_dir, say=print)
    if leave_child:
        child = os.fork()
        if child:
            ready.send(child)
            return
    else:
        ready.send(os.getpid())
    time.sleep(100)
    lock.close()


@pytest.mark.parametrize("leave_child", [False, True], ids=["a job", "what a job left behind"])
def test_folder_of_another_job_is_refused_until_that_is_dead(
    tmp_path: Path, leave_child: bool
) -> None:
    run_dir = tmp_path / "run"
    context = get_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold_lock, args=(run_dir, theirs, leave_child))
    process.start()
    holder = ours.recv()
    try:
        message, said = _lock(run_dir, 0.5)
        host, pid = socket.gethostname(), process.pid
        assert f"run.dir={run_dir}: in use by process {pid} on {host} since 20" in message
        assert said == [
            f"{run_dir}/lock: held by {message.split(' by ')[1].split(';')[0]}; "
            "waiting up to 0 s for it to end"
        ]
        killer = threading.Timer(1.0, os.kill, (holder, signal.SIGKILL))
        killer.start()
        assert _lock(run_dir, 60)[0] is None
    finally:
        with suppress(ProcessLookupError):
            os.kill(holder, signal.SIGKILL)
        process.join()


def _lock(run_dir: Path, patience_s: float) -> tuple[str | None, list[str]]:
    """How a job of two ranks fares with the lock, whose processes then end, and what it says."""
    arguments = (run_dir, patience_s)
    (first, said), (second, _) = run_distributed(_try_lock, 2, *arguments)
    assert first == second
    return first, said


def _try_lock(run_dir: Path, patience_s: float) -> tuple[str | None, list[str]]:
    from trb_megatron.run.folder import lock_run_folder

    said: list[str] = []
    try:
        lock_run_folder(run_dir, say=said.append, patience_s=patience_s)
    except ValueError as error:
        return str(error), said
    return None, said


def _lock_while_rank_one_lives(run_dir: Path) -> bool | None:
    """Whether another job may lock the folder once rank 0 has let go; asked on rank 0."""
    import fcntl

    from trb_megatron.run.folder import lock_run_folder

    lock = lock_run_folder(run_dir, say=print)
    is_free = None
    if dist.get_rank() == 0:
        lock.close()
        with (run_dir / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = True
            except BlockingIOError:
                is_free = False
    dist.barrier()
    lock.close()
    return is_free


def test_folder_is_locked_while_any_rank_lives(tmp_path: Path) -> None:
    results = run_distributed(_lock_while_rank_one_lives, 2, tmp_path / "run")
    assert results == [False, None]
