"""Run a function on several ranks of a real `torch.distributed` group, one process each."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
) -> list[Any]:
    """Call `fn(*args)` on every rank of a fresh gloo group and return the results in rank order.

    `fn` must be importable (module level); `args` and results are pickled. The ranks meet through a
    file, so that no port can be taken by someone else. They are forked from a server that has
    imported the package and Megatron, so that they start at once; environment variables that a test
    sets later don't reach them.

    Raises the first exception of any rank, with that rank's traceback as a note; RuntimeError when
    a rank dies without one; TimeoutError after `timeout_s` seconds. No child survives the call.
    """
    # Read at import by the children's OpenMP runtime, before any code of ours runs there.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = get_context()
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_run_rank,
                    args=(rank, world_size, f"{folder}/store", timeout_s, payload, theirs),
                    daemon=False,  # Megatron's checkpoint writer starts processes of its own
                )
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            return _collect(connections, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                _kill_group(process)


def get_context() -> ForkServerContext:
    """A multiprocessing context, whose fork server has imported what ranks need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def _collect(connections: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        pending = {c: rank for rank, c in enumerate(connections) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} not done after {timeout_s} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending[connection]
            results[rank] = _receive(connection, rank)
    return [results[rank] for rank in range(len(connections))]


def _receive(connection: Connection, rank: int) -> Any:
    try:
        result, error, trace = pickle.loads(connection.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without an exception") from None
    if error is not None:
        error.add_note(f"on rank {rank}:\n{trace}")
        raise error
    return result


def _kill_group(process: BaseProcess) -> None:
    """Kill a rank and what it started, such as the processes of Megatron's checkpoint writer."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it died before it had a group of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _run_rank(
    rank: int, world_size: int, store: str, timeout_s: float, payload: bytes, report: Connection
) -> None:
    os.setpgrp()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        fn, args = pickle.loads(payload)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(store)), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        report.send_bytes(pickle.dumps((fn(*args), None, "")))
    except BaseException as error:
        report.send_bytes(_describe(error, traceback.format_exc()))
    # Stay until the parent has every rank's answer: leaving early would break the collectives of
    # the others, and their connection errors would hide the first cause.
    report.poll(None)


def _describe(error: BaseException, trace: str) -> bytes:
    try:
        description = pickle.dumps((None, error, trace))
        pickle.loads(description)
    except Exception:
        # Some exceptions cannot travel; their text still tells what happened.
        return pickle.dumps((None, RuntimeError(repr(error)), trace))
    return description


def vocab_shard(
    full_NV: Tensor, tp_group: dist.ProcessGroup | None, *, fill: float = float("nan")
) -> Tensor:
    """This rank's columns of a full tensor, padded with `fill` to a multiple of the group size."""
    if tp_group is None:
        return full_NV.clone()
    num_ranks, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    width = -(-full_NV.shape[-1] // num_ranks)
    padding = full_NV.new_full((len(full_NV), num_ranks * width - full_NV.shape[-1]), fill)
    return torch.cat((full_NV, padding), dim=-1)[:, rank * width : (rank + 1) * width].clone()


class ShardWidthGuard(TorchDispatchMode):
    """Fails on any tensor that is wider, or in total larger, than an [N, U] vocabulary shard."""

    def __init__(self, shard_NU: Tensor) -> None:
        super().__init__()
        self.width, self.size = shard_NU.shape[-1], shard_NU.numel()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and (
                max(value.shape, default=0) > self.width or value.numel() > self.size
            ):
                raise AssertionError(f"{func}: {tuple(value.shape)} exceeds the shard")
        return result
