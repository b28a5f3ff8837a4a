"""The training loop: the same at every layout, and what it must refuse."""

import gc
import itertools
import json
import re
import shutil
import weakref
from contextlib import ExitStack, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.layouts import LAYOUTS, ONE_RANK, Layout, ProbeResult, write_inputs
from tests.ranks import run_distributed
from tests.runs import make_trainer, read_metrics, run_module, train, weights_digest
from tests.tiny import (
    CHARACTERS,
    END_OF_TEXT,
    IM_END,
    SPECIAL_TOKENS,
    make_checkpoint,
    make_tokenizer,
)
from trb_megatron.config.reading import load_config


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(
    probe_results: dict[Layout, ProbeResult], layout: Layout
) -> None:
    for one, other in zip(
        probe_results[ONE_RANK].metrics, probe_results[layout].metrics, strict=True
    ):
        for name in ("loss", "optim/grad_norm", "loss/student_topk_mass", "loss/teacher_entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
        assert other["rollout/tokens"] == one["rollout/tokens"]
        assert other["rollout/reward"] == one["rollout/reward"]


def test_realised_kl_follows_the_budget(probe_results: dict[Layout, ProbeResult]) -> None:
    metrics = probe_results[ONE_RANK].metrics
    assert [m["behavior/kl_budget"] for m in metrics] == pytest.approx([0.05, 0.025, 0.0])
    for m in metrics:
        assert m["behavior/kl_per_token"] == pytest.approx(m["behavior/kl_budget"], rel=1e-3)
        assert m["behavior/kl_per_sequence"] == pytest.approx(
            m["behavior/kl_per_token"] * m["rollout/response_length"]
        )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("trainer"))


