"""SHA-256 sums of the files of a checkpoint, which `sha256sum -c SHA256SUMS` checks, too.

In a job the ranks divide the hashing between them, file by file; they share the file system.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from trb_megatron.huggingface.tensors import CheckpointError
from trb_megatron.job.shared_failure import from_rank_zero

T = TypeVar("T")

SUMS_FILE = "SHA256SUMS"
# Megatron's index, without which nothing is read, is listed last: a list that was cut short lacks
# it. Files that are not listed, such as a note of the user's, do no harm.
_LAST_FILE = ".metadata"
_THREADS = 4  # of a rank; hashing releases the interpreter lock


def write_sums(folder: Path) -> None:
    """Write the sums of all files of a Megatron checkpoint into its SHA256SUMS.

    In a job: collective over all ranks, an all-gather of the sums; rank 0 writes.

    Raises:
        OSError: a file cannot be read (on all ranks), or SHA256SUMS not be written (on rank 0).
    """
    sizes = from_rank_zero(lambda: _file_sizes(folder))
    sizes.pop(SUMS_FILE, None)  # of an earlier time
    sums, unreadable = _hash_together(folder, sizes)
    for name, reason in unreadable.items():
        raise OSError(f"{folder / name}: {reason}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        names = sorted(sums, key=lambda name: (name == _LAST_FILE, name))
        text = "".join(_format_line(sums[name], name) for name in names)
        (folder / SUMS_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))


def find_damage(folder: Path) -> str | None:
    """Read all of a Megatron checkpoint; the first file that is not as it was written, and why.

    In a job: collective over all ranks, an all-gather of the sums; the same answer on all of them.
    """
    listed = from_rank_zero(lambda: _read_sums(folder))
    if isinstance(listed, str):
        return listed
    expected, sizes = listed
    sums, unreadable = _hash_together(folder, sizes)
    for name in sorted(expected):
        if name in unreadable:
            return f"{name} cannot be read ({unreadable[name]})"
        if sums[name] != expected[name]:
            return f"{name} differs from its sum in {SUMS_FILE}"
    return None


def check_sums(folder: Path) -> None:
    """Refuse a Megatron checkpoint that is not as it was written. Collective like `find_damage`.

    Raises:
        CheckpointError: names the folder, the file and what is wrong with it.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise CheckpointError(f"{folder}: damaged: {damage}")


def _file_sizes(folder: Path) -> dict[str, int]:
    """Path below `folder` and bytes of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _read_sums(folder: Path) -> tuple[dict[str, str], dict[str, int]] | str:
    """Sum and bytes of each listed file, or what is wrong."""
    try:
        lines = (folder / SUMS_FILE).read_bytes().decode("utf-8", "surrogateescape").split("\n")
        present = _file_sizes(folder)
    except FileNotFoundError:
        return f"{SUMS_FILE} is missing"
    except OSError as error:
        return f"{SUMS_FILE} cannot be read ({error.strerror})"
    entries = [_parse_line(line) for line in lines[:-1]]
    expected = {entry[1]: entry[0] for entry in entries if entry is not None}
    if lines[-1] or None in entries or _LAST_FILE not in expected:
        return f"{SUMS_FILE} is broken or cut short"
    missing = sorted(set(expected) - set(present))
    if missing:
        return f"{missing[0]} is missing"
    return expected, {name: present[name] for name in expected}


def _format_line(digest: str, name: str) -> str:
    r"""A line of GNU sha256sum, which marks a name with escapes by a leading backslash."""
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _parse_line(line: str) -> tuple[str, str] | None:
    """Digest and name of a line; None when it is none."""
    match = re.fullmatch(r"(\\?)([0-9a-f]{64})  (.+)", line)
    if match is None:
        return None
    name = match[3]
    if match[1]:
        characters = {"n": "\n", "r": "\r", "\\": "\\"}
        name = re.sub(r"\\([nr\\])", lambda escape: characters[escape[1]], name)
    return match[2], name


def _hash_together(folder: Path, sizes: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of files, and why others could not be read; on every rank those of all ranks."""
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sums, unreadable = _hash(folder, _divide(sizes, num_ranks)[rank])
    for other_sums, other_unreadable in _gather((sums, unreadable)):
        sums |= other_sums
        unreadable |= other_unreadable
    return sums, unreadable


def _divide(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Shares of about equal bytes: largest file first, each to the rank with least to do."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    num_bytes = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = num_bytes.index(min(num_bytes))
        shares[rank].append(name)
        num_bytes[rank] += sizes[name]
    return shares


def _hash(folder: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of files, and why others could not be read."""
    sums, unreadable = {}, {}

    def hash_one(name: str) -> None:
        try:
            with (folder / name).open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            unreadable[name] = error.strerror or str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(hash_one, names))
    return sums, unreadable


def _gather(value: T) -> list[T]:
    """The values of all ranks: an all-gather where there is a job."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]
