"""Setting a run up: read, check, load, lock, resume.

Everything that a user must change is refused here, before the first step; what needs no weights is
read and checked before they are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import BinaryIO

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from trb_megatron.atomic_folder import write_file
from trb_megatron.behavior import sampling
from trb_megatron.behavior.policies import Policy
from trb_megatron.checkpoint.folders import TrainingCheckpointError, written_together
from trb_megatron.checkpoint.training import (
    TrainingState,
    find_good_checkpoint,
    load_checkpoint,
)
from trb_megatron.config.conflicts import config_warnings
from trb_megatron.config.data_options import AUTO_ANSWER_COLUMN
from trb_megatron.config.options import Config
from trb_megatron.config.reading import parse_config
from trb_megatron.distributed.layout import ParallelLayout, is_rank_zero, say
from trb_megatron.evaluation.evaluator import Evaluator, load_problem_sets
from trb_megatron.evaluation.rewards import RewardWorkers
from trb_megatron.huggingface.response_end import ResponseEnd
from trb_megatron.models.layers import flash_attention_version
from trb_megatron.models.pair import Models
from trb_megatron.models.sources import DTYPES, ModelSources
from trb_megatron.plan.plan import Plan, check_memory, make_plan
from trb_megatron.plan.report import describe_environment, describe_plan, describe_precision
from trb_megatron.prompts.records import Columns
from trb_megatron.prompts.source import PromptSet, PromptSource, load_prompts
from trb_megatron.rollout.drafting import DraftCosts, choose_num_positions
from trb_megatron.rollout.engine import RolloutEngine
from trb_megatron.rollout.sequences import ResponseSpec
from trb_megatron.rollout.step_settings import policy_at, responses_at
from trb_megatron.run.folder import (
    check_run_folder,
    check_same_run,
    lock_run_folder,
    write_run_folder,
)
from trb_megatron.run.inputs import check_same_inputs, digest_inputs, weights_of
from trb_megatron.run.template_date import with_template_date
from trb_megatron.update.optimizer import build_optimizer, wrap_student


@dataclass(frozen=True)
class Setup:
    """All that a run needs to begin, and where in it that is.

    Attributes:
        rewards: grading processes on the leader of each replica, None on other ranks.
        response_end: how supervised training ends its responses; None in distillation.
        student_ddp: the student with gradient buffers, in Megatron's DistributedDataParallel.
        lock: keeps other jobs out of the run's folder while it is open.
        state: of the newest good checkpoint, or of a run that has not begun.
    """

    config: Config
    layout: ParallelLayout
    rewards: RewardWorkers | None
    sources: ModelSources
    prompt_set: PromptSet
    response_end: ResponseEnd | None
    models: Models
    student_ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    engine: RolloutEngine
    evaluator: Evaluator
    lock: BinaryIO
    state: TrainingState


def set_up(config: Config, layout: ParallelLayout, rewards: RewardWorkers | None) -> Setup:
    """Read and check everything, load the models, lock the run's folder, and resume.

    Collective over all ranks.

    Raises:
        ValueError: something that the user must change.
        RunFolderError: the run's folder cannot be written to.
    """
    _describe_start(config, layout)
    if rewards is not None:
        rewards.check()
    sources = ModelSources.read(config, with_teacher=config.is_distilling)
    config = with_template_date(config, sources.tokenizer, say)
    check_run_folder(config)
    plan = _plan(config, sources, layout)
    prompt_set = _read_prompts(config, sources)
    problem_sets = load_problem_sets(config, sources.tokenizer)
    for name, problems in problem_sets.items():
        say(f"problems {name}: {problems.summary}; {len(problems.too_long):,} too long")
        for warning in problems.warnings:
            say(f"warning: {name}: {warning}")
    for warning in sources.check_tokenizers([prompt_set, *problem_sets.values()]):
        say(f"warning: {warning}")
    response_end = None if config.is_distilling else _find_response_end(config, sources)

    models = Models.load(sources, config, layout, say=say)
    _check_counts(plan, models, layout)
    student_ddp = wrap_student(models.student, config.optimizer)
    optimizer = build_optimizer(student_ddp, config.optimizer, DTYPES[config.training.precision])
    engine = RolloutEngine(
        models.student,
        models.teacher,
        layout,
        config.rollout,
        hidden_to_host=config.training.teacher_hidden_device == "host",
        other_bytes=plan.memory[layout.pp_rank].rollouts,
    )
    evaluator = Evaluator(config, sources, problem_sets, engine, rewards, layout)
    if config.is_distilling:  # before anything is written; the first step needs most
        engine.check_cache(
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            with_teacher=policy_at(0, config, sources, layout).needs_teacher,
            what="data.max_prompt_tokens + rollout.max_response_tokens",
        )

    lock = lock_run_folder(config.run.dir, say=say)
    inputs = digest_inputs(config, sources, prompt_set, problem_sets)
    for name, digest in sources.tokenizer_digests.items():
        weights = inputs[weights_of(name)]
        say(f"{name}: SHA-256 of its weights {weights[:12]}, of its tokenizer {digest[:12]}")
    state = _resume(config, inputs, student_ddp, optimizer)
    write_run_folder(config)
    policy = policy_at(state.step, config, sources, layout)
    if config.rollout.draft_tokens == "auto" and policy.needs_teacher:
        spec = responses_at(state.step, config, sources)
        engine.draft_costs = _draft_costs(config, plan, engine, policy, spec)
    return Setup(
        config=config,
        layout=layout,
        rewards=rewards,
        sources=sources,
        prompt_set=prompt_set,
        response_end=response_end,
        models=models,
        student_ddp=student_ddp,
        optimizer=optimizer,
        engine=engine,
        evaluator=evaluator,
        lock=lock,
        state=state,
    )


def _describe_start(config: Config, layout: ParallelLayout) -> None:
    kernel = flash_attention_version(layout.device, DTYPES[config.training.precision])
    for line in (*describe_environment(layout.device, kernel), *describe_precision(config)):
        say(line)
    for warning in config_warnings(config):
        say(f"warning: {warning}")


def _plan(config: Config, sources: ModelSources, layout: ParallelLayout) -> Plan:
    """Where everything will lie, said and, on a GPU, compared with its free memory."""
    plan = make_plan(config, sources, dist.get_world_size())
    memory = None
    if layout.device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(layout.device)
    for line in describe_plan(plan, sources, config, memory):
        say(line)
    if memory is not None:
        check_memory(plan, config, memory)
    return plan


def _check_counts(plan: Plan, models: Models, layout: ParallelLayout) -> None:
    """Make sure that this rank's parameters are those that the plan gave it."""
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        if model is not None:
            planned = plan.models[name].stages[layout.pp_rank].num_parameters
            found = sum(param.numel() for param in model.parameters())
            assert found == planned, f"{name}: {found} parameters where the plan has {planned}"


