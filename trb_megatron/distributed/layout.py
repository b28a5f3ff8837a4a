"""Process groups, ranks and devices: the only module that reads Megatron's parallel state."""

from __future__ import annotations

import datetime
import os
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from trb_megatron.config.conflicts import check_world_size
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed import cpu_backend

T = TypeVar("T")

# Warnings that importing and running Megatron causes, and that a user can do nothing about.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # in a conversion


@dataclass(frozen=True)
class ParallelLayout:
    """Where this rank stands: its groups, and its place in each of them.

    `tp_group`, `pp_group` and `dp_group` are torch process groups; ranks are positions in them. The
    TP x PP ranks of one model replica are those with the same `dp_rank`.
    """

    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its model replica: it has seen the tokens being drawn."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def stage_ranks(self) -> list[int]:
        """Global ranks of this rank's pipeline, first stage first."""
        return dist.get_process_group_ranks(self.pp_group)

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return self.stage_ranks[-1]


def initialize(config: ParallelConfig) -> ParallelLayout:
    """Join the job that torchrun describes (or a job of one process) and build Megatron's groups.

    The backend is NCCL where CUDA is present and gloo elsewhere; without CUDA the CPU backend is
    installed first.

    Raises:
        ConfigError: the world size is not a multiple of TP x PP.
    """
    # What Megatron's tensor-parallel layers ask for, so that communication overlaps the backward.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_cpu = cpu_backend.install()
    if on_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        backend = "gloo" if on_cpu else "nccl"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )

    check_world_size(config, dist.get_world_size())
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    model_parallel_cuda_manual_seed(0)  # Megatron asks for a state; nothing draws from it
    return ParallelLayout(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=device,
    )


def shutdown() -> None:
    """Leave the job together: destroy Megatron's groups and torch.distributed."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def gather_from_leaders(value: T, layout: ParallelLayout) -> list[T]:
    """The values of the leaders of all model replicas, in data-parallel order, on every rank.

    An all-gather of pickled objects over the world; values of other ranks are ignored.
    """
    gathered: list[tuple[int, T] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (layout.dp_rank, value) if layout.is_leader else None)
    return [item[1] for item in sorted((g for g in gathered if g is not None), key=lambda g: g[0])]


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and writes."""
    return dist.get_rank() == 0


def say(line: str) -> None:
    """Print a line on rank 0."""
    if is_rank_zero():
        print(line, flush=True)
