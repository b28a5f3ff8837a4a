"""torchrun with a quiet end: the same options, but no wall of traces after a rank that failed.

    python -m trb_megatron.launch --nproc-per-node 8 -m trb_megatron.train CONFIG.yaml

The rank that failed first has given its reason (see `supervision`); what torchrun would print
after it, 35 lines and more, says less. The exit status is that of the first rank that failed.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError


def main(arguments: list[str] | None = None) -> None:
    """Run torchrun, and end with the status of what it ran."""
    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    except RendezvousError as error:
        print(f"error: the hosts of this job did not find each other: {error}", file=sys.stderr)
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))


if __name__ == "__main__":
    main()
