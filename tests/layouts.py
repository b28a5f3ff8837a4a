"""One short run of the real system, repeated at several parallel layouts.

What must not depend on the layout is measured here once per layout, on real ranks, and compared by
the tests of the modules concerned (`test_models`, `test_rollout`, `test_trainer`,
`test_hf_weights`, `test_plan`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import run_distributed
from tests.runs import Holdings, measure_holdings
from tests.tiny import IM_END, make_checkpoint, make_prompts

STEPS = 3
SKD_TOP_K, SKD_TEMPERATURE = 5, 0.6
PROBE_POLICIES = ("student", "blend", "greedy", "skd", "teacher")
PROBE_RESPONSES = ((9, 4, 30, 0), (5,), (11, 12, 13, 14, 15, 16, 17), (3, 8, 0, 21, 2, 19, 6))


@dataclass(frozen=True)
class Layout:
    """How a probe runs; `overrides` change the configuration besides.

    `token_multiple`: of the teacher, and so of all that both models read, as for FP8.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    overrides: tuple[str, ...] = ()
    token_multiple: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}" + "".join(f"-{o}" for o in self.overrides)


ONE_RANK = Layout()
LAYOUTS = (
    ONE_RANK,
    Layout(
        tp=2,
        overrides=(
            "rollout.max_sequences=3",
            "rollout.max_prefill_tokens=20",
            "rollout.keep_teacher_hidden=false",
        ),
    ),
    Layout(
        pp=2,
        overrides=(
            "training.max_tokens_per_microbatch=64",
            "rollout.draft_tokens=auto",
            "rollout.cache_gb=5e-5",
        ),
    ),
    Layout(
        dp=2,
        overrides=(
            "optimizer.distributed=false",
            "rollout.draft_tokens=auto",
            "rollout.cache_gb=8e-5",
        ),
    ),
    Layout(
        tp=2,
        pp=2,
        overrides=("parallel.sequence_parallel=true", "rollout.draft_tokens=8"),
        token_multiple=32,
    ),
    # More ranks than query groups: the student has two, the teacher one.
    Layout(
        tp=4,
        overrides=(
            "training.recompute_activations=true",
            "rollout.draft_tokens=3",
            "rollout.max_sequences=5",
        ),
    ),
)


@dataclass(frozen=True)
class ProbeResult:
    """What one layout produced, as seen by rank 0 and the leaders."""

    logits: dict[str, list[torch.Tensor]]
    """Logits [len(response), vocabulary] of each probe sequence: of "student" and "teacher" before
    training, and of the "trained" student after it."""
    rollouts: dict[str, list[dict[str, Any]]]
    """policy -> rollouts as plain data, ordered by request."""
    metrics: list[dict[str, float]]
    """of each training step."""
    preemptions: dict[str, int]
    """policy -> how often a sequence was preempted, summed over replicas."""
    teacher_calls: list[int]
    """teacher forward passes in the rollouts of each training step, summed over replicas."""
    export: Path
    holdings: list[Holdings]
    """what each rank holds."""


def write_inputs(folder: Path) -> Path:
    """Prompts, and two checkpoints of different depth, width, query groups, rows and stop ids."""
    make_checkpoint(folder / "student", num_layers=3)
    make_checkpoint(
        folder / "teacher",
        seed=1,
        num_layers=5,
        hidden_size=48,
        num_groups=1,
        vocab_size=72,
        tied=False,
        eos_token_id=[IM_END, 0],
    )
    make_prompts(folder / "prompts.jsonl")
    (folder / "config.yaml").write_text(
        f"""
run: {{dir: {folder}/run}}
student: {{path: {folder}/student}}
teacher: {{path: {folder}/teacher}}
data: {{path: {folder}/prompts.jsonl, system_prompt: null, max_prompt_tokens: 48}}
training: {{steps: {STEPS}, prompts_per_step: 4, precision: fp32, max_tokens_per_microbatch: 200}}
rollout: {{rollouts_per_prompt: 2, max_response_tokens: 12, max_sequences: 16, page_tokens: 8,
  draft_tokens: 0}}
behavior: {{kl_budget: 0.05, warmup_steps: 2}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
evaluation: {{at_start: false, at_end: false, every: 100, max_response_tokens: 16}}
logging: {{tensorboard: false}}
"""
    )
    return folder / "config.yaml"


def load_probe_prompts(path: Path, tokenizer: Any) -> tuple[Any, ...]:
    """The prompts of the probe run, as its configuration reads them."""
    from trb_megatron.prompts.records import Columns
    from trb_megatron.prompts.source import PromptSource, load_prompts

    source = PromptSource(
        path=path,
        format="jsonl",
        columns=Columns("prompt", "answer", None),
        system_prompt=None,
        apply_chat_template=True,
        max_prompt_tokens=48,
    )
    return load_prompts(source, tokenizer).prompts


def probe(config_file: Path, layout: Layout) -> ProbeResult:
    """Run a layout on its own ranks."""
    results = run_distributed(_probe_rank, layout.world_size, config_file, layout, timeout_s=240)
    return replace(results[0], holdings=[rank.holdings[0] for rank in results])


