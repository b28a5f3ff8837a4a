"""A rank that dies, stops, hangs or raises ends its job in time, with the reason first."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from trb_megatron.job.supervision import Supervisor, describe_ranges, is_lost_peer

NUM_RANKS = 3
TIMEOUT_S = 5.0  # of collectives
HOST = re.escape(socket.gethostname())
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a job with a fault in rank 1 ended."""

    status: int
    lines: list[str]  # of stderr
    seconds: float


def launch(fault: str, launcher: str = "trb_megatron.launch") -> Outcome:
    # torchrun looks once a second, so that ends that are near have no order for it.
    torchrun = ["-m", launcher, f"--nproc-per-node={NUM_RANKS}", "--monitor-interval=1"]
    rank = ["-m", "tests.supervised_rank", fault, str(TIMEOUT_S)]
    started = time.monotonic()
    job = subprocess.run(
        [sys.executable, *torchrun, *rank],
        capture_output=True,
        text=True,
        timeout=150,
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
    )
    return Outcome(job.returncode, job.stderr.splitlines(), time.monotonic() - started)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """A job for each fault; most of the time of some is waiting, so they overlap."""
    faults = [
        "is stopped",
        "hangs",
        "is killed",
        "explains",
        "raises",
        "every rank refuses",
        "none",
    ]
    with ThreadPoolExecutor(3) as threads:
        return dict(zip(faults, threads.map(launch, faults), strict=True))


def test_a_job_without_faults_ends_silently(outcomes: dict[str, Outcome]) -> None:
    assert (outcomes["none"].status, outcomes["none"].lines) == (0, [])


@pytest.mark.parametrize(
    ("fault", "status", "expected"),
    [
        ("explains", 1, [rf"error: rank 1 \({HOST}\): step 3: the gradient is not finite"]),
        ("every rank refuses", 2, [r"error: run\.dir: cannot be used"]),
        (
            "is killed",
            128 + signal.SIGKILL,
            [
                rf"error: rank 1 \({HOST}, process \d+\) was killed, or crashed in native code",
                r"rank 1 \(process \d+\) was ended by SIGKILL",
            ],
        ),
        ("is stopped", 1, [rf"error: rank 1 \({HOST}, process \d+\) is stopped \(.*\)"]),
    ],
)
def test_one_line_says_which_rank_failed_first_and_why(
    outcomes: dict[str, Outcome], fault: str, status: int, expected: list[str]
) -> None:
    outcome = outcomes[fault]
    assert outcome.status == status
    assert len(outcome.lines) == len(expected), outcome.lines
    for line, pattern in zip(outcome.lines, expected, strict=True):
        assert re.fullmatch(pattern, line), outcome.lines


@pytest.mark.parametrize("fault", ["is killed", "is stopped", "hangs"])
def test_a_job_ends_within_the_timeout_and_a_minute(
    outcomes: dict[str, Outcome], fault: str
) -> None:
    assert outcomes[fault].seconds < TIMEOUT_S + 60


def test_an_error_that_needs_its_traceback_has_one_from_one_rank(
    outcomes: dict[str, Outcome],
) -> None:
    outcome = outcomes["raises"]
    assert outcome.status == 1
    assert outcome.lines[0] == f"error: rank 1 ({socket.gethostname()}): KeyError: 'weights'"
    assert outcome.lines[1] == "Traceback (most recent call last):"
    assert outcome.lines[-1] == "KeyError: 'weights'"
    assert sum("Traceback" in line for line in outcome.lines) == 1


def test_a_hanging_rank_is_found_by_its_place(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["hangs"]
    assert outcome.status == 1
    assert re.match(r"error: rank [02]: RuntimeError: .*[Tt]imed out", outcome.lines[0])
    assert outcome.lines[1:], "no places"
    assert all(line.startswith("  ranks ") for line in outcome.lines[1:]), outcome.lines


def test_plain_torchrun_prints_the_reason_first() -> None:
    outcome = launch("explains", launcher="torch.distributed.run")
    assert outcome.status == 1
    own = [line for line in outcome.lines if not re.match(r"[WE]\d{4} ", line)]
    assert own[0].endswith("step 3: the gradient is not finite")


# ---------------------------------------------------------------- ranks of other hosts


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def test_a_silent_rank_of_another_host_is_named(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trb_megatron.job.supervision.SIGN_OF_LIFE_S", 0.05)
    monkeypatch.setattr("trb_megatron.job.supervision.SILENT_S", 1.0)
    store.set("1", json.dumps({"count": 7, "host": "n2", "pid": 12, "place": "x.py:1 in f"}))
    supervisor = Supervisor(store, 0, 3, neighbors=range(1))
    other = Supervisor(store, 2, 4, neighbors=range(2, 3))
    try:
        assert supervisor.blame_others("RuntimeError: gloo") == (
            "rank 1 (n2, process 12): no sign of life; killed, stopped, or lost"
        )
    finally:
        supervisor.close()
        other.close()


def test_only_the_first_claim_counts(store: dist.Store) -> None:
    first, second = (Supervisor(store, rank, 2, neighbors=range(2)) for rank in range(2))
    assert first.claim("NonFiniteError: loss")
    assert not second.claim("NonFiniteError: loss")
    for supervisor in (first, second):
        supervisor.close()


def test_a_rank_that_was_asked_to_end_is_not_blamed(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, other = (Supervisor(store, rank, 2, neighbors=range(2)) for rank in range(2))
    assert asked.claim("ended by a signal")
    for supervisor in (asked, other):
        supervisor.close()
    monkeypatch.setattr(other, "dead_neighbor", lambda: "rank 0 was killed")
    monkeypatch.setattr("trb_megatron.job.supervision.HEAD_START_S", 0.0)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        other.end_if_neighbor_died()
    assert capsys.readouterr().err == ""


class LosableStore:
    """A store whose host may go away."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.is_lost = False

    def __getattr__(self, name: str) -> Any:
        if self.is_lost:
            raise dist.DistNetworkError("Connection reset by peer")
        return getattr(self._store, name)


def test_a_lost_store_is_one_line(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losable: Any = LosableStore(store)
    supervisor = Supervisor(losable, 0, 2, neighbors=range(1))
    supervisor.close()
    losable.is_lost = True
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit, match="1"):
        supervisor.fail(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert capsys.readouterr().err == (
        f"error: rank 0 ({socket.gethostname()}) lost torchrun's store at n1:29500: that host, or "
        "its torchrun, is gone (Connection reset by peer)\n"
    )


def test_a_broken_collective_is_recognised_behind_another_error() -> None:
    try:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        except RuntimeError as lost:
            raise ValueError("the checkpoint could not be written") from lost
    except ValueError as error:
        assert is_lost_peer(error)
    assert not is_lost_peer(RuntimeError("out of memory"))


def test_ranges_are_short() -> None:
    assert describe_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
