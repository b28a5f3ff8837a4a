"""The options and messages that all commands for checkpoints share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import trb_megatron.distributed.layout  # noqa: F401  (silences Megatron's import warnings)
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.kinds import Shape, TensorSlice
from trb_megatron.huggingface.model_tensors import open_model
from trb_megatron.huggingface.param_mapping import MappedParam
from trb_megatron.huggingface.tensors import (
    HFTensors,
    ShardWriter,
    TensorInfo,
    plan_shards,
    shard_name,
    write_index,
)

PARALLEL_OPTIONS = ("--tensor-parallel", "--pipeline-parallel")
# Buffers, the metadata of all tensors, and what the allocator holds back.
_OVERHEAD_BYTES = 128 * 2**20

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that writes a checkpoint folder."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print each tensor's mapping and the memory needed, write nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")


def add_shard_size_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of a command that writes a Hugging Face folder."""
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=parse_size("5GB"),
        metavar="SIZE",
        help=f"largest safetensors file, in {', '.join(_UNITS)} (default: 5GB)",
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        argparse.ArgumentTypeError: not a positive number followed by a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write a number and one of {', '.join(_UNITS)}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def parse_count(text: str) -> int:
    """A number of ranks.

    Raises:
        argparse.ArgumentTypeError: not a whole number of at least 1.
    """
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks; write 1 or more")
    return int(text)


def open_weights(config: HFModelConfig) -> HFTensors:
    """The tensors of a model's folder; warns of those that the model has no use for.

    Raises:
        CheckpointError: a folder that the model cannot be read from (see `open_model`).
    """
    tensors, warnings = open_model(config)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return tensors


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


def write_shards(
    folder: Path,
    infos: Sequence[TensorInfo],
    read: Callable[[str], TensorSlice],
    max_bytes: int,
) -> None:
    """Write safetensors files, tensor by tensor, and their index where there are several.

    Args:
        folder: HF checkpoint folder.
        infos: the tensors in the order in which they are written.
        read: name -> the tensor, read where it is indexed.
        max_bytes: of a file; a larger tensor gets a file of its own.
    """
    shards = plan_shards(infos, max_bytes)
    with Progress(sum(info.num_bytes for info in infos)) as progress:
        for i, shard in enumerate(shards):
            with (folder / shard_name(i, len(shards))).open("wb") as file:
                writer = ShardWriter(file, shard)
                for info in shard:
                    writer.write(info.name, read(info.name)[:])
                    progress.update(info.num_bytes)
    write_index(folder, shards)
