"""The progress of an evaluation, on a terminal and in a log."""

import io
import time

import pytest

from trb_megatron.run.evaluation_progress import EvaluationProgress


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with EvaluationProgress({"a": 30, "b": 10}, 2, num_replicas=3, file=out) as progress:
        watch = progress.watch("a")
        for seconds, num_finished, num_tokens in (
            (14.0, 0, 100),  # too early for a line
            (2.0, 1, 160),
            (2.0, 2, 170),
            (22.0, 10, 800),
            (5.0, 20, 900),
        ):
            now += seconds
            watch(num_finished, num_tokens)
        progress.finish("a")
        progress.write("a: good")
        watch = progress.watch("b")
        now += 15.0
        watch(7, 100)  # the last replica may have fewer
        progress.finish("b")
    assert out.getvalue().splitlines() == [
        "problem 1/40 | a | 30 tokens/s | 10:24 left",
        "problem 15/40 | a | 60 tokens/s | 01:06 left",
        "a: good",
        "problem 40/40 | b | 50 tokens/s | 00:00 left",
    ]


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = Terminal()
    with EvaluationProgress({"a": 30}, 1, 2, out, enabled=False) as progress:
        watch = progress.watch("a")
        now += 60.0
        watch(10, 100)
        progress.finish("a")
        progress.write("a: good")
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = Terminal()
    with EvaluationProgress({"a": 1000}, 1, 1, out) as progress:
        watch = progress.watch("a")
        for num_finished in (5, 10, 20):
            now += 1.0
            watch(num_finished, 100 * num_finished)
        assert "20/1000" in out.getvalue().split("\r")[-1]
        assert "a, 667 tokens/s" in out.getvalue().split("\r")[-1]
        progress.finish("a")
        progress.write("a: good")
    assert "a: good" in out.getvalue()
