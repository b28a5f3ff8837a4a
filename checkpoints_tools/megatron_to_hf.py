"""Write a Megatron checkpoint as a Hugging Face checkpoint.

    python -m checkpoints_tools.megatron_to_hf SOURCE OUTPUT [--max-shard-size 5GB] [--dry-run]

SOURCE is the folder of a training run (its newest checkpoint is taken unless --step names another),
one checkpoint of a run, or what hf_to_megatron wrote. Tensors get the types that they had in the HF
checkpoint that it all began with; configuration, tokenizer, chat template and generation config are
those of that checkpoint, byte for byte.

One process does it, whatever layout wrote SOURCE, with memory for the largest tensor, not for the
model. OUTPUT appears when it is complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints_tools.command import (
    add_conversion_options,
    add_shard_size_option,
    num_bytes,
    print_plan,
    run,
    write_shards,
)
from trb_megatron.atomic_folder import new_folder
from trb_megatron.checkpoint.folders import find_checkpoint
from trb_megatron.checkpoint.megatron_tensors import (
    HF_FOLDER,
    open_megatron_checkpoint,
    read_hf_dtypes,
)
from trb_megatron.huggingface.tensors import TensorInfo, copy_side_files
from trb_megatron.huggingface.tokenizer import difference_in_transformers


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.megatron_to_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="run folder or Megatron checkpoint folder")
    parser.add_argument("output", type=Path, help="HF checkpoint folder to write")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    add_shard_size_option(parser)
    add_conversion_options(parser)
    run(convert, parser.parse_args(arguments))


def find_source(source: Path, step: int | None) -> Path:
    """The Megatron checkpoint folder that SOURCE and --step mean.

    Raises:
        ValueError: --step for something that is no run.
        TrainingCheckpointError: the run has no such checkpoint.
    """
    if (source / "checkpoints").is_dir():
        return find_checkpoint(source, step)
    if step is not None:
        raise ValueError(f"{source}: --step {step} is for the folder of a run, which this is not")
    return source


def convert(options: argparse.Namespace) -> None:
    """Do the conversion that the parsed options describe.

    Raises:
        ValueError, RuntimeError, OSError: a checkpoint that cannot be used, a target that exists, a
            full disk.
    """
    checkpoint = find_source(options.source, options.step)
    tensors, params = open_megatron_checkpoint(checkpoint)
    dtype_of = read_hf_dtypes(checkpoint)
    infos = [
        TensorInfo(name, dtype_of(name), shape)
        for param in params.values()
        for name, shape in zip(param.hf_names, param.hf_shapes, strict=True)
    ]
    if options.dry_run:
        dtypes = {key: dtype for key, (_, dtype) in tensors.shapes().items()}
        largest = max(num_bytes(p.full_shape, dtypes[p.key]) for p in params.values())
        print_plan(params, dtypes, largest)
        return
    with new_folder(options.output, overwrite=options.overwrite) as partial:
        write_shards(partial, infos, tensors.slice, options.max_shard_size)
        copy_side_files(checkpoint / HF_FOLDER, partial)
    print(f"wrote {checkpoint} to {options.output}")
    if found := difference_in_transformers(options.output):
        print(f"warning: {found}")


if __name__ == "__main__":
    main()