def _read_prompts(config: Config, sources: ModelSources) -> PromptSet:
    data = config.data
    finds_answers = data.answer_column == "auto"
    prompt_set = load_prompts(
        PromptSource(
            path=data.path,
            format=data.format,
            split=data.split,
            default_split="train",
            columns=Columns(
                data.prompt_column,
                AUTO_ANSWER_COLUMN if finds_answers else data.answer_column,
                None if config.is_distilling else data.response_column,
            ),
            needs_answers=not finds_answers,
            system_prompt=data.system_prompt,
            apply_chat_template=data.apply_chat_template,
            chat_template_kwargs=data.chat_template_kwargs,
            template_date=data.template_date,
            max_prompt_tokens=data.max_prompt_tokens,
        ),
        sources.tokenizer,
    )
    say(
        f"prompts: {prompt_set.summary}; {len(prompt_set.too_long):,} dropped, longer than "
        f"data.max_prompt_tokens={data.max_prompt_tokens}"
    )
    say(prompt_set.describe_first())
    for warning in prompt_set.warnings:
        say(f"warning: {warning}")
    if config.is_distilling and prompt_set.prompts[0].answer is None:
        reason = (
            f"no prompt has an answer in the column {AUTO_ANSWER_COLUMN!r}; name another in "
            "data.answer_column"
            if finds_answers
            else "data.answer_column=null"
        )
        say(f"no rewards during training: {reason}")
    return prompt_set


