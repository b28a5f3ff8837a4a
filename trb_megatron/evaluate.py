"""pass@1 and pass@k of a student over problem files, by the engine and rewards of training.

    torchrun --nproc-per-node 2 -m trb_megatron.evaluate CONFIG.yaml [section.key=value ...]

evaluates `student.path` on every file of `evaluation.sets`.
"""

from __future__ import annotations

import json

from trb_megatron.config.reading import command_line, load_config
from trb_megatron.distributed.layout import initialize, is_rank_zero, shutdown
from trb_megatron.evaluation.evaluator import Evaluator, load_problem_sets
from trb_megatron.evaluation.rewards import start_reward_workers
from trb_megatron.job.supervision import setup_errors, supervised_job
from trb_megatron.models.pair import Models
from trb_megatron.models.sources import ModelSources
from trb_megatron.rollout.engine import RolloutEngine


def main(arguments: list[str] | None = None) -> None:
    """Evaluate `student.path` on every set and print the metrics as a JSON object."""
    options = command_line(__doc__).parse_intermixed_args(arguments)
    with supervised_job():
        with setup_errors():
            config = load_config(options.config, options.overrides)
            if not config.evaluation.sets:
                raise ValueError("evaluation.sets is empty: name at least one problem file")
            layout = initialize(config.parallel)
            sources = ModelSources.read(config, with_teacher=False)
            problem_sets = load_problem_sets(config, sources.tokenizer)
            models = Models.load(sources, config, layout)
        engine = RolloutEngine(models.student, None, layout, config.rollout)
        with start_reward_workers(config.rewards, layout) as rewards:
            with setup_errors():
                evaluator = Evaluator(config, sources, problem_sets, engine, rewards, layout)
            results = evaluator.evaluate()
        if is_rank_zero():
            metrics = {
                k: v for name, result in results.items() for k, v in result.metrics(name).items()
            }
            print(json.dumps(metrics, indent=2))
        shutdown()


if __name__ == "__main__":
    main()
