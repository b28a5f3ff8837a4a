"""Export the student of a training checkpoint as a Hugging Face checkpoint.

    python -m checkpoints_tools.megatron_to_hf RUN_DIR OUTPUT [--step N]

RUN_DIR is the folder of a run; its newest checkpoint is exported unless --step names another.
Configuration, tokenizer and generation config are those of the HF checkpoint that the run started
from. Works on one process, whatever layout the run had, or under torchrun with --tensor-parallel
and --pipeline-parallel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.megatron_to_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("output", type=Path, help="HF checkpoint folder to write; must not exist")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N")
    options = parser.parse_args(arguments)
    try:
        export(options)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def export(options: argparse.Namespace) -> None:
    """Do the export that the parsed options describe.

    Raises:
        ValueError, TrainingCheckpointError: no such checkpoint, one that cannot be read, or a
            target that exists.
    """
    from trb_megatron import distributed
    from trb_megatron.config import ParallelConfig, parse_config

    layout = distributed.initialize(
        ParallelConfig(
            tensor_model_parallel_size=options.tensor_parallel,
            pipeline_model_parallel_size=options.pipeline_parallel,
        )
    )

    from trb_megatron.checkpoint import find_checkpoint, load_student, read_training_state
    from trb_megatron.hf_weights import save_hf_checkpoint
    from trb_megatron.model_pair import ModelPair

    if options.output.exists():
        raise ValueError(f"{options.output} exists; choose another folder")
    checkpoint = find_checkpoint(options.run_dir, options.step)
    config = parse_config(read_training_state(checkpoint).config, source=str(checkpoint))
    models = ModelPair.load(config, layout, with_teacher=False)
    load_student(checkpoint, models.student)
    save_hf_checkpoint(models.student, models.student_config, layout, options.output)
    if distributed.is_rank_zero():
        print(f"exported {checkpoint} to {options.output}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
