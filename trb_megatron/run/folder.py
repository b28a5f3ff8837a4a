"""The folder of a run: it belongs to one configuration, and one job at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from trb_megatron.atomic_folder import write_file
from trb_megatron.checkpoint.folders import written_together
from trb_megatron.config.options import Config
from trb_megatron.config.reading import load_config, save_config
from trb_megatron.config.resume import fingerprint_difference
from trb_megatron.config.values import ConfigError
from trb_megatron.distributed.layout import is_rank_zero
from trb_megatron.job.shared_failure import from_rank_zero
from trb_megatron.run.commit import git_commit

CONFIG_FILE = "config.yaml"
LOCK_FILE = "lock"
_PATIENCE_S = 60.0  # for a job that is being killed to be gone
_POLL_S = 0.2


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that cannot be made, or that belongs to another configuration.

    Raises:
        ConfigError: says which, and names the differences.
    """
    nearest = next(p for p in (config.run.dir, *config.run.dir.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"run.dir={config.run.dir}: {nearest} is not a folder that can be written to; choose "
            "another run.dir"
        )
    file = config.run.dir / CONFIG_FILE
    if file.is_file():
        check_same_run(config.run.dir, load_config(file), config)


def write_run_folder(config: Config) -> None:
    """Record the resolved configuration and the commit, make a place for checkpoints.

    Rank 0 writes; collective over all ranks.

    Raises:
        RunFolderError: the folder cannot be written to.
    """
    file = config.run.dir / CONFIG_FILE
    with written_together(file, config.run.dir):
        if is_rank_zero():
            save_config(config, file)
            write_file(config.run.dir / "commit.json", json.dumps({"commit": git_commit()}) + "\n")
            (config.run.dir / "checkpoints").mkdir(exist_ok=True)


def check_same_run(where: Path, saved: Config, now: Config) -> None:
    """Refuse to go on with `saved`, found in `where`, under a configuration that differs.

    Raises:
        ConfigError: names the first differences.
    """
    differences = fingerprint_difference(saved, now)
    if differences:
        raise ConfigError(
            f"{where}: belongs to a run with another configuration "
            f"({'; '.join(differences[:3])}); choose another run.dir or restore the configuration"
        )


def lock_run_folder(
    run_dir: Path, *, say: Callable[[str], None], patience_s: float = _PATIENCE_S
) -> BinaryIO:
    """Make the folder of a run if need be, and keep other jobs out of it.

    Collective over all ranks, with broadcasts of objects and a barrier. Rank 0 locks the file
    `lock` exclusively (flock), then every rank shares the lock until its process ends, however it
    ends. So the folder of a killed job is free when all ranks are gone, and with them all that
    they forked. Where the file system has no such locks, a warning is
    all.

    Returns:
        The open file that holds the lock.

    Raises:
        ConfigError: another job held the lock for `patience_s` seconds; names host and process.
        RunFolderError: the folder cannot be written to.
    """
    path = run_dir / LOCK_FILE
    holder = None
    with written_together(path, run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        if dist.get_rank() == 0:
            holder = _claim(file, say, patience_s)
    holder = from_rank_zero(lambda: holder)
    if holder is not None:
        raise ConfigError(
            f"run.dir={run_dir}: in use by {holder}; wait until that ends, or choose another "
            "run.dir"
        )
    if dist.get_rank() != 0:
        _lock(file, fcntl.LOCK_SH, say)
    dist.barrier()  # from here on each rank holds it
    return file


def _claim(file: BinaryIO, say: Callable[[str], None], patience_s: float) -> str | None:
    """Lock out other jobs and note who does so; or say who is still there after the time."""
    deadline = time.monotonic() + patience_s
    has_told = False
    while True:
        if _lock(file, fcntl.LOCK_EX, say):
            file.truncate(0)
            started = datetime.now(UTC).isoformat(" ", "seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}".encode())
            file.flush()
            if _lock(file, fcntl.LOCK_SH, say):  # not atomic: someone may get in between
                return None
        file.seek(0)
        holder = file.read().decode("utf-8", "replace")
        if time.monotonic() > deadline:
            return holder
        if not has_told:
            say(f"{file.name}: held by {holder}; waiting up to {patience_s:.0f} s for it to end")
            has_told = True
        time.sleep(_POLL_S)


def _lock(file: BinaryIO, operation: int, say: Callable[[str], None]) -> bool:
    """Take a lock without waiting; False when it is taken."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        say(
            f"warning: {file.name}: the file system has no locks ({error.strerror}); see to it "
            "that no other job writes into this folder"
        )
    return True
