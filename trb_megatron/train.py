"""Train a student: distillation or supervised, as the configuration says.

    torchrun --nproc-per-node 2 -m trb_megatron.train CONFIG.yaml [section.key=value ...]

A run that was interrupted continues from its last checkpoint when it is started again.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the training job that the arguments describe."""
    # Checkpoint writers are spawned processes that import this module again: keep that light.
    from trb_megatron import distributed
    from trb_megatron.config import load_config
    from trb_megatron.supervision import setup_errors, supervised_job

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    with supervised_job():
        with setup_errors():
            if not arguments:
                raise ValueError("CONFIG.yaml is missing; --help says how to call this")
            config = load_config(arguments[0], arguments[1:])
            layout = distributed.initialize(config.parallel, seed=config.run.seed)

        from trb_megatron.evaluate import start_reward_workers
        from trb_megatron.trainer import Trainer

        with start_reward_workers(config.rewards, layout) as rewards:
            with setup_errors():
                trainer = Trainer(config, layout, rewards)
            trainer.train()
        distributed.shutdown()


if __name__ == "__main__":
    main()
