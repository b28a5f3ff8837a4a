"""The training loop: on-policy distillation with Trust-Region behavior Blending (TRB).

One step (Plyusov et al., arXiv 2605.31159, algorithm 1):

1. prompts:  take the next prompts of an endless, resumable order;
2. rollout:  sample responses from the behavior policy, the distribution nearest the teacher within
             the step's KL budget of the student (or one of its baselines, see `policies`); with a
             budget of zero, and after the warmup, from the student;
3. reward:   grade the responses where answers are known (reported, never trained on);
4. teacher:  final hidden states of the teacher at every sampled prefix, unless kept from 2;
5. train:    forward and backward of the student, microbatch by microbatch; the loss is the same in
             every step;
6. update:   AdamW, after a check that loss and gradients are finite;
7. record:   metrics, evaluation, checkpoint.

Supervised training is the same loop: the dataset's responses take the place of rollouts, and there
is no teacher.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from trb_megatron.atomic_folder import write_file
from trb_megatron.batch import Microbatch, Rollout, build_microbatches, plan_moves
from trb_megatron.blending import kl_budget_at
from trb_megatron.checkpoint import (
    TrainingState,
    find_good_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trb_megatron.config import (
    Config,
    ConfigError,
    config_warnings,
    parse_config,
)
from trb_megatron.distributed import ParallelLayout, gather_from_leaders, is_rank_zero, say
from trb_megatron.drafting import DraftCosts
from trb_megatron.evaluate import Evaluator, load_problem_sets
from trb_megatron.forward import forward_backward, forward_hidden
from trb_megatron.fused_loss import OutputLayer, fused_loss
from trb_megatron.hf_weights import save_hf_checkpoint
from trb_megatron.loss import LossOptions
from trb_megatron.metrics import PhaseTimer, peak_memory_gb
from trb_megatron.model_pair import DTYPES, ModelPair
from trb_megatron.models import common_token_multiple, flash_attention_version
from trb_megatron.nonfinite import NonFiniteGuard, find_in_gradients, find_in_rollouts
from trb_megatron.optimizer import (
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
    wrap_student,
)
from trb_megatron.pair_config import PairConfig
from trb_megatron.plan import Plan, check_memory, make_plan
from trb_megatron.policies import (
    BlendPolicy,
    Policy,
    Sampling,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
)
from trb_megatron.prompts import Prompt, PromptOrder, load_prompts
from trb_megatron.report import describe_environment, describe_plan, describe_precision
from trb_megatron.rewards import RewardWorkers
from trb_megatron.rollout import RolloutEngine
from trb_megatron.run_folder import (
    check_run_folder,
    check_same_run,
    lock_run_folder,
    write_run_folder,
    written_together,
)
from trb_megatron.run_log import RunLog
from trb_megatron.scheduler import Request
from trb_megatron.stopping import StopRequests
from trb_megatron.vocab_parallel import RowError


class Trainer:
    """A run: models, optimizer, prompts, and where in them it stands.

    Construction loads everything, refuses what cannot work, and continues from the newest
    checkpoint of `config.run.dir` if there is one. All methods are collective over all ranks.

    Args:
        rewards: grading processes on the leader of each replica, None on other ranks.
    """

    def __init__(
        self, config: Config, layout: ParallelLayout, rewards: RewardWorkers | None
    ) -> None:
        self.config = config
        self.layout = layout
        self.rewards = rewards
        self.run_dir = config.run.dir
        self.is_distilling = config.training.task == "distill"
        dtype = DTYPES[config.training.precision]
        kernel = flash_attention_version(layout.device, dtype)
        for line in describe_environment(layout.device, kernel):
            say(line)
        for line in describe_precision(config):
            say(line)
        for warning in config_warnings(config):
            say(f"warning: {warning}")
        check_run_folder(config)

        self.pair = PairConfig.read(config, with_teacher=self.is_distilling)
        plan = self._plan()
        self.prompt_set = load_prompts(
            config.data.path,
            self.pair.tokenizer,
            format=config.data.format,
            prompt_column=config.data.prompt_column,
            answer_column=config.data.answer_column,
            response_column=None if self.is_distilling else config.data.response_column,
            system_prompt=config.data.system_prompt,
            apply_chat_template=config.data.apply_chat_template,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        say(
            f"prompts: {len(self.prompt_set.prompts):,} from {config.data.path}, "
            f"{self.prompt_set.num_dropped:,} longer than {config.data.max_prompt_tokens} tokens "
            "dropped"
        )
        self.answers = {prompt.index: prompt.answer for prompt in self.prompt_set.prompts}
        self.order = PromptOrder(len(self.prompt_set.prompts), config.run.seed, config.data.shuffle)
        problem_sets = load_problem_sets(config, self.pair.tokenizer)

        self.models = ModelPair.load(self.pair, config, layout, say=say)
        _check_counts(plan, self.models, layout)
        self.student = wrap_student(self.models.student, config.optimizer)
        self.optimizer = build_optimizer(self.student, config.optimizer, dtype)
        self.student.config.finalize_model_grads_func = self._finalize_gradients
        self.engine = RolloutEngine(
            self.models.student,
            self.models.teacher,
            layout,
            config.rollout,
            hidden_to_host=config.training.teacher_hidden_device == "host",
            other_bytes=plan.memory[layout.pp_rank].rollouts,
        )
        self.evaluator = Evaluator(config, self.pair, problem_sets, self.engine, rewards, layout)
        self.timer = PhaseTimer()
        self.guard = NonFiniteGuard(config.training.max_nonfinite_steps)
        self.step = 0
        self.prompt_position = 0
        self.evaluation_is_due = config.evaluation.at_start
        if self.is_distilling:  # before anything is written; the first step needs most
            self.engine.check_cache(
                config.data.max_prompt_tokens + config.rollout.max_response_tokens,
                with_teacher=self._policy().needs_teacher,
                what="data.max_prompt_tokens + rollout.max_response_tokens",
            )
        self._lock = lock_run_folder(self.run_dir, say=say)
        self._resume()
        write_run_folder(config)
        if config.rollout.draft_tokens == "auto" and self._policy().needs_teacher:
            self.engine.draft_costs = self._draft_costs()

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run all remaining steps, evaluating and saving on the way, and export the student.

        Asked to stop (see `stopping`), finish the step, save and return; the evaluation that the
        step may have been due for is made up for when the run goes on. The run folder's lock is
        given up at the end.
        """
        with self._lock, RunLog(self.config, self.step) as log, StopRequests() as stop_requests:
            if self.evaluation_is_due:
                log.add(self.step, self._evaluate(log))
            while self.step < self.config.training.steps:
                if reason := self._run_step(log, stop_requests):
                    message = (
                        f"stopped by {reason} after step {self.step} of "
                        f"{self.config.training.steps}; start the same command again to go on"
                    )
                    log.write(message)
                    stop_requests.confirm(message)
                    return
            if self.config.checkpoint.export_hf:
                self._export()

    def _run_step(self, log: RunLog, stop_requests: StopRequests) -> str | None:
        """Train a step and record it; why the run shall end after it, None to go on."""
        config = self.config
        metrics = self.train_step()
        is_last = self.step == config.training.steps
        is_periodic = self.step % config.evaluation.every == 0
        self.evaluation_is_due = config.evaluation.at_end if is_last else is_periodic

        def stop_reason() -> str | None:
            return None if is_last else stop_requests.agree()

        if self.evaluation_is_due and not stop_reason():
            metrics |= self._evaluate(log)
        log.record(self.step, metrics)
        if self.step % config.checkpoint.every == 0 or is_last or stop_reason():
            self._save()
            return stop_reason()
        return None

    def train_step(self) -> dict[str, float]:
        """Do one step and return its metrics; stages as in the module docstring."""
        policy = self._policy()
        prompts = self._next_prompts()
        with self.timer.phase("rollout"):
            rollouts = self._rollout(prompts, policy)
        rewards = self._score(rollouts)
        loss_sums, lr, grad_norm = {"loss": torch.tensor(torch.nan)}, torch.nan, torch.nan
        with self.guard.skipping():
            self.guard.check(find_in_rollouts(rollouts), self.step)
            microbatches = self._pack(rollouts)
            # The teacher's hidden states are large, and the microbatches have copies.
            rollouts = [dataclasses.replace(rollout, teacher_hidden=None) for rollout in rollouts]
            loss_sums, lr, grad_norm = self._train_on(microbatches, policy)
        metrics = self._metrics(rollouts, rewards, loss_sums)
        metrics |= {
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "optim/skipped_steps": self.guard.num_skipped,
        }
        if self.is_distilling and self.config.behavior.policy == "trb":
            metrics["behavior/kl_budget"] = self._kl_budget()
        self.step += 1
        self.prompt_position += self.config.training.prompts_per_step
        return metrics

    def _pack(self, rollouts: Sequence[Rollout]) -> list[Microbatch]:
        """The microbatches of this replica, as long as those of the others."""
        return build_microbatches(
            self._balance(rollouts),
            self.config.training.max_tokens_per_microbatch,
            self.layout.device,
            common_token_multiple((self.models.student, self.models.teacher)),
        )

    def _train_on(
        self, microbatches: list[Microbatch], policy: Policy
    ) -> tuple[dict[str, Tensor], float, float]:
        """Stages 4 to 6: sums of the loss and its metrics, learning rate and gradient norm."""
        with self.timer.phase("teacher"):
            if not (self.config.rollout.keep_teacher_hidden and policy.needs_teacher):
                microbatches = self._add_teacher_hidden(microbatches)
        with self.timer.phase("train"):
            loss_sums = self._forward_backward(microbatches)
            return loss_sums, *self._update()

    # ------------------------------------------------------------------ stages of a step

    def _kl_budget(self) -> float:
        behavior = self.config.behavior
        return kl_budget_at(self.step, behavior.kl_budget, behavior.warmup_steps, behavior.schedule)

    def _policy(self) -> Policy:
        """What this step's rollouts are sampled from; after the warmup it is the student."""
        behavior, kl_budget, sampling = self.config.behavior, self._kl_budget(), self._sampling()
        alignment, tp_group = self.pair.alignment, self.layout.tp_group
        is_warmup = self.is_distilling and self.step < behavior.warmup_steps
        if is_warmup and behavior.policy == "skd":
            return SKDPolicy(
                sampling, behavior.skd_top_k, behavior.skd_temperature, alignment, tp_group
            )
        if is_warmup and behavior.policy == "teacher":
            return TeacherPolicy(sampling, alignment, tp_group)
        if is_warmup and kl_budget > 0:
            return BlendPolicy(sampling, kl_budget, alignment, tp_group)
        return StudentPolicy(sampling, tp_group, alignment)

    def _next_prompts(self) -> list[Prompt]:
        count = self.config.training.prompts_per_step
        indices = self.order.indices(self.prompt_position, count)
        return [self.prompt_set.prompts[index] for index in indices]

    def _rollout(self, prompts: Sequence[Prompt], policy: Policy) -> list[Rollout]:
        """This replica's share of the responses: every dp-th of prompts x rollouts."""
        share = slice(self.layout.dp_rank, None, self.layout.dp_size)
        if not self.is_distilling:
            return [self._supervised_example(prompt) for prompt in prompts[share]]
        count = self.config.rollout.rollouts_per_prompt
        num_seen: Counter[int] = Counter()
        requests = []
        for prompt in prompts:  # a prompt that comes twice in a step gets other responses
            first = count * num_seen[prompt.index]
            num_seen[prompt.index] += 1
            requests += [
                Request(prompt.index, first + number, prompt.token_ids) for number in range(count)
            ]
        return self.engine.generate(requests[share], policy, self._sampling())

    def _sampling(self) -> Sampling:
        return Sampling(
            temperature=self.config.rollout.temperature,
            max_response_tokens=self.config.rollout.max_response_tokens,
            stop_ids=self.pair.stop_ids,
            seed=self.config.run.seed,
            step=self.step,
            num_valid=self.pair.tokenizer_size,
        )

    def _supervised_example(self, prompt: Prompt) -> Rollout:
        assert prompt.response_ids is not None
        response_ids = (*prompt.response_ids, self.pair.stop_ids[0])
        return Rollout(prompt.index, 0, prompt.token_ids, response_ids, stopped=True)

    def _score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Rewards of the responses whose prompts have answers; on leaders only."""
        if self.rewards is None or not self.is_distilling:
            return []
        answers = [self.answers.get(rollout.prompt_index) for rollout in rollouts]
        graded = [(r, answer) for r, answer in zip(rollouts, answers, strict=True) if answer]
        return self.rewards.score(
            [self.pair.decode(rollout.response_ids) for rollout, _ in graded],
            [answer for _, answer in graded],
        )

    def _balance(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Move rollouts between replicas until each trains on about as many tokens.

        Each rank talks to its peers in the data-parallel group: an all-gather of the lengths, then
        a send of every rollout that moves, with what it knows of the teacher.
        """
        layout = self.layout
        lengths: list[list[int]] = [[] for _ in range(layout.dp_size)]
        own_lengths = [len(rollout) - 1 for rollout in rollouts]
        dist.all_gather_object(lengths, own_lengths, group=layout.dp_group)
        moves = plan_moves(lengths)
        ranks = dist.get_process_group_ranks(layout.dp_group)
        given = {item for giver, item, _ in moves if giver == layout.dp_rank}
        kept = [rollout for item, rollout in enumerate(rollouts) if item not in given]
        for giver, item, taker in moves:
            if layout.dp_rank == giver:
                # What was recorded of its tokens is reported by the replica that drew them.
                moving = dataclasses.replace(rollouts[item], record=None).to("cpu")
                dist.send_object_list([moving], ranks[taker], layout.dp_group)
            elif layout.dp_rank == taker:
                received: list[Any] = [None]
                dist.recv_object_list(received, ranks[giver], layout.dp_group)
                on_host = self.config.training.teacher_hidden_device == "host"
                kept.append(received[0].to("cpu" if on_host else layout.device))
        return kept

    def _add_teacher_hidden(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Attach the teacher's hidden states at the loss positions, on the last stage."""
        if self.models.teacher is None:
            return microbatches
        to_host = self.config.training.teacher_hidden_device == "host"
        hidden = forward_hidden(self.models.teacher, microbatches, to_host=to_host)
        if not self.layout.is_last_stage:
            return microbatches
        return [
            dataclasses.replace(microbatch, teacher_hidden_NH=hidden_NH)
            for microbatch, hidden_NH in zip(microbatches, hidden, strict=True)
        ]

    def _forward_backward(self, microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
        """Gradients of the global mean loss per token; sums of the loss and its metrics."""
        self._microbatches = microbatches
        self._loss_problem: str | None = None
        self.student.train()
        self.student.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for metrics in forward_backward(self.student, microbatches, self._loss):
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        return sums

    def _loss(self, hidden_NH: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the sampled tokens of a microbatch, and sums of its metrics."""
        models, loss = self.models, self.config.loss
        teacher, alignment = None, None
        if models.teacher is not None:
            assert microbatch.teacher_hidden_NH is not None
            teacher = OutputLayer(microbatch.teacher_hidden_NH, models.teacher.output_weight)
            alignment = self.pair.alignment
        weight = models.student.output_weight
        veto_remaining = 1.0 - self.step / self.config.training.steps
        try:
            output = fused_loss(
                loss.name,
                OutputLayer(hidden_NH, weight),
                teacher,
                options=LossOptions(
                    top_k=loss.top_k,
                    temperature=loss.temperature,
                    jsd_weight=loss.jsd_weight,
                    veto_coef=loss.veto_coef * veto_remaining,
                ),
                tp_group=self.layout.tp_group,
                num_valid=self.pair.tokenizer_size,
                alignment=alignment,
                sampled_ids=microbatch.labels_N,
                weight_grad_UH=weight.main_grad,
                workspace_bytes=loss.workspace_mb * 10**6,
            )
        except RowError as error:
            # The other stages are in the middle of the schedule: go through with it.
            self._note_loss_problem(error.problem, microbatch, error.rows[0])
            return 0.0 * hidden_NH.sum(), {}
        if not output.loss_sum.isfinite():
            (rows,) = output.per_token.isfinite().logical_not().nonzero(as_tuple=True)
            self._note_loss_problem("the loss is not finite", microbatch, int(rows[0]))
        sums = {f"loss/{name}": values.sum() for name, values in output.metrics.items()}
        return output.loss_sum, {"loss": output.loss_sum.detach(), **sums}

    def _note_loss_problem(self, problem: str, microbatch: Microbatch, row: int) -> None:
        if self._loss_problem is None:
            self._loss_problem = f"{problem} at {microbatch.describe(row)}"

    def _finalize_gradients(self, models: list[Any], *args: Any, **kwargs: Any) -> None:
        """Stop on a non-finite loss or gradient while it is known whose it is, then reduce."""
        # The loss first: it is the reason where both are not finite, perhaps on other ranks.
        self.guard.check(self._loss_problem, self.step)
        problem = None
        if not all(bool(buffer.grad_data.isfinite().all()) for buffer in self.student.buffers):
            problem = find_in_gradients(self.models.student, self._microbatches)
        self.guard.check(problem, self.step)
        finalize_model_grads(models, *args, **kwargs)

    def _update(self) -> tuple[float, float]:
        """One AdamW update; the learning rate used and the gradient norm before clipping."""
        optimizer = self.config.optimizer
        lr = learning_rate_at(self.step, optimizer.lr, optimizer.warmup_steps)
        set_learning_rate(self.optimizer, lr)
        if optimizer.clip_grad == 0:
            grad_norm = float(self.optimizer.get_grad_norm())
            self.optimizer.step()
        else:
            _, grad_norm, _ = self.optimizer.step()
        return lr, float(grad_norm)

    # ------------------------------------------------------------------ records

    def _metrics(
        self, rollouts: Sequence[Rollout], rewards: Sequence[float], loss_sums: dict[str, Tensor]
    ) -> dict[str, float]:
        """Metrics of the step over all replicas, from sums that each leader contributes."""
        sums = {name: float(value) for name, value in loss_sums.items()}
        sums |= {
            "rollouts": len(rollouts),
            "tokens": sum(len(r.response_ids) for r in rollouts),
            "all_tokens": sum(len(r) for r in rollouts),
            "stopped": sum(r.stopped for r in rollouts),
            "rewards": len(rewards),
            "reward": sum(rewards),
            "timeouts": 0 if self.rewards is None else self.rewards.num_timeouts,
        }
        records = [r.record for r in rollouts if r.record is not None]
        if records:
            sums["blend_coef"] = sum(float(r.blend_coef.sum()) for r in records)
            sums["kl_student"] = sum(float(r.kl_student.sum()) for r in records)
            sums["accepted"] = sum(int(r.accepted.sum()) for r in records)
            sums["teacher_calls"] = sum(r.teacher_calls for r in rollouts)
        total: dict[str, float] = {}
        for share in gather_from_leaders(sums, self.layout):
            for name, value in share.items():
                total[name] = total.get(name, 0.0) + value
        seconds = self.timer.finish_step()
        return _averages(total) | {
            **{f"time/{phase}": value for phase, value in seconds.items()},
            "perf/tokens_per_s": total["tokens"] / seconds["step"],
            "perf/peak_memory_gb": peak_memory_gb(),
        }

    def _evaluate(self, log: RunLog) -> dict[str, float]:
        """Evaluate every set and show the result; the step's clock does not run meanwhile."""
        self.evaluation_is_due = False
        metrics: dict[str, float] = {}
        for name, result in self.evaluator.evaluate().items():
            log.write(f"step {self.step} | {name}: {result}")
            metrics |= result.metrics(name)
        self.timer.finish_step()
        return metrics

    # ------------------------------------------------------------------ set-up, save and resume

    def _plan(self) -> Plan:
        """Where everything will lie, said and, on a GPU, compared with its free memory."""
        plan = make_plan(self.config, self.pair, dist.get_world_size())
        memory = None
        if self.layout.device.type == "cuda":
            memory, _ = torch.cuda.mem_get_info(self.layout.device)
        for line in describe_plan(plan, self.pair, self.config, memory):
            say(line)
        if memory is not None:
            check_memory(plan, self.config, memory)
        return plan

    def _draft_costs(self) -> DraftCosts:
        """Costs of a rollout's rounds, measured when a run first starts and kept in its folder."""
        file = self.run_dir / "draft_costs.json"
        if file.is_file():
            return DraftCosts(**json.loads(file.read_text()))
        costs = self.engine.measure_draft_costs(self._policy(), self._sampling())
        with written_together(file, self.run_dir):
            if is_rank_zero():
                write_file(file, json.dumps(dataclasses.asdict(costs)) + "\n")
        return costs

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            prompt_position=self.prompt_position,
            num_skipped=self.guard.num_skipped,
            evaluation_is_due=self.evaluation_is_due,
            data_fingerprint=self.prompt_set.fingerprint,
            config=self.config.model_dump(mode="json"),
        )

    def _save(self) -> None:
        save_checkpoint(
            self.run_dir,
            self.student,
            self.optimizer,
            self._state(),
            self.pair.student,
            self.config.checkpoint.keep,
        )
        self.timer.finish_step()

    def _export(self) -> None:
        target = self.run_dir / "hf"
        with written_together(target, self.run_dir):
            save_hf_checkpoint(self.models.student, self.pair.student, self.layout, target)
        say(f"exported the student to {target}")

    def _resume(self) -> None:
        found = find_good_checkpoint(self.run_dir, say)
        if found is None:
            return
        checkpoint, state = found
        check_same_run(checkpoint, parse_config(state.config), self.config)
        if state.data_fingerprint != self.prompt_set.fingerprint:
            raise ConfigError(
                f"{self.config.data.path}: these are not the prompts that {checkpoint} was trained "
                "on; restore them or choose another run.dir"
            )
        load_checkpoint(checkpoint, self.student, self.optimizer)
        self.step, self.prompt_position = state.step, state.prompt_position
        self.guard.num_skipped = state.num_skipped
        self.evaluation_is_due = state.evaluation_is_due
        say(f"resumed from {checkpoint}")


def _check_counts(plan: Plan, models: ModelPair, layout: ParallelLayout) -> None:
    """Make sure that this rank's parameters are those that the plan gave it."""
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        if model is not None:
            planned = plan.models[name].stages[layout.pp_rank].num_parameters
            found = sum(param.numel() for param in model.parameters())
            assert found == planned, f"{name}: {found} parameters where the plan has {planned}"


def _averages(total: dict[str, float]) -> dict[str, float]:
    tokens, rollouts = total["tokens"], total["rollouts"]
    metrics = {n: v / tokens for n, v in total.items() if n == "loss" or n.startswith("loss/")}
    metrics |= {
        "rollout/tokens": tokens,
        "rollout/response_length": tokens / rollouts,
        "rollout/stop_fraction": total["stopped"] / rollouts,
    }
    if "blend_coef" in total:
        metrics |= {
            "behavior/blend_coef": total["blend_coef"] / tokens,
            "behavior/kl_per_token": total["kl_student"] / tokens,
            "behavior/kl_per_sequence": total["kl_student"] / rollouts,
            "behavior/acceptance": total["accepted"] / tokens,
            "rollout/teacher_calls_per_token": total["teacher_calls"] / tokens,
        }
    if total["rewards"] > 0:
        metrics["rollout/reward"] = total["reward"] / total["rewards"]
        metrics["rollout/reward_timeouts"] = total["timeouts"]
    return metrics
