"""The options and messages that all commands for checkpoints share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

import trb_megatron.distributed.layout  # noqa: F401  (silences Megatron's import warnings)
from trb_megatron.huggingface.kinds import Shape
from trb_megatron.huggingface.param_mapping import MappedParam

PARALLEL_OPTIONS = ("--tensor-parallel", "--pipeline-parallel")
# Buffers, the metadata of all tensors, and what the allocator holds back.
_OVERHEAD_BYTES = 128 * 2**20


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that writes a checkpoint folder."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print each tensor's mapping and the memory needed, write nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")


def run(command: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> None:
    """Run a command; what a user must change ends it with one line and exit status 2."""
    try:
        command(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Progress:
    """A bar of bytes done, speed and time left; silent where no one is looking."""

    def __init__(self, total_bytes: int) -> None:
        self._bar = tqdm(
            total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        )

    def __enter__(self) -> Progress:
        return self

    def update(self, num_bytes: int) -> None:
        self._bar.update(num_bytes)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """The size of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def print_plan(
    params: Mapping[str, MappedParam], dtypes: Mapping[str, torch.dtype], peak_bytes: int
) -> None:
    """Print each parameter, its shape and type and its HF tensors; then sizes."""
    total = 0
    for name, param in params.items():
        dtype = dtypes[param.key]
        total += num_bytes(param.full_shape, dtype)
        sources = ", ".join(
            f"{hf_name} {list(shape)}"
            for hf_name, shape in zip(param.hf_names, param.hf_shapes, strict=True)
        )
        print(f"{name} {list(param.full_shape)} {str(dtype)[6:]} = {sources}")
    print(
        f"{len(params):,} parameters, {total / 2**30:.2f} GiB; memory needed: largest tensor "
        f"{peak_bytes / 2**20:,.0f} MiB, with buffers at most "
        f"{(peak_bytes + _OVERHEAD_BYTES) / 2**20:,.0f} MiB besides the interpreter's own"
    )
