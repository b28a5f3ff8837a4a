"""Run a function on many ranks of one process, a thread each, with right collectives.

For the mathematics of more ranks than a machine has processors for. The group is that of PyTorch's
own tests: a collective waits for the threads of all ranks, then copies and sums. It has no
transport and does not check that all ranks ask for the same collective; `tests/test_local_ranks.py`
holds that two threads find the bits of two processes, and `tests/layouts.py` runs whole steps on
real ones.

`torch.distributed._local_tensor.LocalTensorMode`, one thread whose tensors hold the values of all
ranks, cannot run the code of this package: `dist.get_rank` is 0 for every rank there, and a branch,
a slice or a numpy array that differs between ranks is an error.
"""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

Found = TypeVar("Found")
TP_SIZES = (1, 2, 4, 8, 16)
"""Those that the mathematics on shards is tested at."""
_END_S = 10
_here = threading.local()


def current_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group of this thread or of all processes, or None without others."""
    if hasattr(_here, "tp_group"):
        return _here.tp_group
    return dist.group.WORLD if dist.is_initialized() else None


def on_ranks(measure: Callable[[], Found], tp_size: int) -> list[Found]:
    """What a function finds on each rank of a tensor-parallel group; a lone one is the caller.

    At 2 there are two groups, as of two replicas, whose results follow each other: who asks all
    ranks instead of those of the group gets something else.
    """
    if tp_size == 1:
        return [measure()]
    return run_locally(measure, tp_size, num_groups=2 if tp_size == 2 else 1)


def run_locally(
    fn: Callable[..., Found],
    tp_size: int,
    *args: Any,
    num_groups: int = 1,
    timeout_s: float = 120,
) -> list[Found]:
    """Call `fn(*args)` in `tp_size * num_groups` threads and return the results in rank order.

    Each thread is a rank of a fresh world, of which `tp_size` ranks in a row have a group of their
    own (`current_group`). Arguments are shared, not copied, and so is the global generator of
    random numbers: `fn` must leave both alone.

    Raises the first exception of any rank, with that rank's traceback as a note; TimeoutError after
    `timeout_s` seconds. Afterwards no thread waits in a collective.
    """
    world_size = tp_size * num_groups
    outcomes: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    store = dist.HashStore()

    def run(rank: int) -> None:
        result, error = None, None
        try:
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size)
            _here.tp_group = _own_group(rank, tp_size, num_groups)
            result = fn(*args)
        except BaseException as caught:
            caught.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
            error = caught
        outcomes.put((rank, result, error))
        dist.destroy_process_group()

    with _threaded_world():
        threads = [
            threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(world_size)
        ]
        for thread in threads:
            thread.start()
        try:
            return _collect(outcomes, world_size, timeout_s)
        except BaseException as error:
            ProcessLocalGroup.exception_handle(error)  # who waits in a collective ends
            raise
        finally:
            for thread in threads:
                thread.join(_END_S)


def _own_group(rank: int, tp_size: int, num_groups: int) -> dist.ProcessGroup | None:
    if num_groups == 1:
        return dist.group.WORLD
    starts = range(0, num_groups * tp_size, tp_size)
    groups = [dist.new_group(list(range(start, start + tp_size))) for start in starts]
    return groups[rank // tp_size]


def _collect(
    outcomes: "queue.SimpleQueue[tuple[int, Any, BaseException | None]]",
    world_size: int,
    timeout_s: float,
) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < world_size:
        try:
            rank, result, error = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            pending = sorted(set(range(world_size)) - results.keys())
            raise TimeoutError(f"ranks {pending} not done after {timeout_s} s") from None
        if error is not None:
            raise error
        results[rank] = result
    return [results[rank] for rank in range(world_size)]


@contextmanager
def _threaded_world() -> Iterator[None]:
    """Process groups that belong to threads, in C++ and in Python."""
    hook = sys.excepthook  # each group wraps it, to print its rank
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        yield
    finally:
        ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        sys.excepthook = hook
