"""A rank that goes through the steps of a run as the trainer does; imports no Megatron.

    python -m tests.stoppable_rank PLACE FOLDER

PLACE says where it is when it prints "ready": in "set-up", in "steps", or in a "long step", in
which rank 0 waits in a collective. It writes FOLDER/saved when it was stopped and saved.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trb_megatron.job.stopping import StopRequests, stopped_status
from trb_megatron.job.supervision import supervised_job


def main() -> None:
    place, folder = sys.argv[1], Path(sys.argv[2])
    was_stopped = False
    with supervised_job():
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if place == "set-up":
            say_ready()
            time.sleep(60)
        with StopRequests() as requests:
            say_ready()
            for _ in range(1200):
                if place == "long step" and dist.get_rank() == dist.get_world_size() - 1:
                    time.sleep(60)
                dist.all_reduce(torch.ones(1))
                time.sleep(0.05)
                if reason := requests.agree():
                    (folder / "saved").write_text(reason)
                    requests.confirm(f"stopped by {reason}")
                    was_stopped = True
                    break
        dist.barrier()
        dist.destroy_process_group()
    if was_stopped and "RANK" not in os.environ:
        sys.exit(stopped_status())


def say_ready() -> None:
    print(f"ready {os.getpid()}", flush=True)


if __name__ == "__main__":
    main()
