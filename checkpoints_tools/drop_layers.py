"""Write a Hugging Face checkpoint with fewer layers: a student that begins as part of its teacher.

    python -m checkpoints_tools.drop_layers HF_FOLDER OUTPUT --layers 20
    python -m checkpoints_tools.drop_layers HF_FOLDER OUTPUT --drop 2,5,10-14

--layers says how many stay: the first, the last, and others evenly between them. --drop names the
layers that go, counted from 0. The layers that stay are renumbered. Every tensor keeps its bits and
its type; tokenizer, chat template and generation config stay as they are. In config.json
`num_hidden_layers` and the list `layer_types` change.

One process does it, with memory for the largest tensor, not for the model. OUTPUT appears when it
is complete.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.command import (
    add_conversion_options,
    add_shard_size_option,
    open_weights,
    run,
    write_shards,
)
from trb_megatron.atomic_folder import new_folder
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.families import HF_LAYER
from trb_megatron.huggingface.tensors import TensorInfo, copy_side_files, read_json

_LAYER = re.compile(re.escape(HF_LAYER).replace(r"\{i\}", r"(\d+)"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.drop_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="HF checkpoint folder")
    parser.add_argument("output", type=Path, help="HF checkpoint folder to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layers", type=int, metavar="N", help="layers that stay, evenly spread")
    which.add_argument(
        "--drop",
        type=parse_layers,
        metavar="LIST",
        help="layers that go: numbers and ranges, such as 2,5,10-14",
    )
    add_shard_size_option(parser)
    add_conversion_options(parser)
    run(drop, parser.parse_args(arguments))


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers that a list such as 2,5,10-14 names, in its order.

    Raises:
        argparse.ArgumentTypeError: not numbers and ranges between commas, or a number twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no layer; write numbers and ranges, such as 2,5,10-14"
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    for layer in layers:
        if layers.count(layer) > 1:
            raise argparse.ArgumentTypeError(f"{text} names layer {layer} twice")
    return tuple(layers)


def spread_evenly(num_kept: int, num_layers: int) -> list[int]:
    """The layers that stay: the first, the last, and others at even distances between them.

    A model of one layer keeps the first.

    Raises:
        ValueError: not between 1 and `num_layers` - 1.
    """
    if not 1 <= num_kept < num_layers:
        raise ValueError(
            f"--layers {num_kept}: the model has {num_layers} layers; keep 1 to {num_layers - 1}"
        )
    return [i * (num_layers - 1) // max(num_kept - 1, 1) for i in range(num_kept)]


def leave_out(dropped: Iterable[int], num_layers: int) -> list[int]:
    """The layers that stay when those go.

    Raises:
        ValueError: a layer that the model doesn't have, or none would stay.
    """
    dropped = set(dropped)
    unknown = sorted(dropped - set(range(num_layers)))
    if unknown:
        raise ValueError(
            f"--drop {unknown[0]}: the model has {num_layers} layers, 0 to {num_layers - 1}"
        )
    if len(dropped) == num_layers:
        raise ValueError(f"--drop names all {num_layers} layers; at least one has to stay")
    return [layer for layer in range(num_layers) if layer not in dropped]


def drop(options: argparse.Namespace) -> None:
    """Write the checkpoint that the parsed options describe.

    Raises:
        ValueError, OSError: a checkpoint that cannot be used, layers that it doesn't have, a target
            that exists, a full disk.
    """
    config = read_hf_config(options.source)
    tensors = open_weights(config)
    dtypes = tensors.dtypes(tensors.names)
    if options.layers is not None:
        kept = spread_evenly(options.layers, config.num_layers)
    else:
        kept = leave_out(options.drop, config.num_layers)
    source_of = renumber(tensors.names, kept)
    infos = [
        TensorInfo(name, dtypes[source], tensors.shape(source))
        for name, source in source_of.items()
    ]
    before = sum(torch.Size(tensors.shape(name)).numel() for name in tensors.names)
    after = sum(torch.Size(info.shape).numel() for info in infos)
    print(
        f"keeps layers {', '.join(map(str, kept))} of {config.num_layers}: {after:,} of "
        f"{before:,} parameters"
    )
    if options.dry_run:
        return
    raw = cut_config(read_json(options.source / "config.json"), kept)
    with new_folder(options.output, overwrite=options.overwrite) as partial:
        write_shards(
            partial, infos, lambda name: tensors.slice(source_of[name]), options.max_shard_size
        )
        copy_side_files(options.source, partial)
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
    print(f"wrote {options.output}")


def renumber(names: Iterable[str], kept: Sequence[int]) -> dict[str, str]:
    """New name -> old name of every tensor that stays; layers in order, then by name."""
    new_number = {old: new for new, old in enumerate(kept)}
    placed = []
    for name in names:
        match = _LAYER.match(name)
        if match is None:
            placed.append((-1, name, name))
        elif int(match[1]) in new_number:
            number = new_number[int(match[1])]
            placed.append((number, HF_LAYER.format(i=number) + name[match.end() :], name))
    return {new: old for _, new, old in sorted(placed)}


def cut_config(raw: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A config.json with the layers that stay."""
    cut = {**raw, "num_hidden_layers": len(kept)}
    if raw.get("layer_types") is not None:
        cut["layer_types"] = [raw["layer_types"][layer] for layer in kept]
    return cut


if __name__ == "__main__":
    main()
