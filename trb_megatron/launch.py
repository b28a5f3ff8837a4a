"""torchrun with the same options, whose Ctrl-C saves and whose errors are short.

    python -m trb_megatron.launch --nproc-per-node 8 -m trb_megatron.train CONFIG.yaml

Signals are passed on to the ranks, and nothing more: after Ctrl-C or SIGTERM a run finishes its
step and saves, however long that takes, where torchrun would kill it after 30 s. A second Ctrl-C
ends it at once.

The rank that failed first has given its reason (see `supervision`); what torchrun would print
after it, 35 lines and more, says less.

Exit status: 0 the job is done; 75 it was stopped and saved, and the same command goes on with it (0
where TRB_STOP_FILE is set: the file says so); 130 Ctrl-C ended it at once; else that of the first
rank that failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from trb_megatron.job.signals import handled
from trb_megatron.job.stopping import STOPPED_FILE_VARIABLE, stopped_status

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main(arguments: list[str] | None = None) -> None:
    """Run torchrun, and end with the status of what it ran."""
    logging.disable(logging.ERROR)
    options = run.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="trb-launch-") as folder:
        stopped = Path(folder) / "stopped"
        os.environ[STOPPED_FILE_VARIABLE] = str(stopped)
        with handled(_pass_on, *_SIGNALS):
            status = _run(options)
        sys.exit(stopped_status() if stopped.exists() else status)


def _run(options: argparse.Namespace) -> int:
    """Run torchrun in a thread, where it leaves signals to us; the status of what it ran."""
    job: Future[None] = Future()

    def work() -> None:
        try:
            run.run(options)
        except BaseException as error:
            job.set_exception(error)
        else:
            job.set_result(None)

    threading.Thread(target=work, name="torchrun", daemon=True).start()
    try:
        job.result()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    except RendezvousError as error:
        print(f"error: the hosts of this job did not find each other: {error}", file=sys.stderr)
        return 1
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the ranks, the only children; without any, end here."""
    ranks = psutil.Process().children()
    if not ranks:
        print(f"ended by {signal.Signals(number).name}: no rank was running", file=sys.stderr)
        sys.exit(128 + number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


if __name__ == "__main__":
    main()
