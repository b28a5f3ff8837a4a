"""pass@k, and evaluation as a command on real ranks."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import write_inputs
from tests.runs import run_module
from tests.tiny import make_checkpoint, make_prompts, make_tokenizer
from trb_megatron.config.reading import load_job_config
from trb_megatron.evaluate import main
from trb_megatron.evaluation.evaluator import EvaluationResult, pass_at_k
from trb_megatron.evaluation.final_answer import find_answer
from trb_megatron.models.sources import ModelSources


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int) -> None:
    answers = [i < c for i in range(n)]
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_result_reads_as_a_line_and_as_metrics() -> None:
    scores = {1: 0.25, 4: 0.5}
    result = EvaluationResult(scores, 12.5, 0.75, num_problems=8, num_too_long=0, num_samples=4)
    assert str(result) == (
        "pass@1 25.0 %, pass@4 50.0 % (8 problems x 4, 12.5 tokens, 75 % stopped)"
    )
    assert "(8 problems x 4, 2 of them too long and wrong, 12.5 tokens" in str(
        dataclasses.replace(result, num_too_long=2)
    )
    assert result.metrics("sums") == {
        "eval/sums/pass@1": 0.25,
        "eval/sums/pass@4": 0.5,
        "eval/sums/response_length": 12.5,
        "eval/sums/stop_fraction": 0.75,
        "eval/sums/too_long": 0,
    }


def test_command_evaluates_the_same_at_two_layouts(tmp_path: Path) -> None:
    config = str(write_inputs(tmp_path))
    options = (
        f"evaluation.sets={{sums: {{path: {tmp_path}/prompts.jsonl, limit: 8}}}}",
        "evaluation.samples=2",
        "evaluation.pass_at=[1, 2]",
    )
    one = run_module("trb_megatron.evaluate", config, *options, ranks=1)
    assert one.returncode == 0, one.stderr
    two = run_module("trb_megatron.evaluate", config, *options, ranks=2)
    assert two.returncode == 0, two.stderr
    results = json.loads(one.stdout)
    assert results == json.loads(two.stdout)
    assert set(results) >= {"eval/sums/pass@1", "eval/sums/pass@2"}
    assert 0 < results["eval/sums/response_length"] <= 16


def test_thinking_that_the_template_opened_is_not_the_answer() -> None:
    demo = Path(__file__).parents[2] / "launch" / "demo" / "student"
    config = load_job_config(None, [f"student.path={demo}"])
    sources = ModelSources.read(config, with_teacher=False)
    response = sources.tokenizer.encode("9 or 12", add_special_tokens=False)
    for prompt, text in (
        ("1+2<think>\n", "<think>9 or 12"),
        ("1+2", "9 or 12"),
        ("<think>1+2</think>", "9 or 12"),
    ):
        prompt_ids = sources.tokenizer.encode(prompt, add_special_tokens=False)
        assert sources.decode_to_grade(prompt_ids, response) == text
        assert (find_answer(text) is None) == (text != "9 or 12")


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_command_needs_a_model_and_problems_alone(tmp_path: Path) -> None:
    student = make_checkpoint(tmp_path / "student")
    files = [tmp_path / name / "test.jsonl" for name in ("easy", "hard")]
    for file, count in zip(files, (3, 5), strict=True):
        file.parent.mkdir()
        make_prompts(file, count)
    long = {"prompt": "+".join("1" * 30) + "=?", "answer": "30"}
    with files[1].open("a") as hard:
        hard.write(json.dumps(long) + "\n")
    output = tmp_path / "responses.jsonl"
    options = ["--student", str(student), "--output", str(output), "--problems", *map(str, files)]
    overrides = ["evaluation.samples=2", "evaluation.sets.hard-test.max_prompt_tokens=40"]
    overrides += ["evaluation.sets.hard-test.system_prompt=null"]
    done = run_module("trb_megatron.evaluate", *options, *overrides)
    assert done.returncode == 0, done.stderr

    rows = read_rows(output)
    assert [(row["set"], row["problem"], row["sample"]) for row in rows] == [
        (name, problem, sample)
        for name, count in (("easy-test", 3), ("hard-test", 6))
        for problem in range(count)
        for sample in range(2)
    ]
    for row in rows[-2:]:
        assert (row["problem"], row["gold"], row["response"], row["verdict"], row["length"]) == (
            *(5, "30", None, False, 0),
        )
    answered = rows[:-2]
    for row in answered:
        assert row["gold"] == str(3 * row["problem"])
        has_system_prompt = row["prompt"].startswith("<|im_start|>system\n?lease reason step by ")
        assert has_system_prompt == (row["set"] == "easy-test")
        assert row["prompt"].endswith(
            f"\n{row['problem']}+{2 * row['problem']}=?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert row["length"] >= 1 and row["stopped"] in (True, False)
        assert row["timed_out"] is False
    metrics = json.loads(done.stdout)
    for name in ("easy-test", "hard-test"):
        of_set = [row for row in rows if row["set"] == name]
        mean_length = sum(r["length"] for r in of_set) / len([r for r in of_set if r in answered])
        assert metrics[f"eval/{name}/pass@1"] == sum(r["verdict"] for r in of_set) / len(of_set)
        assert metrics[f"eval/{name}/response_length"] == pytest.approx(mean_length)

    assert metrics["eval/hard-test/too_long"] == 1
    lengths = [len(make_tokenizer()(row["prompt"])["input_ids"]) for row in answered]
    longest = max(lengths)
    for said in (
        f"easy-test: 3 rows of {files[0]}, columns prompt, answer\n",
        f"hard-test: 6 rows of {files[1]}, columns prompt, answer; 1 longer than 40 tokens count "
        "as wrong",
        "easy-test: in the student's chat template, system prompt 'Please reason step by step",
        "hard-test: in the student's chat template, without a system prompt of ours",
        f"easy-test: first prompt, {lengths[0]} tokens: '<|im_start|>system\\n?lease reason step",
        "\\n0+0=?<|im_end|>\\n<|im_start|>assistant\\n'\n",
        "% (6 problems x 2, 1 of them too long and wrong, ",
        f"responses: 2 per problem, temperature 1, at most {128 - longest} tokens, bf16, seed 0",
        f"hard-test: 12 responses written to {output}",
    ):
        assert said in done.stderr
    assert max(row["length"] for row in rows) == 128 - longest


def test_command_evaluates_as_training_does(tmp_path: Path) -> None:
    config = str(write_inputs(tmp_path))
    overrides = ["evaluation.sets.sums.path=" + str(tmp_path / "prompts.jsonl")]
    overrides += ["evaluation.max_response_tokens=40", "training.steps=1"]
    trained = run_module("trb_megatron.train", config, *overrides, "evaluation.at_start=true")
    assert trained.returncode == 0, trained.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    expected = {name: value for name, value in row.items() if name.startswith("eval/")}
    assert len(expected) == 4

    with_teacher = run_module("trb_megatron.evaluate", config, *overrides, ranks=2)
    assert json.loads(with_teacher.stdout) == expected
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").rename(tmp_path / "sums.jsonl")
    options = ["--student", str(tmp_path / "student"), "--problems", str(tmp_path / "sums.jsonl")]
    settings = [
        "data.system_prompt=null",
        "data.max_prompt_tokens=48",
        "training.precision=fp32",
        "evaluation.max_response_tokens=40",
    ]
    without = run_module("trb_megatron.evaluate", *settings, *options)
    assert json.loads(without.stdout) == expected
    assert "\nin the student's chat template, without a system prompt of ours\n" in without.stderr


# Characters beyond 16 bits, those with a meaning in YAML, and those that end a line in it.
NAMES = ("模型😀", "q: {x} # 'y' \"z\" \\n &a *b", "e\x85\u2028\x7f", "null")


def test_files_are_named_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "".join(NAMES)
    folder.mkdir()
    student = make_checkpoint(folder / NAMES[0])
    files = [make_prompts(folder / f"{name}.jsonl", 1) for name in NAMES]
    options = ["data.system_prompt=null", "data.max_prompt_tokens=60"]
    done = run_module(
        "trb_megatron.evaluate",
        *("--student", str(student), "--problems", *map(str, files)),
        *(*options, "evaluation.max_response_tokens=1"),
    )
    assert done.returncode == 0, done.stderr
    scores = {name.split("/")[1] for name in json.loads(done.stdout)}
    assert scores == {"problems", "q-x-y-z-n-a-b", "e", "null"}
    for file in files:
        assert f": 1 rows of {file}, columns" in done.stderr


def test_command_warns_of_ids_that_transformers_reads_differently(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    """As training does; the ids are those of the file."""
    student = make_checkpoint(tmp_path / "student", vocab_size=320, max_positions=2000)
    (student / "chat_template.jinja").unlink()
    write_tokenizer(student, additional_special_tokens=["<think>"])
    problems = make_prompts(tmp_path / "sums.jsonl", 1)
    options = ["data.system_prompt=null", "evaluation.max_response_tokens=1"]
    done = run_module(
        "trb_megatron.evaluate", "--student", str(student), "--problems", str(problems), *options
    )
    assert done.returncode == 0, done.stderr
    warning = f"warning: transformers' AutoTokenizer reads other ids from {student} than "
    assert done.stderr.count(warning) == 1


PROBLEMS = ("--problems", "p.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which model? name its folder by --student DIR"),
        (PROBLEMS, "which model? name its folder by --student DIR"),
        (
            ("--student", "s"),
            "evaluation.sets is empty: name a file of problems by --problems FILE",
        ),
        (("--student", "s", *PROBLEMS, "evaluation.tempreature=0"), "did you mean evaluation.temp"),
        (("evaluation.samples=0", "--student", "s", *PROBLEMS), "evaluation.samples: "),
        (
            ("--student", "s", *PROBLEMS, "data.apply_chat_template=false"),
            "data.system_prompt=null",
        ),
        (("nowhere.yaml", "--student", "s", *PROBLEMS), "nowhere.yaml: cannot be read"),
        (
            ("--student", "s", "--problems", "a/t.jsonl", "b/t.jsonl", "c/a/t.json.gz"),
            "a/t.jsonl and c/a/t.json.gz would both be called a-t; name them by evaluation.sets.",
        ),
    ],
)
def test_mistakes_in_a_command_are_named(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error


def test_output_that_cannot_be_written_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    options = ["--student", "nowhere", *PROBLEMS, "--output"]
    done = run_module("trb_megatron.evaluate", *options, str(tmp_path / "no" / "responses.jsonl"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --output ") and "cannot be written to" in done.stderr


def test_problem_without_room_for_a_response_is_refused(tmp_path: Path) -> None:
    student = make_checkpoint(tmp_path / "student", max_positions=20)
    problems = make_prompts(tmp_path / "sums.jsonl")
    done = run_module(
        "trb_megatron.evaluate", "--student", str(student), "--problems", str(problems)
    )
    assert done.returncode == 2
    assert "error: data.max_prompt_tokens: the longest problem has " in done.stderr


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    result = run_module("trb_megatron.evaluate", str(write_inputs(tmp_path)), ranks=1)
    assert result.returncode != 0
    assert "error: evaluation.sets is empty" in result.stderr
    assert "Traceback" not in result.stderr.split("error: ")[0]
