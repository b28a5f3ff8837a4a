"""The evaluator: samples answers to sets of problems, grades them, and computes pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from trb_megatron.batch import Rollout
from trb_megatron.behavior.policies import StudentPolicy
from trb_megatron.config.options import AUTO_EVALUATION_TOKENS, JobConfig
from trb_megatron.config.values import ConfigError
from trb_megatron.distributed.layout import ParallelLayout, gather_from_leaders
from trb_megatron.evaluation.rewards import Grade, RewardWorkers
from trb_megatron.job.nonfinite import NonFiniteError, find_in_rollouts
from trb_megatron.models.sources import ModelSources
from trb_megatron.prompts.records import Columns
from trb_megatron.prompts.source import Prompt, PromptSet, PromptSource, load_prompts
from trb_megatron.rollout.engine import RolloutEngine
from trb_megatron.rollout.generation import Watch
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
        pass_at: k -> pass@k over all problems.
        response_length: mean tokens of a response, the stop id included.
        stop_fraction: responses that ended with a stop id.
        num_problems: all of the set.
        num_too_long: of these, problems that got no response and count as wrong.
        num_samples: responses to each of the others.
    """

    pass_at: dict[int, float]
    response_length: float
    stop_fraction: float
    num_problems: int
    num_too_long: int
    num_samples: int

    def __str__(self) -> str:
        scores = ", ".join(f"pass@{k} {100 * value:.1f} %" for k, value in self.pass_at.items())
        wrong = f", {self.num_too_long} of them too long and wrong" if self.num_too_long else ""
        return (
            f"{scores} ({self.num_problems} problems x {self.num_samples}{wrong}, "
            f"{self.response_length:.1f} tokens, {100 * self.stop_fraction:.0f} % stopped)"
        )

    def metrics(self, name: str) -> dict[str, float]:
        """The result as metrics `eval/<name>/...`."""
        values = {f"pass@{k}": value for k, value in self.pass_at.items()}
        values |= {"response_length": self.response_length, "stop_fraction": self.stop_fraction}
        values["too_long"] = self.num_too_long
        return {f"eval/{name}/{key}": value for key, value in values.items()}


@dataclass(frozen=True)
class GradedResponse:
    """A response to a problem.

    Attributes:
        prompt: the problem, whose `index` is its row in the file.
        sample: number of the response among those to the problem, from 0.
        text: without special tokens other than tags.
        text, rollout: None if the problem was too long for a response.
    """

    prompt: Prompt
    sample: int
    text: str | None
    rollout: Rollout | None
    grade: Grade

    def as_row(self, set_name: str, sources: ModelSources) -> dict[str, Any]:
        """Plain values for a file of responses."""
        answers = self.prompt.answer or ()
        return {
            "set": set_name,
            "problem": self.prompt.index,
            "sample": self.sample,
            "prompt": str(sources.tokenizer.decode(list(self.prompt.token_ids))),
            "response": self.text,
            "extracted_answer": self.grade.extracted,
            "gold": answers[0] if len(answers) == 1 else list(answers),
            "verdict": self.grade.is_right,
            "reward": self.grade.reward,
            "timed_out": self.grade.timed_out,
            "length": 0 if self.rollout is None else len(self.rollout.response_ids),
            "stopped": self.rollout is not None and self.rollout.stopped,
        }


def load_problem_sets(
    config: JobConfig, tokenizer: PreTrainedTokenizerFast
) -> dict[str, PromptSet]:
    """The problems of every set by its name.

    Raises:
        ValueError: a problem file that cannot be used.
    """
    return {name: load_prompts(_source(name, config), tokenizer) for name in config.evaluation.sets}


def _source(name: str, config: JobConfig) -> PromptSource:
    """A set's file, and how its problems become tokens."""
    problems, data = config.evaluation.sets[name], config.data
    return PromptSource(
        path=problems.path,
        format=problems.format,
        split=problems.split,
        columns=Columns(problems.prompt_column, problems.answer_column, None),
        section=f"evaluation.sets.{name}",
        system_prompt=config.system_prompt_of(name),
        apply_chat_template=data.apply_chat_template,
        chat_template_kwargs=data.chat_template_kwargs,
        template_date=data.template_date,
        max_prompt_tokens=config.longest_problem(name),
        limit=problems.limit,
    )


