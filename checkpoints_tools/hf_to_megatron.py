"""Write a Hugging Face checkpoint as a Megatron checkpoint.

    python -m checkpoints_tools.hf_to_megatron HF_FOLDER OUTPUT [--tensor-parallel N] [--dry-run]

Training reads Hugging Face folders itself; a Megatron checkpoint is for other programs on
Megatron-Core. It holds the model's tensors in the format of megatron.core.dist_checkpointing, which
any parallel layout can load, and in hf/ the configuration, tokenizer, chat template and generation
config, so that megatron_to_hf needs nothing else. `sha256sum -c SHA256SUMS` in it checks all files.

One process does it, with memory for the largest tensor, not for the model. OUTPUT appears when it
is complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints_tools.command import (
    PARALLEL_OPTIONS,
    Progress,
    add_conversion_options,
    num_bytes,
    open_weights,
    parse_count,
    print_plan,
    run,
)
from trb_megatron.atomic_folder import new_folder
from trb_megatron.checkpoint.checksums import write_sums
from trb_megatron.checkpoint.megatron_tensors import carry_hf_files
from trb_megatron.checkpoint.tensor_writer import stored_dtypes, write_checkpoint
from trb_megatron.huggingface.config import check_layout, padded_vocab_size, read_hf_config
from trb_megatron.huggingface.model_tensors import expected_tensors
from trb_megatron.huggingface.param_mapping import stored_params
from trb_megatron.huggingface.tokenizer import check_tokenizer_fits


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.hf_to_megatron",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="HF checkpoint folder")
    parser.add_argument("output", type=Path, help="Megatron checkpoint folder to write")
    parser.add_argument(
        "--tensor-parallel",
        type=parse_count,
        default=1,
        metavar="N",
        help="ranks that the checkpoint is cut for; any other number can read it, too (default: 1)",
    )
    parser.add_argument(
        "--pipeline-parallel",
        type=parse_count,
        default=1,
        metavar="N",
        help="check that the model can be cut so; it leaves no trace in the files (default: 1)",
    )
    add_conversion_options(parser)
    run(convert, parser.parse_args(arguments))


def convert(options: argparse.Namespace) -> None:
    """Do the conversion that the parsed options describe.

    Raises:
        ValueError, OSError: a checkpoint that cannot be used, a target that exists, a full disk.
    """
    config = read_hf_config(options.source)
    check_layout([config], options.tensor_parallel, options.pipeline_parallel, PARALLEL_OPTIONS)
    check_tokenizer_fits(options.source, config.vocab_size)
    vocab_size = padded_vocab_size([config.vocab_size], options.tensor_parallel)
    params = stored_params(config.family, config.shape(vocab_size))
    tensors = open_weights(config)
    dtypes = stored_dtypes(params.values(), tensors.dtypes(expected_tensors(config)))
    block_bytes = [
        num_bytes(chunk.sizes, dtypes[chunk.key])
        for param in params.values()
        for chunk in param.chunks(options.tensor_parallel)
    ]
    if options.dry_run:
        print_plan(params, dtypes, max(block_bytes))
        return
    with (
        new_folder(options.output, overwrite=options.overwrite) as partial,
        Progress(sum(block_bytes)) as progress,
    ):
        carry_hf_files(config, partial)
        write_checkpoint(
            partial,
            params,
            tensors,
            tp_size=options.tensor_parallel,
            on_write=progress.update,
        )
        write_sums(partial)
    print(f"wrote {options.source} to {options.output}")


if __name__ == "__main__":
    main()
