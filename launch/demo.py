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
import signal
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path("launch/demo/distill.yaml")
RUN_DIR = Path("runs/demo")
NUM_RANKS = 2


def main() -> None:
    """Grade the teacher, train the student, then say what came of it and where everything is."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)  # of an earlier demo
    started = time.monotonic()
    graded = run_job("evaluate", "student.path=launch/demo/teacher", stdout=subprocess.PIPE)
    teacher_score = json.loads(graded.stdout)["eval/heldout/pass@1"]
    print(f"the teacher: pass@1 {100 * teacher_score:.1f} %\n", flush=True)
    run_job("train", f"run.dir={RUN_DIR}")
    report(teacher_score, time.monotonic() - started)


def run_job(
    command: str, override: str, stdout: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of the package on all ranks; leave with its status if it fails."""
    job = ["-m", f"trb_megatron.{command}", str(CONFIG), override]
    print(f"$ torchrun --nproc-per-node={NUM_RANKS} " + " ".join(job), flush=True)
    # Ctrl-C is for the job, which gets it as well: it saves. What we start doesn't inherit this.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    launcher = [sys.executable, "-m", "trb_megatron.launch", "--standalone"]
    finished = subprocess.run(
        [*launcher, f"--nproc-per-node={NUM_RANKS}", *job],
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=stdout,
        text=True,
    )
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    return finished


def report(teacher_score: float, seconds: float) -> None:
    """Print the student's score before and after, and the folder's contents."""
    rows = [json.loads(line) for line in (RUN_DIR / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["eval/heldout/pass@1"] for r in rows if "eval/heldout/pass@1" in r}
    first, last = min(scores), max(scores)
    gain = 100 * (scores[last] - scores[first])
    print(
        "\npass@1 on 320 problems that neither model was trained on:\n"
        f"  student before  {100 * scores[first]:5.1f} %\n"
        f"  student after   {100 * scores[last]:5.1f} %   ({gain:+.1f} points in {last} steps)\n"
        f"  teacher         {100 * teacher_score:5.1f} %\n"
        f"{seconds:.0f} s in all\n"
    )
    for path, what in (
        ("hf", "the trained student, a Hugging Face checkpoint"),
        ("metrics.jsonl", "every metric of every step"),
        ("tensorboard", f"the same as curves: tensorboard --logdir {RUN_DIR}"),
        ("checkpoints", "training state, to resume from"),
        ("config.yaml", "the complete configuration"),
    ):
        print(f"  {RUN_DIR / path!s:<24} {what}")


if __name__ == "__main__":
    main()