class Evaluator:
    """The problem sets of a run, and how to grade the student on them.

    Args:
        rewards: grading processes on the leader of each replica, None on other ranks.

    Raises:
        ConfigError: a problem that leaves a response no room in the student's positions, or a cache
            that cannot hold one problem and its response.
    """

    def __init__(
        self,
        config: JobConfig,
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
        self.max_response_tokens = self._choose_response_length()
        if problem_sets:
            engine.check_cache(
                self._longest_problem + self.max_response_tokens,
                with_teacher=False,
                what="the longest problem and evaluation.max_response_tokens",
            )
        self.policy = StudentPolicy(
            temperature=self.config.temperature,
            num_valid=sources.tokenizer_size,
            alignment=None,
            tp_group=layout.tp_group,
        )
        self.spec = ResponseSpec(
            max_response_tokens=self.max_response_tokens,
            stop_ids=sources.stop_ids,
            seed=config.run.seed,
            step=EVALUATION_STEP,
        )

    @property
    def _longest_problem(self) -> int:
        """Tokens of the longest problem of all sets."""
        prompts = (p for problems in self.problem_sets.values() for p in problems.prompts)
        return max((len(prompt.token_ids) for prompt in prompts), default=0)

    def _choose_response_length(self) -> int:
        """`evaluation.max_response_tokens`, or as many as it stands for as `auto`."""
        if self.config.max_response_tokens != "auto":
            return self.config.max_response_tokens
        student = self.sources.student
        room = student.max_positions - self._longest_problem
        if room < 1:
            raise ConfigError(
                f"data.max_prompt_tokens: the longest problem has {self._longest_problem} tokens, "
                f"which leaves no room for a response in the {student.max_positions} positions "
                f"(max_position_embeddings) of {student.path}; lower it to leave such problems out"
            )
        return min(AUTO_EVALUATION_TOKENS, room)

    @property
    def set_sizes(self) -> dict[str, int]:
        """Problems of each set."""
        return {name: len(problems.prompts) for name, problems in self.problem_sets.items()}

    def evaluate_set(
        self, name: str, watch: Watch
    ) -> tuple[EvaluationResult, list[GradedResponse]]:
        """Averages over a set, on every rank, and this replica's responses, on its leader alone.

        Collective over all ranks; `watch` follows the responses of this replica.
        """
        problems = self.problem_sets[name]
        num_samples = self.config.samples
        requests = [
            Request(number, sample, prompt.token_ids)
            for number, prompt in enumerate(problems.prompts)
            for sample in range(num_samples)
        ]
        share = requests[self.layout.dp_rank :: self.layout.dp_size]
        rollouts = self.engine.generate(share, self.policy, self.spec, watch)
        if found := find_in_rollouts(rollouts):
            raise NonFiniteError(f"evaluation: {found}")
        responses = self._grade(problems, rollouts)
        graded = [
            (rollout.prompt_index, r.grade.is_right, len(rollout.response_ids), rollout.stopped)
            for r in responses
            if (rollout := r.rollout) is not None
        ]
        graded = [row for rows in gather_from_leaders(graded, self.layout) for row in rows]
        # Those that are too long for a response count as wrong.
        num_correct = [0] * (len(problems.prompts) + len(problems.too_long))
        for problem, is_right, _, _ in graded:
            num_correct[problem] += is_right
        result = EvaluationResult(
            pass_at={
                k: _mean([pass_at_k(num_samples, correct, k) for correct in num_correct])
                for k in self.config.pass_at
            },
            response_length=_mean([length for _, _, length, _ in graded]),
            stop_fraction=_mean([stopped for *_, stopped in graded]),
            num_problems=len(num_correct),
            num_too_long=len(problems.too_long),
            num_samples=num_samples,
        )
        return result, responses

    def _grade(self, problems: PromptSet, rollouts: Sequence[Rollout]) -> list[GradedResponse]:
        """The rollouts with their grades, on the leader of each replica.

        The first replica has what stands for the problems without rollouts, too.
        """
        if self.rewards is None:
            return []
        prompts = [problems.prompts[rollout.prompt_index] for rollout in rollouts]
        texts = [self.sources.decode(rollout.response_ids) for rollout in rollouts]
        grades = self.rewards.grade(
            [self.sources.decode_to_grade(r.prompt_ids, r.response_ids) for r in rollouts],
            [prompt.answer or () for prompt in prompts],
        )
        responses = [
            GradedResponse(prompt, rollout.rollout_index, text, rollout, grade)
            for prompt, rollout, text, grade in zip(prompts, rollouts, texts, grades, strict=True)
        ]
        if self.layout.dp_rank == 0:
            responses += [
                GradedResponse(prompt, sample, None, None, Grade(0.0))
                for prompt in problems.too_long
                for sample in range(self.config.samples)
            ]
        return responses


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
