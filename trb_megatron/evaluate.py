"""pass@1 and pass@k of a student over problem files, by the engine and rewards of training.

    python -m trb_megatron.evaluate --student DIR --problems FILE ... [section.key=value ...]
    torchrun --nproc-per-node 2 -m trb_megatron.evaluate CONFIG.yaml [section.key=value ...]

A model and problems are enough. What a configuration would say has its defaults, as in training.
The metrics are printed as a JSON object; all else goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trb_megatron.config.options import JobConfig
    from trb_megatron.evaluation.evaluator import Evaluator


def main(arguments: list[str] | None = None) -> None:
    """Evaluate `student.path` on every set and print the metrics as a JSON object."""
    # Only what a command needs is imported: --help leaves Megatron alone.
    from trb_megatron.config.reading import load_job_config
    from trb_megatron.distributed.layout import initialize, is_rank_zero, shutdown
    from trb_megatron.job.supervision import setup_errors, supervised_job

    options = _parser().parse_intermixed_args(arguments)
    with supervised_job():
        with setup_errors():
            config = load_job_config(*_config_and_overrides(options))
            if not config.evaluation.sets:
                raise ValueError(
                    "evaluation.sets is empty: name a file of problems by --problems FILE or "
                    "evaluation.sets.NAME.path=FILE"
                )
            layout = initialize(config.parallel)
            if options.output is not None and is_rank_zero():
                _check_output(options.output)

        from trb_megatron.evaluation.evaluator import Evaluator, load_problem_sets
        from trb_megatron.evaluation.rewards import start_reward_workers
        from trb_megatron.models.pair import Models
        from trb_megatron.models.sources import ModelSources
        from trb_megatron.rollout.engine import RolloutEngine
        from trb_megatron.run.template_date import with_template_date

        with start_reward_workers(config.rewards, layout) as rewards:
            with setup_errors():
                if rewards is not None:
                    rewards.check()
                sources = ModelSources.read(config, with_teacher=False)
                config = with_template_date(config, sources.tokenizer, _tell)
                problem_sets = load_problem_sets(config, sources.tokenizer)
                for warning in sources.check_tokenizers(problem_sets.values()):
                    _tell(f"warning: {warning}")
                models = Models.load(sources, config, layout, say=_tell)
            engine = RolloutEngine(models.student, None, layout, config.rollout)
            with setup_errors():
                evaluator = Evaluator(config, sources, problem_sets, engine, rewards, layout)
            for line in _describe(config, evaluator):
                _tell(line)
            metrics = evaluate(evaluator, options.output)
        if is_rank_zero():
            print(json.dumps(metrics, indent=2))
        shutdown()


def evaluate(evaluator: Evaluator, output: Path | None = None) -> dict[str, float]:
    """The metrics of every set, with progress on standard error; collective over all ranks.

    `output` gets a row of JSON for each response, from rank 0 and whenever a set is done.
    """
    from trb_megatron.atomic_folder import write_file
    from trb_megatron.distributed.layout import gather_from_leaders, is_rank_zero
    from trb_megatron.run.evaluation_progress import EvaluationProgress

    layout, num_samples = evaluator.layout, evaluator.config.samples
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    with EvaluationProgress(
        evaluator.set_sizes, num_samples, layout.dp_size, enabled=is_rank_zero()
    ) as progress:
        for name in evaluator.problem_sets:
            result, responses = evaluator.evaluate_set(name, progress.watch(name))
            metrics |= result.metrics(name)
            progress.finish(name)
            progress.write(f"{name}: {result}")
            if output is None:
                continue
            found = [response.as_row(name, evaluator.sources) for response in responses]
            of_set = [row for rows_ in gather_from_leaders(found, layout) for row in rows_]
            rows += sorted(of_set, key=lambda row: (row["problem"], row["sample"]))
            if is_rank_zero():
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_file(output, text)
                progress.write(f"{name}: {len(of_set):,} responses written to {output}")
    return metrics


def _parser() -> argparse.ArgumentParser:
    from trb_megatron.config.reading import command_line

    parser = command_line(__doc__, needs_config=False)
    parser.add_argument(
        "--student",
        metavar="DIR",
        help="Hugging Face checkpoint folder to evaluate; in place of student.path",
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files or folders of problems with answers, each a set named like its file; in place "
        "of evaluation.sets",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write every response to it, as JSON Lines; an existing file is replaced",
    )
    return parser


def _config_and_overrides(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The configuration's file, if any, and all that it is overridden by, options first.

    `--problems` takes all words behind it, also those that are overrides.

    Raises:
        ValueError: no model, or two sets with one name.
    """
    from trb_megatron.config.reading import is_override

    words = [word for word in (options.config, *options.problems) if word is not None]
    overrides = [word for word in words if is_override(word)] + options.overrides
    files = [word for word in options.problems if not is_override(word)]
    config = None if options.config is None or is_override(options.config) else options.config
    if files:
        sets = {name: {"path": file} for name, file in _name_sets(files).items()}
        overrides.insert(0, f"evaluation.sets={_as_yaml(sets)}")
    if options.student is not None:
        overrides.insert(0, f"student.path={_as_yaml(options.student)}")
    elif config is None and not any(word.startswith("student.path=") for word in overrides):
        raise ValueError("which model? name its folder by --student DIR, or give a CONFIG.yaml")
    return config, overrides


