"""Messages between pipeline stages during rollouts, which do not wait for each other.

All ranks of a replica go through the same sequence of calls, so sends and receives pair up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.distributed.layout import ParallelLayout


class StageLink:
    """Activations from each pipeline stage to the next; point-to-point over the pipeline group."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._on_its_way: tuple[dist.Work, Tensor] | None = None

    def send(self, activations: Tensor) -> None:
        """Begin to send to the next stage, once the send before has arrived."""
        if self._on_its_way is not None:
            self._on_its_way[0].wait()
        target = self._layout.stage_ranks[self._layout.pp_rank + 1]
        work = dist.isend(activations, dst=target, group=self._layout.pp_group)
        assert work is not None
        self._on_its_way = work, activations

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Activations of the previous stage."""
        layout = self._layout
        activations = torch.empty(shape, dtype=dtype, device=layout.device)
        dist.recv(activations, src=layout.stage_ranks[layout.pp_rank - 1], group=layout.pp_group)
        return activations


class Announcement:
    """Integers that the last stage knows, on their way to every stage: a broadcast."""

    def __init__(self, values: Tensor | None, shape: Sequence[int], layout: ParallelLayout) -> None:
        if values is None:
            values = torch.empty(shape, dtype=torch.long, device=layout.device)
        self._values = values
        self._work = None
        if layout.pp_size > 1:
            self._work = dist.broadcast(
                values, src=layout.last_stage_rank, group=layout.pp_group, async_op=True
            )

    def wait(self) -> Tensor:
        """The integers; on a GPU the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._values


def take_turns(tasks: Sequence[Iterator[None]]) -> None:
    """Run tasks to their ends, each up to where it yields because it would wait for another stage.

    The order is the same on all ranks, so that the stages work on different tasks at a time.
    """
    running = list(tasks)
    while running:
        running = [task for task in running if next(task, _FINISHED) is not _FINISHED]


_FINISHED = object()
