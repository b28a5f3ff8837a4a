"""pass@k, and evaluation as a command on real ranks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layouts import write_inputs
from trb_megatron.evaluation.evaluator import EvaluationResult, pass_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int) -> None:
    answers = [i < c for i in range(n)]
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_result_reads_as_a_line_and_as_metrics() -> None:
    result = EvaluationResult({1: 0.25, 4: 0.5}, 12.5, 0.75, num_problems=8, num_samples=4)
    assert str(result) == (
        "pass@1 25.0 %, pass@4 50.0 % (8 problems x 4, 12.5 tokens, 75 % stopped)"
    )
    assert result.metrics("sums") == {
        "eval/sums/pass@1": 0.25,
        "eval/sums/pass@4": 0.5,
        "eval/sums/response_length": 12.5,
        "eval/sums/stop_fraction": 0.75,
    }


def _run(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )


def test_command_evaluates_the_same_at_two_layouts(tmp_path: Path) -> None:
    config = str(write_inputs(tmp_path))
    options = (
        f"evaluation.sets={{sums: {{path: {tmp_path}/prompts.jsonl, limit: 8}}}}",
        "evaluation.samples=2",
        "evaluation.pass_at=[1, 2]",
    )
    one = _run("trb_megatron.evaluate", config, *options)
    assert one.returncode == 0, one.stderr
    two = _run("trb_megatron.evaluate", config, *options, ranks=2)
    assert two.returncode == 0, two.stderr
    results = json.loads(one.stdout)
    assert results == json.loads(two.stdout)
    assert set(results) >= {"eval/sums/pass@1", "eval/sums/pass@2"}
    assert 0 < results["eval/sums/response_length"] <= 16


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    result = _run("trb_megatron.evaluate", str(write_inputs(tmp_path)))
    assert result.returncode != 0
    assert "error: evaluation.sets is empty" in result.stderr
    assert "Traceback" not in result.stderr.split("error: ")[0]