def _as_yaml(value: Any) -> str:
    """A value on one line, read back equal whatever characters its text holds."""
    import yaml

    return yaml.safe_dump(
        value, default_style='"', default_flow_style=True, sort_keys=False, width=float("inf")
    ).strip()


def _name_sets(files: Sequence[str]) -> dict[str, str]:
    """Names of sets, by which metrics and overrides call them, and their files.

    A set is called like its file, and where that is not enough, like its folder and file.

    Raises:
        ValueError: a name for two files.
    """
    from trb_megatron.prompts.files import COMPRESSIONS

    paths = [Path(file) for file in files]
    paths = [path.with_suffix("") if path.suffix in COMPRESSIONS else path for path in paths]
    stems = [path.stem for path in paths]
    sets: dict[str, str] = {}
    for path, file in zip(paths, files, strict=True):
        parts = [path.parent.name] if stems.count(path.stem) > 1 and path.parent.name else []
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join([*parts, path.stem]))
        name = name.strip("-") or "problems"
        if name in sets:
            raise ValueError(
                f"--problems: {sets[name]} and {file} would both be called {name}; name them by "
                "evaluation.sets.NAME.path=FILE"
            )
        sets[name] = file
    return sets


def _check_output(output: Path) -> None:
    """Refuse a file that could not be written when the evaluation is done."""
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {output}: the folder {output.parent} cannot be written to")


def _describe(config: JobConfig, evaluator: Evaluator) -> Iterator[str]:
    """What decides the numbers that come out: problems, rendering, sampling."""
    data, evaluation = config.data, evaluator.config
    for name, problems in evaluator.problem_sets.items():
        too_long = len(problems.too_long)
        yield f"{name}: {problems.summary}" + (
            f"; {too_long:,} longer than {config.longest_problem(name):,} tokens count as wrong"
            if too_long
            else ""
        )
        yield from (f"warning: {name}: {warning}" for warning in problems.warnings)
        own = "" if len(evaluation.sets) == 1 else f"{name}: "
        if not data.apply_chat_template:
            yield f"{own}plain text (data.apply_chat_template=false)"
        elif (prompt := config.system_prompt_of(name)) is None:
            yield f"{own}in the student's chat template, without a system prompt of ours"
        else:
            yield f"{own}in the student's chat template, system prompt '{prompt}'"
        yield f"{own}{problems.describe_first()}"
    samples = evaluation.samples
    yield (
        f"responses: {samples} per problem, temperature {evaluation.temperature:g}, at most "
        f"{evaluator.max_response_tokens:,} tokens, {config.training.precision}, seed "
        f"{config.run.seed}"
    )


def _tell(line: str) -> None:
    """Print a line on rank 0, beside the metrics."""
    from trb_megatron.distributed.layout import is_rank_zero

    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
