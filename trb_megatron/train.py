"""Train a student: distillation or supervised, as the configuration says.

    torchrun --nproc-per-node 2 -m trb_megatron.train CONFIG.yaml [section.key=value ...]
    python -m trb_megatron.train CONFIG.yaml [section.key=value ...] --dry-run [--world-size N]

Ctrl-C, SIGTERM and SIGUSR1 end a run after the step that it is in and a save; a second Ctrl-C ends
it at once. A run that was ended continues from its last checkpoint when it is started again.

Exit status: 0 all steps are done; 75 stopped and saved (see docs/operations.md for
torchrun and SLURM); 130 ended at once by Ctrl-C; 2 something must be changed first; 1 an error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trb_megatron.config.options import Config


def main(arguments: list[str] | None = None) -> None:
    """Run the training job that the arguments describe."""
    # Only what a command needs is imported: --help and --dry-run leave Megatron alone.
    from trb_megatron.config.reading import load_config
    from trb_megatron.distributed.layout import initialize, shutdown
    from trb_megatron.job.stopping import stopped_status
    from trb_megatron.job.supervision import setup_errors, supervised_job

    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if not options.dry_run and (options.world_size or options.memory_gb):
        parser.error("--world-size and --memory-gb are for --dry-run")
    with supervised_job():
        with setup_errors():
            config = load_config(options.config, options.overrides)
            if options.dry_run:
                dry_run(config, options.world_size, options.memory_gb)
                return
            layout = initialize(config.parallel)

        from trb_megatron.evaluation.rewards import start_reward_workers
        from trb_megatron.setup import set_up
        from trb_megatron.trainer import Trainer

        with start_reward_workers(config.rewards, layout) as rewards:
            with setup_errors():
                trainer = Trainer(set_up(config, layout, rewards))
            was_stopped = trainer.train()
        shutdown()
    if was_stopped and "RANK" not in os.environ:
        sys.exit(stopped_status())


def dry_run(config: Config, world_size: int | None = None, memory_gb: float | None = None) -> None:
    """Print what would lie where on `world_size` ranks (default: one replica), and start nothing.

    Of the models' folders it reads configurations and tokenizers, and of the data nothing.

    Raises:
        ValueError: a run that would be refused, or that does not fit into `memory_gb` on each GPU.
    """
    from trb_megatron.models.sources import ModelSources
    from trb_megatron.plan.memory import GB
    from trb_megatron.plan.plan import check_memory, make_plan
    from trb_megatron.plan.report import describe_plan

    parallel = config.parallel
    one_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    sources = ModelSources.read(config, with_teacher=config.is_distilling)
    plan = make_plan(config, sources, world_size or one_replica)
    memory = None if memory_gb is None else int(memory_gb * GB)
    print("\n".join(describe_plan(plan, sources, config, memory)))
    if memory is not None:
        check_memory(plan, config, memory)
    print("dry run: this would start (weights, prompts and problems were not read)")


def _parser() -> argparse.ArgumentParser:
    from trb_megatron.config.reading import command_line

    parser = command_line(__doc__)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would lie where, in one process without GPUs or weights, and stop; exit "
        "status 2 where the run would be refused",
    )
    parser.add_argument(
        "--world-size",
        type=_positive(int),
        metavar="N",
        help="for --dry-run: the number of ranks (default: one model replica)",
    )
    parser.add_argument(
        "--memory-gb",
        type=_positive(float),
        metavar="G",
        help="for --dry-run: memory of each GPU, to refuse what would not fit",
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argument's parser that wants a finite number above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` cannot read the text
    return parse


if __name__ == "__main__":
    main()
