"""Patches of torch that let Megatron-Core run where there is no CUDA.

Megatron-Core asks torch.cuda for devices, streams and generators in a few places that a CPU run
passes through (data-parallel buffers, point-to-point communication, gradient clipping,
checkpoints). `install` answers those calls for the CPU. On a machine with CUDA it does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full")
_TENSOR_TYPE = torch.Tensor.type

_installed = False


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes "cuda" for the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


@dataclass(frozen=True)
class _Stream:
    """The one stream, and any event on it: everything has already happened."""

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def _type_name_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()` without arguments names CUDA types, which Megatron's optimizers assert."""
    if args or kwargs:
        return _TENSOR_TYPE(tensor, *args, **kwargs)
    # A subclass's or mode's __torch_function__ calls this method once more, by name.
    return "torch.cuda." + _TENSOR_TYPE(tensor).removeprefix("torch.").removeprefix("cuda.")


def install() -> bool:
    """Make the torch.cuda calls of Megatron-Core work on the CPU; call it before building a model.

    Returns:
        True when the CPU is the compute device, False (and nothing changed) when CUDA is present.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True

    def set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _Stream
    cuda.current_stream = lambda device=None: _Stream()
    cuda.get_rng_state = get_rng_state
    cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    torch.Tensor.type = _type_name_as_cuda  # type: ignore[method-assign, assignment]
    # `with torch.device(...)` looks factories up in a set that torch builds once: it has to hold
    # the originals, which are what its dispatch sees.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state
    _installed = True
    return True
