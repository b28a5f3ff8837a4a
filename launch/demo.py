"""The demo: distil a tiny student from a tiny teacher by TRB, on two CPU cores, in a few minutes.

    make demo        (or: python launch/demo.py)

It runs the real job on real files: two Hugging Face checkpoints of launch/demo and a file of
prompts go in; a trained student in Hugging Face format comes out. Both models know addition with
written-out steps, the teacher well and the student badly. They are spread over two tensor-parallel
ranks.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path("launch/demo/distill.yaml")
RUN_DIR = Path("runs/demo")
NUM_RANKS = 2


def main() -> None:
    """Train, then say what came of it and where everything is."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)  # of an earlier demo
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = ["-m", "trb_megatron.train", str(CONFIG), f"run.dir={RUN_DIR}"]
    command = [*launcher, f"--nproc-per-node={NUM_RANKS}", *job]
    print("$ torchrun --nproc-per-node=2 " + " ".join(job), flush=True)
    started = time.monotonic()
    finished = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    report(time.monotonic() - started)


def report(seconds: float) -> None:
    """Print the student's score before and after, and the folder's contents."""
    rows = [json.loads(line) for line in (RUN_DIR / "metrics.jsonl").read_text().splitlines()]
    scores = {
        row["step"]: row["eval/heldout/pass@1"] for row in rows if "eval/heldout/pass@1" in row
    }
    first, last = min(scores), max(scores)
    gain = 100 * (scores[last] - scores[first])
    print(
        f"\npass@1 on problems that neither model was trained on: "
        f"{100 * scores[first]:.1f} % -> {100 * scores[last]:.1f} % "
        f"({gain:+.1f} points) after {last} steps, {seconds:.0f} s in all\n"
    )
    for path, what in (
        ("hf", "the trained student, a Hugging Face checkpoint"),
        ("metrics.jsonl", "every metric of every step"),
        ("tensorboard", "the same as curves: tensorboard --logdir " + str(RUN_DIR)),
        ("checkpoints", "training state, to resume from"),
        ("config.yaml", "the complete configuration"),
    ):
        print(f"  {RUN_DIR / path!s:<26} {what}")


if __name__ == "__main__":
    main()
