"""The training loop: on-policy distillation with Trust-Region behavior Blending (TRB).

One step (Plyusov et al., arXiv 2605.31159, algorithm 1) goes through seven stages:

1. prompts:   take the next prompts of an endless, resumable order;
2. rollout:   sample responses from the behavior policy, the distribution nearest the teacher within
              the step's KL budget of the student (or one of its baselines, see `behavior`); with a
              budget of zero, and after the warmup, from the student;
3. reward:    grade the responses where answers are known (reported, never trained on);
4. exchange:  move rollouts between replicas until each has about as many tokens, and pack them;
5. teacher:   final hidden states of the teacher at every sampled prefix, unless kept from 2;
6. gradients: forward and backward of the student, microbatch by microbatch; the loss is the same
              in every step;
7. update:    AdamW.

Supervised training is the same loop: the dataset's responses take the place of rollouts, and there
is no teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from trb_megatron.batch import Microbatch, Rollout, build_microbatches
from trb_megatron.behavior.policies import Policy
from trb_megatron.behavior.schedule import kl_budget_of_step
from trb_megatron.checkpoint.folders import written_together
from trb_megatron.checkpoint.training import save_checkpoint
from trb_megatron.distributed.layout import is_rank_zero, say
from trb_megatron.evaluation.evaluator import EvaluationResult
from trb_megatron.huggingface.tokenizer import difference_in_transformers
from trb_megatron.job.nonfinite import NonFiniteGuard, find_in_rollouts
from trb_megatron.job.stopping import StopRequests
from trb_megatron.models.forward import forward_hidden
from trb_megatron.models.gpt import common_token_multiple
from trb_megatron.models.weights import save_hf_checkpoint
from trb_megatron.prompts.order import PromptOrder
from trb_megatron.prompts.source import Prompt
from trb_megatron.rollout.step_settings import policy_at, requests_of, responses_at
from trb_megatron.run.evaluation_progress import EvaluationProgress
from trb_megatron.run.log import RunLog
from trb_megatron.run.metrics import PeakMemory, PhaseTimer
from trb_megatron.run.step_metrics import average_step, describe_costs, sum_step
from trb_megatron.setup import Setup
from trb_megatron.update.exchange import exchange_rollouts
from trb_megatron.update.gradients import StepGradients, loss_of_step
from trb_megatron.update.optimizer import learning_rate_at, set_learning_rate

SKIPPED = (
    {"loss": torch.tensor(torch.nan)},
    {"optim/lr": torch.nan, "optim/grad_norm": torch.nan},
)
"""Sums of the loss, and metrics of the update, of a step that is skipped for a NaN or infinity."""


class Trainer:
    """A run from where its set-up left it to its end. All methods are collective over all ranks.

    Attributes:
        step: updates done; also the next step's number, counted from 0.
        prompt_position: prompts taken from the endless order so far.
        evaluation_is_due: whether an evaluation belongs between the last step and the next.
    """

    def __init__(self, setup: Setup) -> None:
        self.config = setup.config
        self.layout = setup.layout
        self.rewards = setup.rewards
        self.sources = setup.sources
        self.prompt_set = setup.prompt_set
        self.models = setup.models
        self.student_ddp = setup.student_ddp
        self.optimizer = setup.optimizer
        self.engine = setup.engine
        self.evaluator = setup.evaluator
        self.lock = setup.lock
        self.step = setup.state.step
        self.prompt_position = setup.state.prompt_position
        self.evaluation_is_due = setup.state.evaluation_is_due
        self.guard = NonFiniteGuard(self.config.training.max_nonfinite_steps)
        self.guard.num_skipped = setup.state.num_skipped
        self.timer = PhaseTimer()
        self.memory = PeakMemory()
        self._state = setup.state
        self._response_end = setup.response_end
        self._order = PromptOrder(
            len(self.prompt_set.prompts), self.config.run.seed, self.config.data.shuffle
        )
        self._answers = {prompt.index: prompt.answer for prompt in self.prompt_set.prompts}

    def train(self) -> bool:
        """Run all remaining steps, evaluating and saving on the way, and export the student.

        Asked to stop (see `stopping`), finish the step, save and return True; the evaluation that
        the step may have been due for is made up for when the run goes on. The run folder's lock is
        given up at the end.
        """
        with self.lock, RunLog(self.config, self.step) as log, StopRequests() as stop_requests:
            if self.evaluation_is_due:
                log.add(self.step, self.evaluate(log))
            while self.step < self.config.training.steps:
                if reason := self._run_step(log, stop_requests):
                    message = (
                        f"stopped by {reason} after step {self.step} of "
                        f"{self.config.training.steps}; start the same command again to go on"
                    )
                    log.write(message)
                    stop_requests.confirm(message)
                    return True
            if self.config.checkpoint.export_hf:
                self.export()
            return False

    def _run_step(self, log: RunLog, stop_requests: StopRequests) -> str | None:
        """Train a step, evaluate, record and save as is due; the reason to stop after it, if any.

        The ranks agree on stopping by a collective: after the step, and again after an evaluation
        and a save, which take long. The last step of a run is followed by its end, not by a stop.
        """
        config = self.config
        metrics = self.train_step()
        is_last = self.step == config.training.steps
        is_periodic = self.step % config.evaluation.every == 0
        self.evaluation_is_due = config.evaluation.at_end if is_last else is_periodic
        stop_reason = None if is_last else stop_requests.agree()
        if self.evaluation_is_due and stop_reason is None:
            metrics |= self.evaluate(log)
            stop_reason = None if is_last else stop_requests.agree()
        log.record(self.step, metrics)
        if is_last or stop_reason is not None or self.step % config.checkpoint.every == 0:
            self.save()
            stop_reason = None if is_last else stop_requests.agree()
        return stop_reason

    def train_step(self) -> dict[str, float]:
        """Do one step and return its metrics; stages as in the module docstring."""
        policy = policy_at(self.step, self.config, self.sources, self.layout)
        prompts = self.prompts()
        rollouts = self.rollout(prompts, policy)
        rewards = self.reward(rollouts)
        loss_sums, optim = SKIPPED
        with self.guard.skipping():
            self.guard.check(find_in_rollouts(rollouts), self.step)
            microbatches = self.exchange(rollouts)
            # The teacher's hidden states are large, and the microbatches have copies.
            rollouts = [dataclasses.replace(rollout, teacher_hidden=None) for rollout in rollouts]
            microbatches = self.teacher(microbatches, policy)
            loss_sums = self.gradients(microbatches)
            optim = self.update()
        metrics = self._metrics(rollouts, rewards, loss_sums) | optim
        self.step += 1
        self.prompt_position += len(prompts)
        return metrics

    # ------------------------------------------------------------------ stages of a step

    def prompts(self) -> list[Prompt]:
        """The prompts of this step, for all replicas."""
        count = self.config.training.prompts_per_step
        indices = self._order.indices(self.prompt_position, count)
        return [self.prompt_set.prompts[index] for index in indices]

    def rollout(self, prompts: Sequence[Prompt], policy: Policy) -> list[Rollout]:
        """This replica's share of the responses: every dp-th of prompts x rollouts."""
        share = slice(self.layout.dp_rank, None, self.layout.dp_size)
        with self.timer.phase("rollout"):
            if not self.config.is_distilling:
                return [self._given_response(prompt) for prompt in prompts[share]]
            requests = requests_of(prompts, self.config.rollout.rollouts_per_prompt)
            spec = responses_at(self.step, self.config, self.sources)
            return self.engine.generate(requests[share], policy, spec)

    def reward(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Rewards of the responses whose prompts have answers, on the leader of each replica."""
        if self.rewards is None or not self.config.is_distilling:
            return []
        answers = [self._answers.get(rollout.prompt_index) for rollout in rollouts]
        graded = [(r, answer) for r, answer in zip(rollouts, answers, strict=True) if answer]
        return self.rewards.score(
            [self.sources.decode_to_grade(r.prompt_ids, r.response_ids) for r, _ in graded],
            [answer for _, answer in graded],
        )

    def exchange(self, rollouts: Sequence[Rollout]) -> list[Microbatch]:
        """The microbatches of this replica, with about as many tokens as those of the others."""
        hidden_on_host = self.config.training.teacher_hidden_device == "host"
        return build_microbatches(
            exchange_rollouts(rollouts, self.layout, hidden_on_host=hidden_on_host),
            self.config.training.max_tokens_per_microbatch,
            self.layout.device,
            common_token_multiple((self.models.student, self.models.teacher)),
        )

    def teacher(self, microbatches: list[Microbatch], policy: Policy) -> list[Microbatch]:
        """The microbatches with the teacher's hidden states, which the last stage has."""
        are_kept = self.config.rollout.keep_teacher_hidden and policy.needs_teacher
        with self.timer.phase("teacher"):
            if self.models.teacher is None or are_kept:
                return microbatches
            to_host = self.config.training.teacher_hidden_device == "host"
            hidden = forward_hidden(self.models.teacher, microbatches, to_host=to_host)
            if not self.layout.is_last_stage:
                return microbatches
            return [
                dataclasses.replace(microbatch, teacher_hidden_NH=hidden_NH)
                for microbatch, hidden_NH in zip(microbatches, hidden, strict=True)
            ]

    def gradients(self, microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
        """Gradients of the global mean loss per token; sums of the loss and its metrics.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
        """
        loss = loss_of_step(self.step, self.config, self.sources, self.layout)
        with self.timer.phase("train"):
            self.optimizer.zero_grad()
            step_gradients = StepGradients(
                self.student_ddp, self.models, loss, self.guard, self.step
            )
            return step_gradients.compute(microbatches)

    def update(self) -> dict[str, float]:
        """One AdamW update; the learning rate used and the gradient norm before clipping."""
        optimizer = self.config.optimizer
        lr = learning_rate_at(self.step, optimizer.lr, optimizer.warmup_steps)
        with self.timer.phase("train"):
            set_learning_rate(self.optimizer, lr)
            if optimizer.clip_grad == 0:  # Megatron then makes no norm of its own
                grad_norm = self.optimizer.get_grad_norm()
                self.optimizer.step()
            else:
                _, grad_norm, _ = self.optimizer.step()
            return {"optim/lr": lr, "optim/grad_norm": float(grad_norm)}

    def _given_response(self, prompt: Prompt) -> Rollout:
        """The response that supervised training imitates, with a stop id at its end."""
        assert prompt.response_ids is not None and self._response_end is not None
        response_ids = self._response_end.close(prompt.response_ids)
        return Rollout(prompt.index, 0, prompt.token_ids, response_ids, stopped=True)

    # ------------------------------------------------------------------ between the steps

    def _metrics(
        self, rollouts: Sequence[Rollout], rewards: Sequence[float], loss_sums: dict[str, Tensor]
    ) -> dict[str, float]:
        """Metrics of the step over all replicas; ends the step's clock and peak."""
        counts: dict[str, float] = {}
        if self.config.is_distilling:
            counts["preemptions"] = self.engine.counts.preemptions
            counts["prefilled_tokens"] = self.engine.counts.prefilled_tokens
        if self.rewards is not None and rewards:
            counts["reward_timeouts"] = self.rewards.num_timeouts
        metrics = average_step(sum_step(rollouts, rewards, loss_sums, counts), self.layout)
        if self.config.is_distilling and self.config.behavior.policy == "trb":
            metrics["behavior/kl_budget"] = kl_budget_of_step(self.step, self.config.behavior)
        metrics["optim/skipped_steps"] = self.guard.num_skipped
        seconds, peaks_gb = self.timer.finish_step(), self.memory.finish_step()
        return metrics | describe_costs(seconds, peaks_gb, metrics["rollout/tokens"])

    def evaluate(self, log: RunLog) -> dict[str, float]:
        """Evaluate every set and show the result; the step's clock and peak leave it out."""
        self.evaluation_is_due = False
        evaluator, results = self.evaluator, dict[str, EvaluationResult]()
        with EvaluationProgress(
            evaluator.set_sizes,
            evaluator.config.samples,
            self.layout.dp_size,
            enabled=is_rank_zero(),
        ) as progress:
            for name in evaluator.problem_sets:
                results[name], _ = evaluator.evaluate_set(name, progress.watch(name))
                progress.finish(name)
        metrics: dict[str, float] = {}
        for name, result in results.items():
            log.write(f"step {self.step} | {name}: {result}")
            metrics |= result.metrics(name)
        log.leave_out_time()
        self.timer.finish_step()
        self.memory.finish_step()
        return metrics

    def save(self) -> None:
        """Write a checkpoint of the run as it is now."""
        state = dataclasses.replace(
            self._state,
            step=self.step,
            prompt_position=self.prompt_position,
            num_skipped=self.guard.num_skipped,
            evaluation_is_due=self.evaluation_is_due,
        )
        save_checkpoint(
            self.config.run.dir,
            self.student_ddp,
            self.optimizer,
            state,
            self.sources.student,
            self.config.checkpoint.keep,
        )
        self.timer.finish_step()
        self.memory.finish_step()

    def export(self) -> None:
        """Write the student as a Hugging Face checkpoint."""
        target = self.config.run.dir / "hf"
        with written_together(target, self.config.run.dir):
            save_hf_checkpoint(self.models.student, self.sources.student, self.layout, target)
        say(f"exported the student to {target}")
        if is_rank_zero() and (found := difference_in_transformers(target)):
            say(f"warning: {found}")
