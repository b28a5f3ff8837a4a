"""Grading in worker processes: what counts as right, and what a hanging or dying worker costs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from trb_megatron.config.values import ConfigError
from trb_megatron.evaluation.rewards import WORKER, Grade, RewardWorkers
from trb_megatron.job.supervision import RunError

# A worker whose verdict, sleep or death is what the response asks for.
SCRIPTED_WORKER = """\
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from trb_megatron.evaluation.grader import serve

def grade(response, answers):
    print("noise from a library")
    if response == "hang":
        time.sleep(60)
    if response == "spin":
        while True:
            pass
    if response == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "raise":
        raise RecursionError
    if response == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(float(response) if response[:1].isdigit() else 0)
    return {{"reward": float(response in answers), "extracted": response}}

serve(lambda: grade, float(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    repository = str(Path(__file__).resolve().parents[2])
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(SCRIPTED_WORKER.format(repository=repository))
    return [sys.executable, str(script)]


def test_final_answers() -> None:
    graded = [
        ("So the answer is \\boxed{42}.", "42", 1.0),
        ("So the answer is \\boxed{42}.", "43", 0.0),
        ("First \\boxed{1}. But no. It is \\boxed{0.5}.", "\\frac{1}{2}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", 1.0),
        ("\\boxed{7}", ["6", "7"], 1.0),
        ("\\boxed{8}", ["6", "7"], 0.0),
        ("\\boxed{8}", [], 0.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        ("\\boxed{\\frac{1}{", "42", 0.0),
        ("\ud800 \\boxed{42}", "42", 1.0),
    ]
    responses, answers, expected = zip(*graded, strict=True)
    with RewardWorkers(workers=2, timeout_s=30.0) as workers:
        assert workers.score(responses, answers) == list(expected)
        assert workers.num_timeouts == 0
        assert workers.score([], []) == []


GradeBoxed = Callable[[Sequence[tuple[str, str]]], list[float]]


@pytest.fixture(scope="module")
def grade_boxed() -> Iterator[GradeBoxed]:
    """Rewards of pairs: what a response has in its box, and the right answer."""
    with RewardWorkers(workers=2, timeout_s=30.0) as workers:
        yield lambda pairs: workers.score(
            [f"Let me think. So it is \\boxed{{{boxed}}}." for boxed, _ in pairs],
            [answer for _, answer in pairs],
        )


UNITS = (
    "{} eggs", r"{}\text{{ eggs}}", r"{} \, \text{{eggs}}", "{}~eggs", r"\text{{{} eggs}}", r"\${}",
    "${}$", "{} dollars", "{} USD", "£{}", "{} km/h", r"{} \mathrm{{km/h}}", r"{}^\circ", "{}°C",
    r"{}^{{\circ}}\text{{C}}", "{} degrees Celsius", r"{}\%", "{} percent", "{} m", "{}cm", "{} L",
    "{} m^2", r"{}\text{{ cm}}^2", r"{}\mathrm{{~cm}}^{{3}}", "{} m/s^{{2}}", "{} meters squared",
    r"{} \frac{{\text{{km}}}}{{\text{{h}}}}", "{} eggs per day", "{} miles an hour", "{} times",
    "{} gallons of milk", "{} more apples", "{} years old.", "x = {} eggs", "{}.", "{} pm", "{}th",
    "{} mins",
)  # fmt: skip


def test_units_do_not_count(grade_boxed: GradeBoxed) -> None:
    assert grade_boxed([(unit.format(18), "18") for unit in UNITS]) == [1.0] * len(UNITS)
    assert grade_boxed([("18", unit.format(18)) for unit in UNITS]) == [1.0] * len(UNITS)
    assert grade_boxed([(unit.format(18), "18 eggs") for unit in UNITS]) == [1.0] * len(UNITS)
    assert grade_boxed([(unit.format(18), "81") for unit in UNITS]) == [0.0] * len(UNITS)


@pytest.mark.parametrize("value", ["1,800", "0.5", "-18", r"\frac{3}{4}", "3/4", "1 1/2"])
def test_units_stand_behind_any_number(grade_boxed: GradeBoxed, value: str) -> None:
    assert grade_boxed([(f"{value} eggs", value), (value, f"{value} eggs")]) == [1.0, 1.0]


MEANS_MORE = [
    ("18 or 20", "18"), ("18 or 20", "20"), ("x = 18 or x=3", "18"), ("18 and 20", "18"),
    (r"18 \text{ or } 20", "18"), ("18, 20", "18"), ("18 to 20", "18"), ("18-20", "18"),
    ("2x", "2"), ("2 x", "2"), ("2xy", "2"), ("2abcd", "2"), ("2n", "2"), ("3 i", "3"), ("3i", "3"),
    ("18 e", "18"), ("2 pi", "2"), (r"2\pi", "2"), ("2 sqrt(3)", "2"), ("2 sinx", "2"),
    ("2 log", "2"), ("2 theta", "2"), ("5!", "5"), ("5 million", "5"), ("5 million dollars", "5"),
    ("5 thousand", "5"), ("5 hundred", "5"), ("2 dozen eggs", "2"), ("5k", "5"), ("5 M", "5"),
    (r"5 \text{ million}", "5"), (r"2\text{ dozen eggs}", "2"), (r"\$5 \text{ billion}", "5"),
    ("1 1/2", "1"), ("1 1/2 cups", "1"), (r"1\frac{1}{2} cups", "1"), ("18 and a half", "18"),
    ("5 thirds", "5"), ("5 halves", "5"), ("18 hours 30 minutes", "18"), ("18 feet 3 inches", "18"),
    (r"18\text{ hours } 30 \text{ minutes}", "18"), ("18 apples and 3 pears", "18"),
    (r"18\text{ apples and } 3\text{ pears}", "18"), (r"18 \text{ more than } x", "18"),
    ("18 more than 2", "18"), ("18 percent of 2", "18"), ("18 out of 20", "18"), ("18:30", "18"),
    ("18 squared", "18"), ("18 choose 2", "18"), ("18 times as many as 2", "18"), ("2t", "2"),
    ("2ab", "2"), ("2 c", "2"), ("2d", "2"), ("18 + 2 eggs", "18"), ("18 + 2 eggs", "2"),
    ("3 \\cdot 6 eggs", "6"), ("not 18", "18"), ("18,20 eggs", "18"), ("18, 20 eggs", "20"),
]  # fmt: skip


def test_words_that_mean_more_than_a_unit_count(grade_boxed: GradeBoxed) -> None:
    rewards = grade_boxed(MEANS_MORE)
    assert [pair for pair, reward in zip(MEANS_MORE, rewards, strict=True) if reward] == []
    reversed_pairs = [(answer, boxed) for boxed, answer in MEANS_MORE]
    rewards = grade_boxed(reversed_pairs)
    assert [pair for pair, reward in zip(reversed_pairs, rewards, strict=True) if reward] == []


def test_words_that_count_are_numbers(grade_boxed: GradeBoxed) -> None:
    pairs = [
        ("5 million", "5000000"), (r"\$2.5 \text{ million}", "2,500,000"), ("3 dozen eggs", "36"),
        ("2 hundred thousand", "200000"), ("1 1/2", "1.5"), (r"2\frac{1}{4}\text{ cups}", "9/4"),
        ("2t", "2t"), ("2ab", "2ba"), ("18 or 20", "20 or 18"), ("3x eggs", "3x eggs"),
    ]  # fmt: skip
    assert grade_boxed(pairs) == [1.0] * len(pairs)


def test_what_was_extracted_is_told(scripted: list[str]) -> None:
    responses = [
        "So \\boxed{18 eggs}.",
        "I think it is 7.",
        "I do not know",
        "\\boxed{1} or \\boxed{2}",
    ]
    with RewardWorkers(workers=1, timeout_s=30.0) as workers:
        grades = workers.grade(responses, ["18", "8", "8", "8"])
    assert [grade.extracted for grade in grades] == ["18", "7", None, "1,2"]
    assert [grade.is_right for grade in grades] == [True, False, False, False]
    long = "a" * 100_000
    with RewardWorkers(workers=1, timeout_s=0.5, command=scripted) as workers:
        found = workers.grade([long, "crash"], [long, "crash"])
    assert found == [Grade(1.0, long), Grade(0.0, timed_out=True)]


def test_expression_that_is_too_large_scores_zero_in_time() -> None:
    with RewardWorkers(workers=1, timeout_s=1.0) as workers:
        started = time.monotonic()
        assert workers.score(["\\boxed{9^{9^{9^{9}}}}", "\\boxed{3}"], ["3", "3"]) == [0.0, 1.0]
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("fatal", ["hang", "spin", "crash", "raise", "stop"])
def test_lost_worker_is_replaced_and_its_response_scores_zero(
    scripted: list[str], fatal: str
) -> None:
    responses = ["a", fatal, "b", fatal, "c"]
    answers = ["a", fatal, "b", fatal, "x"]
    with RewardWorkers(workers=1, timeout_s=0.5, command=scripted) as workers:
        assert workers.score(responses, answers) == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert workers.num_timeouts == 2
        assert workers.score(["a"], ["a"]) == [1.0]
        assert workers.num_timeouts == 0


def test_order_is_kept_and_workers_share_the_work(scripted: list[str]) -> None:
    responses = ["0.8", "0.01", "0.8", "0.02"]
    with RewardWorkers(workers=2, timeout_s=30.0, command=scripted) as workers:
        workers.score(["a", "b"], ["a", "b"])  # both have started
        started = time.monotonic()
        assert workers.score(responses, ["0.8", "x", "0.8", "0.02"]) == [1.0, 0.0, 1.0, 1.0]
        assert time.monotonic() - started < 1.5


def test_limit_is_for_each_response(scripted: list[str]) -> None:
    with RewardWorkers(workers=1, timeout_s=1.0, command=scripted) as workers:
        assert workers.score(["0.4"] * 4, ["0.4"] * 4) == [1.0] * 4
        time.sleep(1.2)  # an idle worker has no limit
        assert workers.score(["a"], ["a"]) == [1.0]


def test_no_process_outlives_the_pool(scripted: list[str]) -> None:
    def children() -> set[int]:
        return {process.pid for process in psutil.Process().children()}

    before = children()
    with RewardWorkers(workers=2, timeout_s=30.0, command=scripted) as workers:
        assert len(children() - before) == 2
        assert workers.score(["a"], ["a"]) == [1.0]
    assert children() == before


def test_worker_that_cannot_start_is_an_error() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    with (
        RewardWorkers(workers=1, timeout_s=1.0, command=command) as workers,
        pytest.raises(RuntimeError, match="exit code 3 while starting"),
    ):
        workers.score(["a"], ["a"])


OWN_GRADER = """\
import time

def grade(response, answers):
    print("noise")
    if response == "hang":
        time.sleep(60)
    if response == "memory":
        return len(bytearray(2**40)) > 0
    if response == "recursion":
        return grade(response, answers)
    if response == "bug":
        return answers[7] == response
    if response.startswith("return "):
        return eval(response[7:])
    return response in answers

def no_arguments():
    return True

def keywords(response, answers, *, weight):
    return True

number = 3
"""


@pytest.fixture
def own_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_grader.py").write_text(OWN_GRADER)
    (tmp_path / "broken_grader.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_grader")
def test_own_grader_grades_under_the_same_limits() -> None:
    responses = ["a", "b", "return 0.25", "return True", "hang", "memory", "recursion", "a"]
    with RewardWorkers(2, timeout_s=1.0, grader="own_grader:grade") as workers:
        workers.check()
        grades = workers.grade(responses, ["a"] * len(responses))
        assert [grade.reward for grade in grades] == [1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0, 1.0]
        assert [grade.is_right for grade in grades[:4]] == [True, False, False, True]
        assert workers.num_timeouts == 3


@pytest.mark.usefixtures("own_grader")
@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        ("bug", r"raises IndexError: list index out of range \(.*own_grader\.py:12\)"),
        ("return 2", "returns 2; expected True, False or a number from 0 to 1"),
        ("return -0.5", "returns -0.5; expected"),
        ("return float('nan')", "returns nan; expected"),
        ("return None", "returns None; expected"),
        ("return '1'", "returns '1'; expected"),
    ],
)
def test_own_grader_that_fails_ends_the_run(response: str, complaint: str) -> None:
    message = (
        rf"^rewards\.grader=own_grader:grade {complaint}.*; it was given the response .*\['a'\]$"
    )
    with (
        RewardWorkers(1, timeout_s=30.0, grader="own_grader:grade") as workers,
        pytest.raises(RunError, match=message),
    ):
        workers.score(["a", response], ["a", "a"])


@pytest.mark.usefixtures("own_grader")
@pytest.mark.parametrize(
    ("grader", "complaint"),
    [
        ("no_such:grade", "cannot import no_such: ModuleNotFoundError: No module named 'no_such'"),
        ("broken_grader:grade", "cannot import broken_grader: .* No module named 'no_such_module'"),
        ("own_grader:greade", r"own_grader\.py has no function greade"),
        ("own_grader:number", r"own_grader\.py has no function number"),
        (
            "own_grader:no_arguments",
            r"no_arguments\(\) cannot be called as no_arguments\(response,",
        ),
        ("own_grader:keywords", r"cannot be called as keywords\(response, answers\): missing"),
    ],
)
def test_own_grader_that_cannot_be_used_is_refused_at_the_start(
    grader: str, complaint: str
) -> None:
    with (
        RewardWorkers(1, timeout_s=30.0, grader=grader) as workers,
        pytest.raises(ConfigError, match=rf"^rewards\.grader={grader}: .*{complaint}"),
    ):
        workers.check()


def test_lengths_must_agree(scripted: list[str]) -> None:
    with (
        RewardWorkers(workers=1, timeout_s=1.0, command=scripted) as workers,
        pytest.raises(ValueError, match="2 responses, but 1 answers"),
    ):
        workers.score(["a", "b"], ["a"])


def test_worker_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", *WORKER[1:], "5"]
    result = subprocess.run(
        command, input="", capture_output=True, text=True, check=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "math_verify" in imported
    assert not imported & {"torch", "pydantic", "transformers"}


@pytest.mark.parametrize(
    ("name", "column"),
    [("gsm8k/test.jsonl", "answer"), ("math500/test.json", "answer"),
     ("olympiadbench/test.jsonl", "final_answer")],
)  # fmt: skip
def test_gold_answers_of_real_sets_score_one(shared_data: Path, name: str, column: str) -> None:
    text = (shared_data / name).read_text()
    rows = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
    answers = [row[column] for row in rows]
    answers = [a[0] if isinstance(a, list) else a.rpartition("####")[2].strip() for a in answers]
    responses = [f"Thinking step by step. The final answer is \\boxed{{{a}}}." for a in answers]
    shifted = [*answers[1:], answers[0]]
    with RewardWorkers(workers=2, timeout_s=30.0) as workers:
        wrong = [
            a for a, r in zip(answers, workers.score(responses, answers), strict=True) if not r
        ]
        assert wrong == []
        assert workers.num_timeouts == 0
        # Another problem's answer is right only by coincidence.
        assert sum(workers.score(responses[:200], shifted[:200])) < 20
