"""The evaluator: samples answers to sets of problems, grades them, and computes pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from trb_megatron.behavior.policies import StudentPolicy
from trb_megatron.config.options import Config
from trb_megatron.distributed.layout import ParallelLayout, gather_from_leaders
from trb_megatron.evaluation.rewards import RewardWorkers
from trb_megatron.job.nonfinite import NonFiniteError, find_in_rollouts
from trb_megatron.models.sources import ModelSources
from trb_megatron.prompts.records import Columns
from trb_megatron.prompts.source import PromptSet, PromptSource, load_prompts
from trb_megatron.rollout.engine import RolloutEngine
from trb_megatron.rollout.sequences import Request, ResponseSpec

EVALUATION_STEP = -1
"""The step that keys an evaluation's random numbers: the same at every evaluation of a run, so that
differences between two of them are the student's."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right (Chen et al., arXiv 2107.03374, equation 1).

    1 - C(n - c, k) / C(n, k) for c right answers among n samples; for k = 1 it is c / n.
    """
    assert 1 <= k <= num_samples and 0 <= num_correct <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class EvaluationResult:
    """Averages over the problems of one set.

    Attributes:
        pass_at: k -> pass@k.
        response_length: mean tokens of a response, the stop id included.
        stop_fraction: responses that ended with a stop id.
        num_problems, num_samples: problems, and responses to each.
    """

    pass_at: dict[int, float]
    response_length: float
    stop_fraction: float
    num_problems: int
    num_samples: int

    def __str__(self) -> str:
        scores = ", ".join(f"pass@{k} {100 * value:.1f} %" for k, value in self.pass_at.items())
        return (
            f"{scores} ({self.num_problems} problems x {self.num_samples}, "
            f"{self.response_length:.1f} tokens, {100 * self.stop_fraction:.0f} % stopped)"
        )

    def metrics(self, name: str) -> dict[str, float]:
        """The result as metrics `eval/<name>/...`."""
        values = {f"pass@{k}": value for k, value in self.pass_at.items()}
        values |= {"response_length": self.response_length, "stop_fraction": self.stop_fraction}
        return {f"eval/{name}/{key}": value for key, value in values.items()}


def load_problem_sets(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, PromptSet]:
    """The problems of every set by its name.

    Raises:
        ValueError: a problem file that cannot be used.
    """
    return {
        name: load_prompts(
            PromptSource(
                path=problems.path,
                format="auto",
                columns=Columns(problems.prompt_column, problems.answer_column, None),
                section=f"evaluation.sets.{name}",
                system_prompt=config.data.system_prompt,
                apply_chat_template=config.data.apply_chat_template,
                max_prompt_tokens=config.data.max_prompt_tokens,
                limit=problems.limit,
            ),
            tokenizer,
        )
        for name, problems in config.evaluation.sets.items()
    }


class Evaluator:
    """The problem sets of a run, and how to grade the student on them.

    Args:
        rewards: grading processes on the leader of each replica, None on other ranks.

    Raises:
        ConfigError: a cache that cannot hold one problem and its response.
    """

    def __init__(
        self,
        config: Config,
        sources: ModelSources,
        problem_sets: dict[str, PromptSet],
        engine: RolloutEngine,
        rewards: RewardWorkers | None,
        layout: ParallelLayout,
    ) -> None:
        self.config = config.evaluation
        self.sources = sources
        self.problem_sets = problem_sets
        self.engine = engine
        self.rewards = rewards
        self.layout = layout
        if problem_sets:
            engine.check_cache(
                config.data.max_prompt_tokens + self.config.max_response_tokens,
                with_teacher=False,
                what="data.max_prompt_tokens + evaluation.max_response_tokens",
            )
        self.policy = StudentPolicy(
            temperature=self.config.temperature,
            num_valid=sources.tokenizer_size,
            alignment=None,
            tp_group=layout.tp_group,
        )
        self.spec = ResponseSpec(
            max_response_tokens=self.config.max_response_tokens,
            stop_ids=sources.stop_ids,
            seed=config.run.seed,
            step=EVALUATION_STEP,
        )

    def evaluate(self) -> dict[str, EvaluationResult]:
        """Evaluate the student as it is now on every set. Collective over all ranks."""
        return {name: self._evaluate_set(problems) for name, problems in self.problem_sets.items()}

    def _evaluate_set(self, problems: PromptSet) -> EvaluationResult:
        """Each replica answers its share; its leader grades; every rank gets the averages."""
        num_samples = self.config.samples
        requests = [
            Request(number, sample, prompt.token_ids)
            for number, prompt in enumerate(problems.prompts)
            for sample in range(num_samples)
        ]
        share = requests[self.layout.dp_rank :: self.layout.dp_size]
        rollouts = self.engine.generate(share, self.policy, self.spec)
        if found := find_in_rollouts(rollouts):
            raise NonFiniteError(f"evaluation: {found}")
        graded: list[tuple[int, float, int, bool]] = []
        if self.rewards is not None:
            scores = self.rewards.score(
                [self.sources.decode(rollout.response_ids) for rollout in rollouts],
                [problems.prompts[rollout.prompt_index].answer or () for rollout in rollouts],
            )
            graded = [
                (rollout.prompt_index, score, len(rollout.response_ids), rollout.stopped)
                for rollout, score in zip(rollouts, scores, strict=True)
            ]
        graded = [row for rows in gather_from_leaders(graded, self.layout) for row in rows]
        num_correct = [0] * len(problems.prompts)
        for problem, score, _, _ in graded:
            num_correct[problem] += int(score)
        return EvaluationResult(
            pass_at={
                k: _mean([pass_at_k(num_samples, correct, k) for correct in num_correct])
                for k in self.config.pass_at
            },
            response_length=_mean([length for _, _, length, _ in graded]),
            stop_fraction=_mean([stopped for *_, stopped in graded]),
            num_problems=len(num_correct),
            num_samples=num_samples,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
