"""How a job ends when one of its ranks fails: soon, and with one reason, that of the first.

Every rank runs a thread that shows a sign of life in the store that torchrun keeps for its ranks.
When a rank fails, it claims the job's one error message there and prints it. The others, whose
collectives break a moment later, find the claim and leave quietly. A rank that was killed or
stopped says nothing: whoever notices first names it, from the process table of its own host or by
the missing sign of life. Where a rank cannot notice, because it waits on a GPU for its peers, its
thread ends it.

Without torchrun's store every rank speaks for itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from trb_megatron.job.signals import handled, heard

SIGN_OF_LIFE_S = 2.0
SILENT_S = 5 * SIGN_OF_LIFE_S  # a rank of another host without a new sign is taken for dead
HEAD_START_S = 2.0  # of the rank that failed first: torchrun reports the first end that it sees
_LAST_GRACE_S = 20.0  # for a rank to leave by itself after another one failed
SAME_SIGNAL_S = 0.5  # launcher and cluster may both pass one on; no hand presses twice so fast
_FAILURE = "failure"
_ENDED = "ended by a signal"
_ENDING = (signal.SIGTERM, signal.SIGINT)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class RunError(RuntimeError):
    """A failure whose message says all that a person needs; it is shown without a traceback."""


class SetupError(RunError):
    """Something that the user must change before the job can start; the exit status is 2."""


@contextmanager
def setup_errors() -> Iterator[None]:
    """Turn the ValueErrors of set-up, which name what a user must change, into SetupErrors."""
    try:
        yield
    except ValueError as error:
        raise SetupError(str(error)) from error


@contextmanager
def supervised_job() -> Iterator[None]:
    """Run a rank's whole job; whatever error leaves it ends the job on all ranks.

    The first failing rank prints one line with its reason (and its traceback, if the error is not
    one of those that explain themselves: RunError, OSError); all ranks leave with a non-zero
    status. A rank that hangs in a collective for want of another is ended within
    `_LAST_GRACE_S`. When all is well, the job's end waits for no one.

    SIGTERM and SIGINT (Ctrl-C) end the job, unless a handler under the `with` block has another use
    for them. After a SIGINT, a second one ends it at once, whatever it does.
    """
    supervisor = Supervisor.connect()

    def terminate(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            supervisor.end_if_neighbor_died()
        for other in _ENDING:  # they are still heard
            signal.signal(other, _do_nothing)
        if supervisor.claim(_ENDED) and number == signal.SIGINT:
            print("interrupted: there was nothing to save", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    with handled(terminate, *_ENDING), heard(supervisor.hear):
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            supervisor.fail(error)
        finally:
            supervisor.close()


class Supervisor:
    """A rank's sign of life, and its view of the others.

    Args:
        store: shared by all ranks; None: this rank is on its own.
        rank, world_size: of this process in the job.
        neighbors: the ranks of this host.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, world_size: int, neighbors: range
    ) -> None:
        self._store = store
        self._rank, self._all_ranks, self._neighbors = rank, range(world_size), neighbors
        self._claiming = threading.Lock()  # kept by the thread that ends this process
        self._main_thread = threading.get_ident()
        self._closing = threading.Event()
        self._interrupted_at: float | None = None
        if store is not None:
            self._show_life(0)
            self._thread = threading.Thread(target=self._watch, name="supervision", daemon=True)
            self._thread.start()

    @classmethod
    def connect(cls) -> Supervisor:
        """Join the other ranks in torchrun's store, if torchrun started this process."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return cls(None, 0, 1, range(1))
        rank, world_size, local_rank, local_world_size = (
            int(os.environ[name])
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        attempt = dist.PrefixStore(
            f"trb_megatron/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store
        )
        first = rank - local_rank
        return cls(attempt, rank, world_size, range(first, first + local_world_size))

    def close(self) -> None:
        """Stop showing signs of life."""
        if self._store is not None:
            self._closing.set()
            self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an error, with a message if it is the job's first."""
        status = 2 if isinstance(error, SetupError) else 1
        reason = _describe(error)
        if self._store is None:
            _print_reason(reason, error)
            sys.exit(status)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which ends it anyhow
        signal.signal(signal.SIGINT, _do_nothing)
        lost_peer = is_lost_peer(error)
        try:
            if lost_peer:
                reason = self.blame_others(reason)
            speaks = self.claim(reason)
            if speaks:
                _print_reason(reason, error)
            if lost_peer or not speaks:
                time.sleep(HEAD_START_S)
        except dist.DistError as lost:
            self._print_lost_store(lost)
        sys.stdout.flush()
        os._exit(status)

    # ------------------------------------------------------------------ what the others do

    def claim(self, reason: str) -> bool:
        """Whether this rank is the first that gives a reason; this thread then ends the process.

        A rank that is asked to end claims, too, for it is no dead neighbor of the others.
        """
        self._claiming.acquire()
        return self._first_to_say(reason)

    def _first_to_say(self, reason: str) -> bool:
        if self._store is None:
            return True
        mine = f"{self._rank} {reason}"
        return bool(self._store.compare_set(_FAILURE, "", mine).decode() == mine)

    def blame_others(self, reason: str) -> str:
        """Why a collective broke: a rank died or is silent; else where every rank stands."""
        assert self._store is not None
        if self._store.check([_FAILURE]):
            return reason
        before = self._signs_of_life(self._all_ranks)
        deadline = time.monotonic() + SILENT_S
        while time.monotonic() < deadline and not self._store.check([_FAILURE]):
            if dead := self.dead_neighbor():
                return dead
            time.sleep(0.1)
        now = self._signs_of_life(self._all_ranks)
        silent = [rank for rank in now if now[rank] == before[rank] and rank != self._rank]
        if silent:
            others = (
                f" and {len(silent) - 1} more ({describe_ranges(silent[1:])})" if silent[1:] else ""
            )
            return f"{_name(silent[0], now)}{others}: no sign of life; killed, stopped, or lost"
        return f"rank {self._rank}: {reason}\n{_name_places(now)}"

    def dead_neighbor(self) -> str | None:
        """The first rank of this host that died or was stopped, in words."""
        signs = self._signs_of_life(self._neighbors)
        for rank, sign in signs.items():
            status = _process_status(sign["pid"]) if sign else None
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                return f"{_name(rank, signs)} is stopped (by SIGSTOP or a debugger)"
            if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return f"{_name(rank, signs)} was killed, or crashed in native code"
        return None

    def _signs_of_life(self, ranks: range) -> dict[int, dict[str, Any]]:
        """The last signs of some ranks; empty for a rank that never gave one."""
        assert self._store is not None
        keys = [str(rank) for rank in ranks]
        if not self._store.check(keys):  # few requests where there are many ranks
            keys = [key for key in keys if self._store.check([key])]
        signs = zip(keys, self._store.multi_get(keys), strict=True)
        found = {int(key): json.loads(sign) for key, sign in signs}
        return {rank: found.get(rank, {}) for rank in ranks}

    # ------------------------------------------------------------------ the thread

    def _show_life(self, count: int) -> None:
        assert self._store is not None
        place = _place(sys._current_frames().get(self._main_thread))
        sign = {"count": count, "host": socket.gethostname(), "pid": os.getpid(), "place": place}
        self._store.set(str(self._rank), json.dumps(sign))

    def _watch(self) -> None:
        """Show life until closed; end the process where its main thread cannot."""
        assert self._store is not None
        count = 0
        failed_since = None
        try:
            while not self._closing.wait(SIGN_OF_LIFE_S):
                count += 1
                self._show_life(count)
                if failed_since is None and self._store.check([_FAILURE]):
                    failed_since = time.monotonic()
                if failed_since and time.monotonic() - failed_since > _LAST_GRACE_S:
                    os._exit(1)
        except dist.DistError as error:
            if not self._closing.is_set():
                self._print_lost_store(error)
                os._exit(1)

    # ------------------------------------------------------------------ signals

    def hear(self, number: int) -> None:
        """End the process where its main thread may not be able to; called in another thread."""
        now = time.monotonic()
        is_second = self._interrupted_at is not None and now - self._interrupted_at > SAME_SIGNAL_S
        # A SIGTERM is torchrun's, which got the second Ctrl-C, or saw another rank end by it.
        if is_second and number in _ENDING:
            self._end_at_once()
        elif number == signal.SIGINT:
            self._interrupted_at = self._interrupted_at or now
        elif number == signal.SIGTERM:
            try:
                self.end_if_neighbor_died()
            except dist.DistError as lost:
                self._print_lost_store(lost)
                os._exit(1)

    def _end_at_once(self) -> NoReturn:
        try:
            if self._first_to_say(_ENDED):
                print("interrupted again: ended at once", file=sys.stderr, flush=True)
        finally:  # the store may be gone
            os._exit(128 + signal.SIGINT)

    def end_if_neighbor_died(self) -> None:
        """Say so and leave, if torchrun's SIGTERM follows the death of a rank on this host.

        A rank that waits for the dead one on a GPU never learns of it in another way.
        """
        if self._store is None or (reason := self.dead_neighbor()) is None:
            return
        if self.claim(reason):
            _print_reason(reason, None)
        else:
            time.sleep(HEAD_START_S)
        os._exit(1)

    def _print_lost_store(self, error: Exception) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(
                f"error: rank {self._rank} ({socket.gethostname()}) lost torchrun's store at "
                f"{address}: that host, or its torchrun, is gone ({error})",
                file=sys.stderr,
                flush=True,
            )


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal is heard."""


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, RunError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a broken or timed-out collective."""
    while error is not None:
        names_backend = "gloo" in str(error) or "NCCL" in str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and names_backend):
            return True
        error = error.__cause__ or error.__context__
    return False


