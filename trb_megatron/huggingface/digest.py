"""Digests of weights: by content, however the files are called and the tensors spread over them."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from trb_megatron.huggingface.tensors import HFTensors

_MAX_THREADS = 8


def file_stamps(tensors: HFTensors) -> list[list[str | int]]:
    """Where each file lies, its size and times: while they stay, so does the content.

    Unpacked archives and images give other files the same names, sizes and modification times. The
    change time, which nobody can set, and the file itself (device, inode) tell them apart.
    """
    files = [file.resolve() for file in tensors.files]
    stats = [(str(file), file.stat()) for file in files]
    return [
        [path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for path, stat in stats
    ]


def digest_share(
    tensors: HFTensors, names: Iterable[str], rank: int, num_ranks: int
) -> dict[str, str]:
    """SHA-256 of this rank's share of the named tensors; all ranks together have each one."""
    sizes = {name: torch.Size(tensors.shape(name)).numel() for name in names}
    share = sorted(sizes, key=lambda name: (-sizes[name], name))[rank::num_ranks]
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // num_local))
    with ThreadPoolExecutor(num_threads) as threads:  # hashing releases the interpreter's lock
        digests = threads.map(lambda name: _digest(tensors, name), share)
        return dict(zip(share, digests, strict=True))


def join_digests(digests: Mapping[str, str]) -> str:
    """One digest of named digests, in the order of their names."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(tensors: HFTensors, name: str) -> str:
    """Of a tensor's type, shape and bytes."""
    tensor = tensors.slice(name)[:].contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
