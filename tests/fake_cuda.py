"""A GPU that is not there: shapes, types and devices are checked, values and time are not.

Under `FakeCuda` what is made on a GPU is a fake tensor, and what is made on the CPU is real. An
operation that mixes them fails, as it would on a GPU, and so does each read of a value by the host
that nobody planned. torch must be built for CUDA; no driver is needed.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map

import trb_megatron
from trb_megatron.distributed.layout import ParallelLayout

PACKAGE = str(Path(trb_megatron.__file__).parent)
MEMORY = 80 * 10**9
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class HostRead(NamedTuple):
    """A value that the host waits for: the functions of the package on the stack, outermost first,
    and the shape of the tensor that is read."""

    functions: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def reader(self) -> str:
        """The function that reads."""
        return self.functions[-1]


class FakeCuda(FakeTensorMode):
    """Fakes what lies on a GPU alone, and notes what the host reads of it.

    Args:
        planned: for each function of the package that may read, what it reads there: a number, with
            which the tensor is filled. Its nonzero elements have indices, too.
    """

    def __init__(self, planned: Mapping[str, float]) -> None:
        super().__init__()
        self.planned = planned
        self.reads: list[HostRead] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        has_fakes = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        devices = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
        if not has_fakes and "cuda" not in devices:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return self.read(args[0]).item()
        if func is _aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return self.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if func is _aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self.read(args[1]))
        if func is _aten.nonzero.default:
            size = int(self.read(args[0]).count_nonzero())
            indices = torch.empty(size, args[0].dim(), dtype=torch.long, device="meta")
            return FakeTensor(self, indices, torch.device("cuda", 0))

        def on_the_gpu(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
                return leaf
            if leaf.dim() > 0 and func not in _COPIES:
                raise AssertionError(f"{func}: a tensor of the CPU among those of the GPU")
            return self.from_tensor(leaf)

        args, kwargs = tree_map(on_the_gpu, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def read(self, tensor: Tensor) -> Tensor:
        """The planned value of a tensor, on the CPU."""
        functions = tuple(_functions_of_the_package())
        read = HostRead(functions, tuple(tensor.shape))
        assert read.reader in self.planned, f"{' > '.join(functions)} reads from the GPU"
        self.reads.append(read)
        return torch.full(tensor.shape, self.planned[read.reader], dtype=tensor.dtype)


def _functions_of_the_package() -> Iterator[str]:
    frames = []
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            frames.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return reversed(frames)


@contextmanager
def fake_cuda(planned: Mapping[str, float]) -> Iterator[FakeCuda]:
    """A process with a GPU of 80 GB, whose values nobody knows."""
    mode = FakeCuda(planned)
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY)),
        mock.patch.object(torch.cuda, "memory_reserved", lambda device=None: 0),
        mock.patch.object(torch.cuda, "memory_allocated", lambda device=None: 0),
        # A fake's own asks for the elements one by one.
        mock.patch.object(FakeTensor, "tolist", lambda tensor: mode.read(tensor).tolist()),
        mock.patch.object(torch.nn.Module, "to", _move),
        mock.patch.object(dist, "all_gather_object", _gather_the_same),
        mode,
    ):
        yield mode


def _move(
    module: torch.nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """`Module.to`, which cannot exchange a parameter's data for a fake."""
    for part in module.modules():
        for name, param in list(part.named_parameters(recurse=False)):
            if (param.device, param.dtype) != (device, dtype):
                moved = torch.nn.Parameter(
                    param.detach().to(device=device, dtype=dtype), param.requires_grad
                )
                moved.__dict__.update(param.__dict__)
                setattr(part, name, moved)
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    return module


def _gather_the_same(gathered: list[Any], value: Any, group: Any = None) -> None:
    """An all-gather of objects, in which the other ranks have what this one has."""
    gathered[:] = [value] * len(gathered)


def join_fake_world(
    world_size: int = 1, rank: int = 0, tp_size: int = 1, pp_size: int = 1
) -> ParallelLayout:
    """This process as a rank of a job whose other ranks are not there, on a GPU.

    What they would send is missing: a collective leaves its tensors as they are.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        create_gloo_process_groups=False,
    )
    return ParallelLayout(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=torch.device("cuda", 0),
    )


def run_alone(fn: Callable[..., Any], *args: Any, timeout_s: float = 240) -> Any:
    """The result of a function in a process of its own, in which nothing answers for the CPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(fn, *args).result(timeout_s)
