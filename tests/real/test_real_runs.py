"""A real pair: greedy evaluation, twenty steps of TRB, resume and export."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.ranks import run_distributed
from tests.real.conftest import load_reference
from tests.runs import read_metrics, train_here, weights_digest

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "laptop.yaml"
NUM_PROBLEMS, NUM_TOKENS = 5, 20
BEGINNINGS = (
    *("The capital of France is", "Once upon a time, there was a", "Water boils at"),
    *("The sun rises in the", "A dog is an", "In the morning I drink"),
)
STEPS, SAVED_STEP = 20, 15
TIMEOUT_S = 360  # of a run, which takes about a minute on two free cores


def options(laptop_model: Path) -> list[str]:
    """Overrides that the configuration of the laptop needs for a folder of models."""
    return [
        f"student.path={laptop_model}/student",
        f"teacher.path={laptop_model}/teacher",
        f"data.path={laptop_model}/prompts.jsonl",
    ]


# ---------------------------------------------------------------- evaluation


def _answer_greedily(overrides: list[str]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts and responses of an evaluation, with fewer cache slots than problems."""
    from trb_megatron.behavior.policies import StudentPolicy
    from trb_megatron.config.reading import load_config
    from trb_megatron.distributed.layout import initialize
    from trb_megatron.evaluation.evaluator import load_problem_sets
    from trb_megatron.models.pair import Models
    from trb_megatron.models.sources import ModelSources
    from trb_megatron.rollout.engine import RolloutEngine
    from trb_megatron.rollout.sequences import Request, ResponseSpec

    config = load_config(CONFIG, overrides)
    layout = initialize(config.parallel)
    sources = ModelSources.read(config, with_teacher=False)
    (problems,) = load_problem_sets(config, sources.tokenizer).values()
    engine = RolloutEngine(
        Models.load(sources, config, layout).student, None, layout, config.rollout
    )
    policy = StudentPolicy(
        temperature=config.evaluation.temperature,
        num_valid=sources.tokenizer_size,
        alignment=None,
        tp_group=layout.tp_group,
    )
    spec = ResponseSpec(
        max_response_tokens=config.evaluation.max_response_tokens,
        stop_ids=sources.stop_ids,
        seed=0,
        step=0,
    )
    requests = [Request(i, 0, prompt.token_ids) for i, prompt in enumerate(problems.prompts)]
    rollouts = sorted(engine.generate(requests, policy, spec), key=lambda r: r.prompt_index)
    return [
        (request.prompt_ids, list(rollout.response_ids))
        for request, rollout in zip(requests, rollouts, strict=True)
    ]


def test_greedy_answers_equal_transformers_token_for_token(laptop_model: Path) -> None:
    overrides = [
        *options(laptop_model),
        f"student.path={laptop_model}/teacher",
        f"evaluation.sets.heldout.path={laptop_model}/heldout.jsonl",
        f"evaluation.sets.heldout.limit={NUM_PROBLEMS}",
        f"evaluation.max_response_tokens={NUM_TOKENS}",
        "rollout.max_sequences=3",
    ]
    (answers,) = run_distributed(_answer_greedily, 1, overrides)
    assert len(answers) == NUM_PROBLEMS
    reference = load_reference(laptop_model / "teacher")
    for prompt_ids, response_ids in answers:
        prompt = torch.tensor([prompt_ids])
        out = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        assert out[0, len(prompt_ids) :].tolist() == response_ids


# ---------------------------------------------------------------- training


class Run(NamedTuple):
    """A run of twenty steps, and what it left."""

    folder: Path
    arguments: tuple[str, ...]
    metrics: list[dict[str, Any]]
    digest: str


def _train(arguments: tuple[str, ...]) -> None:
    """One rank with both cores: replicas would spend their time on exchanging 99 M gradients."""
    torch.set_num_threads(2)
    train_here(CONFIG, arguments)


@pytest.fixture(scope="module")
def run(laptop_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real")
    rows = [json.dumps({"prompt": text}) + "\n" for text in BEGINNINGS]
    (folder / "prompts.jsonl").write_text("".join(rows))
    arguments = (
        *options(laptop_model),
        f"run.dir={folder}/run",
        f"data.path={folder}/prompts.jsonl",
        *("data.answer_column=null", "data.apply_chat_template=false", "evaluation.sets={}"),
        *(f"training.steps={STEPS}", "training.prompts_per_step=4"),
        *("rollout.max_response_tokens=10", f"checkpoint.every={SAVED_STEP}"),
        "behavior.warmup_steps=10",
    )
    run_distributed(_train, 1, arguments, timeout_s=TIMEOUT_S)
    metrics = read_metrics(folder / "run")
    return Run(folder / "run", arguments, metrics, weights_digest(folder / "run" / "hf"))


def test_loss_falls(run: Run) -> None:
    losses = [row["loss"] for row in run.metrics]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    blended = [row["behavior/kl_per_token"] for row in run.metrics]
    assert blended[0] > 0 == blended[-1]


def test_exported_student_is_nearer_the_teacher_for_transformers(
    laptop_model: Path, run: Run, texts: list[list[int]]
) -> None:
    teacher = load_reference(laptop_model / "teacher")

    def divergence(folder: Path) -> float:
        """Mean KL(teacher || student) over chats that training has not seen, in nats."""
        student = load_reference(folder)
        total = 0.0
        for tokens in texts:
            batch = torch.tensor([tokens])
            with torch.no_grad():
                log_p_TV = teacher(batch).logits[0].log_softmax(-1)
                log_q_TV = student(batch).logits[0].log_softmax(-1)
            total += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean().item()
        return total / len(texts)

    assert divergence(run.folder / "hf") < divergence(laptop_model / "student") - 0.1


def test_resumed_run_is_bit_identical(run: Run) -> None:
    shutil.rmtree(run.folder / "checkpoints" / f"step_{STEPS}")
    shutil.rmtree(run.folder / "hf")
    run_distributed(_train, 1, run.arguments, timeout_s=TIMEOUT_S)
    assert weights_digest(run.folder / "hf") == run.digest
    assert read_metrics(run.folder) == run.metrics
