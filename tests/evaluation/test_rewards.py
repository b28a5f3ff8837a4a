"""Grading in worker processes: what counts as right, and what a hanging or dying worker costs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trb_megatron.evaluation.rewards import MATH_VERIFY_WORKER, RewardWorkers

# A worker whose verdict, sleep or death is what the response asks for.
SCRIPTED_WORKER = """\
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from trb_megatron.evaluation.rewards import serve

def is_correct(response, answers):
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
    return response in answers

serve(is_correct, float(sys.argv[1]))
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


def test_lengths_must_agree(scripted: list[str]) -> None:
    with (
        RewardWorkers(workers=1, timeout_s=1.0, command=scripted) as workers,
        pytest.raises(ValueError, match="2 responses, but 1 answers"),
    ):
        workers.score(["a", "b"], ["a"])


def test_worker_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", *MATH_VERIFY_WORKER[1:], "5"]
    result = subprocess.run(
        command, input="", capture_output=True, text=True, check=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "math_verify" in imported
    assert not imported & {"torch", "trb_megatron"}


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
