"""Peak memory of a training step's forward and backward with a vocabulary of 151,936 rows.

    OMP_NUM_THREADS=1 python -m benchmarks.step_memory      (from the root of the repository)

Student (tied) and teacher are small, 2 layers x 256, so that what counts is the vocabulary. One
microbatch; the teacher's hidden states are there already. What is reported is the measured peak of
the process above weights, gradient buffers, optimizer and the microbatch.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.layouts import write_inputs
from tests.runs import make_trainer
from tests.tiny import CHARACTERS, SPECIAL_TOKENS, make_checkpoint, make_tokenizer

MB = 10**6
NUM_IDS, NUM_ROWS, HIDDEN_SIZE = 151_669, 151_936, 256


def main() -> None:
    """Measure one forward and backward with each loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--losses", nargs="+", default=["reverse_kl_topk", "reverse_kl_full"])
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config_file = write_models(Path(folder))
        print("| loss | tokens | peak MB | s |\n|-|-|-|-|")
        for name in options.losses:
            run_dir = f"run.dir={folder}/{name}"
            trainer = make_trainer(config_file, (run_dir, f"loss.name={name}"))
            peak_mb, seconds = measure(trainer, options.tokens)
            print(f"| {name} | {options.tokens:,} | {peak_mb:,.0f} | {seconds:.0f} |", flush=True)
            del trainer


def write_models(folder: Path) -> Path:
    """Two checkpoints with Qwen's vocabulary sizes, and a configuration."""
    config_file = write_inputs(folder)
    words = [f"w{i:x}" for i in range(NUM_IDS - len(SPECIAL_TOKENS) - len(CHARACTERS))]
    tokenizer = make_tokenizer([*CHARACTERS, *words])
    for name, tied in (("student", True), ("teacher", False)):
        shutil.rmtree(folder / name)
        make_checkpoint(
            folder / name, hidden_size=HIDDEN_SIZE, vocab_size=NUM_ROWS, tied=tied, scale=0.05
        )
        tokenizer.save_pretrained(folder / name)
    return config_file


def measure(trainer: Any, num_tokens: int) -> tuple[float, float]:
    """Peak in MB of forward and backward over responses of `num_tokens` in all, and seconds."""
    from trb_megatron.batch import Rollout, build_microbatches
    from trb_megatron.rollout.step_settings import policy_at

    ids = torch.randint(3, NUM_IDS, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = [
        Rollout(index, 0, (5, 6), tuple(ids), stopped=False) for index in range(num_tokens // 64)
    ]
    policy = policy_at(
        trainer.config.behavior.warmup_steps, trainer.config, trainer.sources, trainer.layout
    )
    packed, one = (
        trainer.teacher(build_microbatches(some, 10**6, trainer.layout.device), policy)
        for some in (rollouts, rollouts[:1])
    )
    trainer.gradients(one)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present resident set
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    trainer.gradients(packed)
    return (resident_bytes("VmHWM") - before) / MB, time.perf_counter() - started


def resident_bytes(field: str) -> int:
    """A size in this process's status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
