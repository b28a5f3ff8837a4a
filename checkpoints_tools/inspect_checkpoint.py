"""Say what a checkpoint folder holds: a Hugging Face or a Megatron one, or a training run's.

    python -m checkpoints_tools.inspect_checkpoint FOLDER [--tensors] [--json] [--headers-only]

Checks that the files are complete, that every tensor is there and has the shape that the
configuration asks for, and that the tokenizer fits. All files of a Megatron checkpoint are read
against their SHA-256 sums, unless --headers-only asks for a quick look. Exit status: 0 it can be
used, 2 it can't.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.command import num_bytes, open_weights, run
from checkpoints_tools.megatron_to_hf import find_source
from trb_megatron.checkpoint.megatron_tensors import HF_FOLDER, open_megatron_checkpoint
from trb_megatron.checkpoint.safe_loading import INDEX_FILE
from trb_megatron.huggingface.config import HFModelConfig, read_hf_config
from trb_megatron.huggingface.kinds import Shape
from trb_megatron.huggingface.model_tensors import expected_tensors
from trb_megatron.huggingface.tokenizer import check_tokenizer_fits, stop_ids, tokenizer_size


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.inspect_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, or run folder")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--headers-only", action="store_true", help="do not read the files against their sums"
    )
    run(inspect, parser.parse_args(arguments))


def inspect(options: argparse.Namespace) -> None:
    """Print what the parsed options ask for.

    Raises:
        ValueError, OSError, RuntimeError: the checkpoint cannot be used.
    """
    folder = find_source(options.source, options.step)
    is_hf = not ((folder / HF_FOLDER).is_dir() or (folder / INDEX_FILE).is_file())
    hf_folder = folder if is_hf else folder / HF_FOLDER
    tensors = (
        _hf_tensors(folder) if is_hf else _megatron_tensors(folder, check=not options.headers_only)
    )
    config = read_hf_config(hf_folder)
    tokenizer = check_tokenizer_fits(hf_folder, config.vocab_size)
    description = {
        "path": str(folder),
        "format": "Hugging Face" if is_hf else "Megatron",
        "family": config.family,
        "parameters": sum(
            num_bytes(shape, dtype) // dtype.itemsize for shape, dtype in tensors.values()
        ),
        "bytes": sum(num_bytes(shape, dtype) for shape, dtype in tensors.values()),
        "types": dict(Counter(str(dtype)[6:] for _, dtype in tensors.values())),
        **_sizes(config),
        "tokenizer_size": tokenizer_size(tokenizer),
        "stop_ids": list(stop_ids(hf_folder)),
    }
    if options.tensors:
        description["tensors"] = {
            name: {"shape": list(shape), "type": str(dtype)[6:]}
            for name, (shape, dtype) in sorted(tensors.items())
        }
    _print(description, as_json=options.json)


def _hf_tensors(folder: Path) -> dict[str, tuple[Shape, torch.dtype]]:
    config = read_hf_config(folder)
    tensors = open_weights(config)
    expected = expected_tensors(config)
    dtypes = tensors.dtypes(expected)
    return {name: (shape, dtypes[name]) for name, shape in expected.items()}


def _megatron_tensors(folder: Path, *, check: bool) -> dict[str, tuple[Shape, torch.dtype]]:
    tensors, params = open_megatron_checkpoint(folder, check=check)
    shapes = tensors.shapes()
    return {param.key: shapes[param.key] for param in params.values()}


def _sizes(config: HFModelConfig) -> dict[str, Any]:
    """The fields of the configuration that are one number or one word."""
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in ("path", "family", "inv_freq")
    }


def _print(description: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(description, indent=2))
        return
    tensors = description.pop("tensors", {})
    for name, value in description.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        print(f"{name:<26} {value:,}" if is_count else f"{name:<26} {value}")
    for name, tensor in tensors.items():
        print(f"  {name} {tensor['shape']} {tensor['type']}")


if __name__ == "__main__":
    main()