def _find_response_end(config: Config, sources: ModelSources) -> ResponseEnd:
    """The stop token that supervised training puts behind its responses; said."""
    data = config.data
    options = data.chat_template_kwargs if data.apply_chat_template else None
    response_end = ResponseEnd.find(sources.tokenizer, sources.stop_ids, options)
    say(str(response_end))
    return response_end


def _resume(
    config: Config,
    inputs: dict[str, str],
    student: DistributedDataParallel,
    optimizer: MegatronOptimizer,
) -> TrainingState:
    """Continue from the newest good checkpoint of the run's folder, if there is one.

    Raises:
        ConfigError: it belongs to a run with another configuration, or that read something else.
        TrainingCheckpointError: there are checkpoints, and none can be used; or their run draws
            tokens by another rule.
    """
    found = find_good_checkpoint(config.run.dir, say)
    if found is None:
        return TrainingState(
            step=0,
            prompt_position=0,
            num_skipped=0,
            evaluation_is_due=config.evaluation.at_start,
            inputs=inputs,
            config=config.model_dump(mode="json"),
            sampling=sampling.RULE,
        )
    checkpoint, state = found
    if config.is_distilling and state.sampling != sampling.RULE:
        raise TrainingCheckpointError(
            f"{checkpoint}: its run draws tokens by another rule ({state.sampling}; now "
            f"{sampling.RULE}), so a resumed run would be neither one nor the other; finish it "
            "with the version that began it, or export it (megatron_to_hf) and start another "
            "run.dir from that student"
        )
    saved = parse_config(state.config)
    check_same_run(checkpoint, saved, config)
    check_same_inputs(checkpoint, state.inputs, inputs, before=saved, after=config)
    load_checkpoint(checkpoint, student, optimizer)
    say(f"resumed from {checkpoint}")
    return dataclasses.replace(state, config=config.model_dump(mode="json"), inputs=inputs)


def _draft_costs(
    config: Config, plan: Plan, engine: RolloutEngine, policy: Policy, spec: ResponseSpec
) -> DraftCosts:
    """Costs of a rollout's rounds, kept in the run's folder.

    They are measured when a run first starts, and when it goes on where a round costs something
    else.
    """
    key = "rollout.draft_tokens=auto"
    file = config.run.dir / "draft_costs.json"
    num_sequences = min(config.rollout.max_sequences, plan.responses_per_replica)
    measured_at = {
        "device": engine.layout.device.type,
        "precision": config.training.precision,
        "ranks": [plan.tp_size, plan.pp_size, plan.dp_size],
        "num_sequences": num_sequences,
        "max_response_tokens": spec.max_response_tokens,
    }
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if stored.get("measured_at") == measured_at:
        say(f"{key}: by the costs in {file}")
        return DraftCosts.from_json(stored["costs"])
    say(f"{key}: timing rounds of up to {num_sequences:,} sequences")
    started = time.perf_counter()
    costs = engine.measure_draft_costs(policy, spec, num_sequences)
    seconds, acceptance = time.perf_counter() - started, policy.least_acceptance
    first = choose_num_positions(
        costs, acceptance, num_sequences, [spec.max_response_tokens], config.rollout.max_positions
    )
    say(
        f"{key}: {seconds:.1f} s for that; {costs}; begins with {first - 1} at an acceptance of "
        f"{acceptance:.2f}"
    )
    with written_together(file, config.run.dir):
        if is_rank_zero():
            content = {"measured_at": measured_at, "costs": dataclasses.asdict(costs)}
            write_file(file, json.dumps(content) + "\n")
    return costs
