"""Folders and files that exist under their name only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


def start_folder(target: Path) -> Path:
    """Make an empty `<target>.partial` to write into, dropping what an earlier attempt left.

    Raises:
        FileNotFoundError: the folder that `target` is in does not exist (any more).
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def finish_folder(partial: Path, target: Path) -> None:
    """Flush a complete folder to the disk and put it in the place of an older one.

    A process that dies in between leaves the old folder as `<target>.old` and the new one, which
    the next attempt replaces, as `<target>.partial`.
    """
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `target` when the block ends.

    When the block raises, what it wrote is removed.

    Raises:
        FileExistsError: `target` exists, and `overwrite` is not set.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder, or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = start_folder(target)
    try:
        yield partial
        finish_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it."""
    beside = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    os.replace(beside, path)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
