"""A rank that all-reduces until something happens to it; `test_supervision` starts several.

    python -m trb_megatron.launch --nproc-per-node N -m tests.supervised_rank FAULT TIMEOUT_S

Rank 1 has the fault, after a moment in which all ranks worked together. Imports no Megatron.
"""

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from trb_megatron.job.supervision import RunError, setup_errors, supervised_job


def main() -> None:
    fault, timeout_s = sys.argv[1], float(sys.argv[2])
    with supervised_job():
        with setup_errors():
            if fault == "every rank refuses":
                raise ValueError("run.dir: cannot be used")
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
        for count in range(1000):
            dist.all_reduce(torch.ones(1))
            if fault == "none" and count == 20:
                break
            if count == 20 and dist.get_rank() == 1:
                suffer(fault)
            time.sleep(0.01)
        dist.barrier()
        dist.destroy_process_group()


def suffer(fault: str) -> None:
    """What befalls rank 1."""
    if fault == "raises":
        raise KeyError("weights")
    if fault == "explains":
        raise RunError("step 3: the gradient is not finite")
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hangs":
        time.sleep(1000)
    raise AssertionError(fault)


if __name__ == "__main__":
    main()