def _unreachable(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("blending was reached")


def _count_teacher_calls(trainer: Any) -> list[int]:
    """Teacher calls of each rollout that follows, as a list that grows."""
    generate, counted = trainer.engine.generate, []

    def counting(*args: Any) -> Any:
        rollouts = generate(*args)
        counted.append(trainer.engine.counts.teacher_calls)
        return rollouts

    trainer.engine.generate = counting
    return counted


def _run_variants(config_file: Path, variants: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Runs one after another on one rank; teacher calls of each. See `variant_runs`."""
    calls = {}
    for name, overrides in variants.items():
        run_dir = config_file.parent / name
        with ExitStack() as stack:
            if name == "vanilla_without_blending_code":
                for function in ("solve_behavior", "draw_tokens"):
                    stack.enter_context(
                        mock.patch(f"trb_megatron.behavior.policies.{function}", _unreachable)
                    )
            trainer = make_trainer(config_file, (f"run.dir={run_dir}", *overrides))
            teacher_calls = _count_teacher_calls(trainer)
            trainer.train()
            calls[name] = sum(teacher_calls)
    return calls


FIVE_STEPS = ("training.steps=5", "checkpoint.every=100")
VARIANTS = {
    "vanilla": (*FIVE_STEPS, "behavior.kl_budget=0"),
    "vanilla_without_blending_code": (*FIVE_STEPS, "behavior.kl_budget=0"),
    "ended_warmup": (*FIVE_STEPS, "behavior.kl_budget=0.05", "behavior.warmup_steps=1"),
    "own_teacher": (*FIVE_STEPS, "teacher.path={folder}/student", "behavior.warmup_steps=5"),
    "own_teacher_full": (
        *("training.steps=2", "teacher.path={folder}/student", "loss.name=reverse_kl_full"),
        "loss.temperature=2.0",
    ),
    "skd": (
        *(*FIVE_STEPS, "rollout.draft_tokens=auto", "behavior.warmup_steps=2"),
        *("behavior.policy=skd", "behavior.skd_top_k=5", "behavior.skd_temperature=0.6"),
    ),
    "teacher_rollouts": (*FIVE_STEPS, "behavior.policy=teacher", "behavior.warmup_steps=2"),
    "supervised": (
        *("training.task=supervised", "loss.name=cross_entropy", "training.steps=30"),
        *("data.response_column=response", "optimizer.lr=0.01", "checkpoint.every=100"),
    ),
}


@pytest.fixture(scope="module")
def variant_runs(config_file: Path) -> dict[str, int]:
    """Teacher calls of several whole runs, whose folders lie beside the configuration."""
    variants = {
        name: tuple(option.format(folder=config_file.parent) for option in options)
        for name, options in VARIANTS.items()
    }
    return run_distributed(_run_variants, 1, config_file, variants, timeout_s=400)[0]


def test_zero_budget_is_plain_distillation_bit_for_bit(
    config_file: Path, variant_runs: dict[str, int]
) -> None:
    folder = config_file.parent
    vanilla, without = (folder / n for n in ("vanilla", "vanilla_without_blending_code"))
    assert weights_digest(vanilla / "hf") == weights_digest(without / "hf")
    assert read_metrics(vanilla) == read_metrics(without)
    assert variant_runs["vanilla"] == 0
    assert weights_digest(vanilla / "hf") != weights_digest(folder / "student")


def test_rollouts_after_the_warmup_do_not_call_the_teacher(
    config_file: Path, variant_runs: dict[str, int]
) -> None:
    rows = read_metrics(config_file.parent / "ended_warmup")
    assert [row["behavior/kl_budget"] for row in rows] == [0.05, 0, 0, 0, 0]
    longest = 12  # rollout.max_response_tokens: one prefill and eleven decode steps
    assert 0 < variant_runs["ended_warmup"] <= longest


@pytest.mark.parametrize("name", ["skd", "teacher_rollouts"])
def test_other_policies_end_with_the_warmup_and_report_what_they_know(
    config_file: Path, variant_runs: dict[str, int], name: str
) -> None:
    rows = read_metrics(config_file.parent / name)
    asked = [row["rollout/teacher_calls_per_token"] > 0 for row in rows]
    assert asked == [True, True, False, False, False]
    assert [row["behavior/acceptance"] < 1 for row in rows] == asked
    assert [row["behavior/kl_per_token"] > 0.05 for row in rows] == asked
    coef = None if name == "skd" else 1  # SKD is on no path between student and teacher
    assert [row["behavior/blend_coef"] for row in rows] == [coef, coef, 0, 0, 0]
    assert not any("behavior/kl_budget" in row for row in rows)


@pytest.mark.parametrize("name", ["own_teacher", "own_teacher_full"])
def test_student_that_is_its_own_teacher_has_nothing_to_learn(
    config_file: Path, variant_runs: dict[str, int], name: str
) -> None:
    for row in read_metrics(config_file.parent / name)[:1]:
        assert abs(row["loss"]) < 1e-6
        assert row["optim/grad_norm"] < 1e-5
        assert row["behavior/kl_per_token"] < 1e-6
        assert row["behavior/blend_coef"] == 1.0  # the teacher is within any budget


def test_supervised_training_learns(config_file: Path, variant_runs: dict[str, int]) -> None:
    losses = [row["loss"] for row in read_metrics(config_file.parent / "supervised")]
    assert losses[-1] < 0.4 * losses[0]


def _given_responses(config_file: Path, options: tuple[str, ...]) -> tuple[list[Any], str]:
    """The rollouts of supervised training, and what the start says."""
    with redirect_stdout(StringIO()) as output:
        trainer = make_trainer(config_file, options)
    return [r.response_ids for r in trainer.rollout(trainer.prompts(), None)], output.getvalue()


def test_supervised_responses_end_as_a_turn_of_the_template_does(tmp_path: Path) -> None:
    """Not with the first stop id, and not with two."""
    config_file = write_inputs(tmp_path)
    shutil.rmtree(tmp_path / "student")
    make_checkpoint(tmp_path / "student", eos_token_id=[END_OF_TEXT, IM_END])
    rows = [{"prompt": "1+1=?", "response": r} for r in ("2", "2<|im_end|>", "2<|endoftext|>")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        *("training.task=supervised", "loss.name=cross_entropy", "data.shuffle=false"),
        *("data.response_column=response", "training.prompts_per_step=3"),
    )
    responses, said = run_distributed(_given_responses, 1, config_file, options)[0]
    two = make_tokenizer().convert_tokens_to_ids("2")
    assert responses == [(two, IM_END), (two, IM_END), (two, END_OF_TEXT)]
    assert "\nresponses end with '<|im_end|>' (id 2), which ends a turn in the chat" in said


def _make_large_vocabulary(folder: Path) -> Path:
    """Qwen's sizes: 151,669 ids; 151,936 rows for the student and 152,064 for the teacher."""
    config_file = write_inputs(folder)
    words = [f"w{i:x}" for i in range(151_669 - len(SPECIAL_TOKENS) - len(CHARACTERS))]
    tokenizer = make_tokenizer([*CHARACTERS, *words])
    for name, rows, tied in (("student", 151_936, True), ("teacher", 152_064, False)):
        shutil.rmtree(folder / name)
        make_checkpoint(
            folder / name, num_layers=1, hidden_size=16, vocab_size=rows, tied=tied, scale=0.1
        )
        tokenizer.save_pretrained(folder / name)
    return config_file


def test_vocabularies_of_different_rows(tmp_path: Path) -> None:
    config_file = _make_large_vocabulary(tmp_path)
    train(
        config_file,
        2,
        "parallel.tensor_model_parallel_size=2",
        "training.steps=2",
        "training.prompts_per_step=2",
        "rollout.max_response_tokens=4",
    )
    run_dir = tmp_path / "run"
    source = load_file(tmp_path / "student" / "model.safetensors")
    export = load_file(run_dir / "hf" / "model.safetensors")
    assert {name: t.shape for name, t in export.items()} == {n: t.shape for n, t in source.items()}
    embedding = "model.embed_tokens.weight"
    assert export[embedding].shape == (151_936, 16)
    # Rows beyond the tokenizer take part in nothing: weight decay alone (two steps) moves them.
    decay = (1 - 0.01 * 5e-4) * (1 - 0.01 * 1e-3)
    torch.testing.assert_close(export[embedding][151_669:], source[embedding][151_669:] * decay)
    assert not torch.equal(export[embedding][:151_669], source[embedding][:151_669])
    for row in read_metrics(run_dir):
        assert 0 < row["behavior/kl_per_token"] <= row["behavior/kl_budget"] * (1 + 1e-3)


def _responses_of_a_step(config_file: Path) -> dict[int, list[tuple[int, ...]]]:
    """Responses by prompt in a step of more prompts than there are."""
    from trb_megatron.rollout.step_settings import policy_at

    trainer = make_trainer(
        config_file, (f"run.dir={config_file.parent}/repeats", "training.prompts_per_step=30")
    )
    found: dict[int, list[tuple[int, ...]]] = {}
    policy = policy_at(0, trainer.config, trainer.sources, trainer.layout)
    for rollout in trainer.rollout(trainer.prompts(), policy):
        found.setdefault(rollout.prompt_index, []).append(rollout.response_ids)
    return found


def test_prompt_that_comes_twice_in_a_step_gets_other_responses(config_file: Path) -> None:
    found = run_distributed(_responses_of_a_step, 1, config_file)[0]
    assert sorted(len(responses) for responses in found.values()) == [4] * 6 + [6] * 6
    assert all(len(set(responses)) > len(responses) / 2 for responses in found.values())


def _count_living_microbatches(config_file: Path) -> tuple[int, int]:
    """Microbatches of a step, and those that are still there after it."""
    trainer = make_trainer(config_file, (f"run.dir={config_file.parent}/living",))
    exchange, made = trainer.exchange, []

    def noting(rollouts: Any) -> Any:
        microbatches = exchange(rollouts)
        made.extend(weakref.ref(microbatch) for microbatch in microbatches)
        return microbatches

    trainer.exchange = noting
    trainer.train_step()
    gc.collect()
    return len(made), sum(reference() is not None for reference in made)


def test_microbatches_do_not_outlive_their_step(config_file: Path) -> None:
    """They hold the teacher's hidden states, and the next rollouts need that memory."""
    num_made, num_alive = run_distributed(_count_living_microbatches, 1, config_file)[0]
    assert num_made > 0 and num_alive == 0


GUIDED = {
    "trb": (),
    "skd": ("behavior.policy=skd", "behavior.skd_top_k=5"),
    "teacher": ("behavior.policy=teacher",),
}


def _step_with_and_without_kept_hidden(config_file: Path) -> dict[tuple[str, bool], Any]:
    """Gradient, parameters after one step, and separate teacher passes, for policy and switch."""
    from trb_megatron.models.forward import forward_hidden

    found = {}
    for name, keep in itertools.product(GUIDED, (True, False)):
        switch = f"rollout.keep_teacher_hidden={str(keep).lower()}"
        run_dir = f"run.dir={config_file.parent}/{name}_{keep}"
        trainer = make_trainer(
            config_file, (run_dir, switch, "rollout.draft_tokens=3", *GUIDED[name])
        )
        with (
            mock.patch.object(trainer, "update", partial(_copy_gradients, trainer)),
            mock.patch("trb_megatron.trainer.forward_hidden", wraps=forward_hidden) as passes,
        ):
            trainer.train_step()
        parameters = torch.cat([p.detach().flatten() for p in trainer.models.student.parameters()])
        found[name, keep] = trainer.copied_gradient, parameters, passes.call_count
    return found


def _copy_gradients(trainer: Any) -> dict[str, float]:
    """The update of a trainer, keeping the gradient before it."""
    trainer.copied_gradient = torch.cat([b.grad_data.clone() for b in trainer.student_ddp.buffers])
    return type(trainer).update(trainer)


@pytest.fixture(scope="module")
def kept_hidden(config_file: Path) -> dict[tuple[str, bool], Any]:
    return run_distributed(_step_with_and_without_kept_hidden, 1, config_file)[0]


@pytest.mark.parametrize("name", GUIDED)
def test_hidden_states_kept_from_rollouts_give_the_same_update(
    kept_hidden: dict[tuple[str, bool], Any], name: str
) -> None:
    kept_gradient, kept_parameters, num_kept_passes = kept_hidden[name, True]
    gradient, parameters, num_passes = kept_hidden[name, False]
    assert (num_kept_passes, num_passes) == (0, 1)
    assert gradient.norm() > 0
    assert (kept_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert (kept_parameters - parameters).norm() < 1e-5 * parameters.norm()


def _construct_all(config_file: Path, cases: tuple[tuple[str, ...], ...]) -> list[tuple[str, bool]]:
    """For each set of overrides: the error of set-up, and whether the run folder was made."""
    run_dir = config_file.parent / "refused"
    found = []
    for overrides in cases:
        with pytest.raises(ValueError) as caught:
            make_trainer(config_file, (f"run.dir={run_dir}", *overrides))
        found.append((str(caught.value), run_dir.exists()))
    return found


def test_impossible_runs_are_refused_before_anything_is_written(config_file: Path) -> None:
    folder = config_file.parent
    other = make_checkpoint(folder / "other_tokenizer", vocab_size=72)
    make_tokenizer(CHARACTERS[::-1]).save_pretrained(other)
    truncated = make_checkpoint(folder / "truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    unending = make_checkpoint(folder / "unending")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((unending / name).read_text())
        values.pop("eos_token_id", None)
        (unending / name).write_text(json.dumps(values))
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=?", "answer": "2"}\n{"prompt": \n')
    cases = {
        (f"teacher.path={other}",): r"different tokenizers: id 3 is '0'.* and '\?'",
        (f"student.path={truncated}",): r"truncated/model\.safetensors: truncated or corrupt",
        (f"student.path={unending}",): r"no eos_token_id in .*unending",
        # Data are read before weights, which take longer.
        (f"data.path={broken}", f"student.path={truncated}"): r"broken\.jsonl:2",
        (
            f"evaluation.sets={{math: {{path: {broken}}}}}",
            f"student.path={truncated}",
        ): r"broken\.jsonl:2",
        ("teacher.path=/nowhere",): r"/nowhere: no such model folder",
        ("loss.top_k=54",): r"loss\.top_k=54 exceeds the vocabulary of 53 ids, stop ids merged",
        (
            "behavior.policy=skd",
            "behavior.skd_top_k=54",
        ): r"behavior\.skd_top_k=54 exceeds the vocabulary of 53 ids",
        (
            "rollout.max_response_tokens=100",
        ): r"max_response_tokens = 148 exceeds the 128 positions",
        ("rollout.stop_ids=[60]",): r"stop id 60 is not in the tokenizer",
        ("data.max_prompt_tokens=3",): r"all 12 are longer than max_prompt_tokens=3",
        (f"run.dir={config_file}/run",): r"config.yaml is not a folder that can be written to",
    }
    found = run_distributed(_construct_all, 1, config_file, tuple(cases))[0]
    for (message, wrote), pattern in zip(found, cases.values(), strict=True):
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
        assert not wrote, message


@pytest.mark.parametrize("column", ["auto", "null", "solution"])
def test_prompts_without_answers_train_without_rewards(tmp_path: Path, column: str) -> None:
    config_file = write_inputs(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    overrides = [f"data.answer_column={column}", "training.steps=1", "checkpoint.export_hf=false"]
    done = run_module("trb_megatron.train", str(config_file), *overrides)
    if column == "solution":
        assert done.returncode == 2
        assert "prompts.jsonl:1: no value in the column 'solution'; the columns are" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no rewards during training: ") == 1
    assert "step 1/1 | loss" in done.stderr
    assert "reward" not in done.stderr
    (metrics,) = read_metrics(tmp_path / "run")
    assert [name for name in metrics if "reward" in name] == []


def _say_draft_costs(config_file: Path, runs: list[tuple[str, ...]]) -> list[str]:
    """The first line on draft costs of each set-up."""
    said = []
    for overrides in runs:
        with redirect_stdout(StringIO()) as output:
            make_trainer(config_file, overrides).lock.close()
        said += [line for line in output.getvalue().splitlines() if "draft_tokens=auto" in line][:1]
    return said


def test_draft_costs_are_measured_once_and_where_a_step_has_other_sequences(
    config_file: Path,
) -> None:
    shared = (f"run.dir={config_file.parent}/costs", "rollout.draft_tokens=auto")
    shared = (*shared, "behavior.kl_budget=0.05", "rollout.max_sequences=256")
    runs = [shared, shared, (*shared, "rollout.max_sequences=3")]
    said = run_distributed(_say_draft_costs, 1, config_file, runs, timeout_s=120)[0]
    config = load_config(config_file, list(shared))
    share = config.training.prompts_per_step * config.rollout.rollouts_per_prompt
    assert said == [
        f"rollout.draft_tokens=auto: timing rounds of up to {share} sequences",
        f"rollout.draft_tokens=auto: by the costs in {config_file.parent}/costs/draft_costs.json",
        "rollout.draft_tokens=auto: timing rounds of up to 3 sequences",
    ]