def _print_reason(reason: str, error: BaseException | None) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "error: "
    if not reason.startswith("rank ") and not isinstance(error, SetupError):
        prefix += f"rank {rank} ({socket.gethostname()}): "
    lines = [prefix + reason]
    explains_itself = isinstance(error, RunError | OSError)
    if error is not None and not explains_itself and not is_lost_peer(error):
        lines += traceback.format_exception(error)
    print("\n".join(lines).rstrip(), file=sys.stderr, flush=True)


def _name(rank: int, signs: dict[int, dict[str, Any]]) -> str:
    if not signs[rank]:
        return f"rank {rank} (never started)"
    return f"rank {rank} ({signs[rank]['host']}, process {signs[rank]['pid']})"


def _process_status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def _name_places(signs: dict[int, dict[str, Any]]) -> str:
    """Where all ranks are, rarest place first: usually the one that the others wait for."""
    places: dict[str, list[int]] = {}
    for rank, sign in signs.items():
        places.setdefault(sign.get("place", "not started"), []).append(rank)
    ordered = sorted(places.items(), key=lambda item: len(item[1]))
    return "\n".join(f"  ranks {describe_ranges(ranks)}: {place}" for place, ranks in ordered)


def describe_ranges(ranks: list[int]) -> str:
    """Ascending ranks in short, such as 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _place(frame: FrameType | None) -> str:
    """The innermost line of this package that a thread is in."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return "outside the package"