def layout_overrides(layout: Layout) -> list[str]:
    """What a layout changes in the configuration."""
    return [
        f"parallel.tensor_model_parallel_size={layout.tp}",
        f"parallel.pipeline_model_parallel_size={layout.pp}",
        *layout.overrides,
    ]


def _probe_rank(config_file: Path, layout: Layout) -> ProbeResult:
    from trb_megatron.config.reading import load_config
    from trb_megatron.distributed.layout import gather_from_leaders, initialize

    export = config_file.parent / f"run-{layout}"
    config = load_config(config_file, [f"run.dir={export}", *layout_overrides(layout)])
    parallel = initialize(config.parallel)

    from trb_megatron.evaluation.rewards import start_reward_workers
    from trb_megatron.setup import set_up
    from trb_megatron.trainer import Trainer

    with start_reward_workers(config.rewards, parallel) as rewards:
        trainer = Trainer(set_up(config, parallel, rewards))
        if layout.token_multiple is not None:
            trainer.models.teacher.token_multiple = layout.token_multiple
        logits = {
            "student": _probe_logits(trainer.models.student, trainer),
            "teacher": _probe_logits(trainer.models.teacher, trainer),
        }
        rollouts, preemptions = {}, {}
        for name in PROBE_POLICIES:
            rollouts[name] = _probe_rollouts(trainer, name)
            preempted = gather_from_leaders(trainer.engine.counts.preemptions, parallel)
            preemptions[name] = sum(preempted)
        metrics, teacher_calls = [], []
        for _ in range(STEPS):
            metrics.append(trainer.train_step())
            calls = gather_from_leaders(trainer.engine.counts.teacher_calls, parallel)
            teacher_calls.append(sum(calls))
        logits["trained"] = _probe_logits(trainer.models.student, trainer)
        from trb_megatron.models.weights import save_hf_checkpoint

        save_hf_checkpoint(trainer.models.student, trainer.sources.student, parallel, export / "hf")
        holdings = [measure_holdings(trainer)]
    return ProbeResult(
        logits, rollouts, metrics, preemptions, teacher_calls, export / "hf", holdings
    )


def _prompt(trainer: Any, index: int) -> tuple[int, ...]:
    return trainer.prompt_set.prompts[index].token_ids


def _probe_logits(model: Any, trainer: Any) -> list[torch.Tensor]:
    """Full-vocabulary logits at the loss positions; only a test may gather them."""
    from trb_megatron.batch import Rollout, build_microbatch
    from trb_megatron.distributed.layout import gather_from_leaders
    from trb_megatron.models.forward import forward_hidden

    layout = trainer.layout
    rollouts = [
        Rollout(i, 0, _prompt(trainer, i), response, stopped=True)
        for i, response in enumerate(PROBE_RESPONSES)
    ]
    microbatches = [
        build_microbatch(part, layout.device, model.token_multiple)
        for part in (rollouts[:2], rollouts[2:])
    ]
    logits: list[torch.Tensor] = []
    model.eval()
    for hidden_NH in forward_hidden(model, microbatches):
        shard_NU = model.project(hidden_NH).detach()
        shards = [torch.empty_like(shard_NU) for _ in range(layout.tp_size)]
        dist.all_gather(shards, shard_NU, group=layout.tp_group)
        logits.append(torch.cat(shards, dim=-1))
    (logits, *_) = gather_from_leaders(logits, layout)
    return list(torch.cat(logits).split([len(rollout.response_ids) for rollout in rollouts]))


def _probe_rollouts(trainer: Any, policy_name: str) -> list[dict[str, Any]]:
    from trb_megatron.behavior.policies import (
        BlendPolicy,
        SKDPolicy,
        StudentPolicy,
        TeacherPolicy,
    )
    from trb_megatron.distributed.layout import gather_from_leaders
    from trb_megatron.rollout.sequences import Request, ResponseSpec

    layout = trainer.layout
    spec = ResponseSpec(max_response_tokens=12, stop_ids=trainer.sources.stop_ids, seed=7, step=0)
    shared = {
        "temperature": 1.0,
        "num_valid": trainer.sources.tokenizer_size,
        "alignment": trainer.sources.alignment,
        "tp_group": layout.tp_group,
    }
    skd = {"top_k": SKD_TOP_K, "teacher_temperature": SKD_TEMPERATURE}
    policy: Any = {
        "student": lambda: StudentPolicy(**shared),
        "blend": lambda: BlendPolicy(kl_budget=0.05, **shared),
        "greedy": lambda: StudentPolicy(**shared | {"temperature": 0.0, "alignment": None}),
        "skd": lambda: SKDPolicy(**skd, **shared),
        "teacher": lambda: TeacherPolicy(**shared),
    }[policy_name]()
    requests = [Request(i, r, _prompt(trainer, i)) for i in range(8) for r in range(3)]
    share = requests[layout.dp_rank :: layout.dp_size]
    found = [asdict(rollout) for rollout in trainer.engine.generate(share, policy, spec)]
    everything = [row for rows in gather_from_leaders(found, layout) for row in rows]
    return sorted(everything, key=lambda row: (row["prompt_index"], row["rollout_index"]))
