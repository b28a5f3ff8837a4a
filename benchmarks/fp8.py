"""Throughput, memory and loss of training steps in FP8 beside bf16, on one GPU.

    python -m benchmarks.fp8 [--recipes tensorwise blockwise]      (from the root of the repository)

Student and teacher are random models of real width, and a step is one of plain on-policy
distillation: rollouts of the student, a pass of the teacher, an update. Each precision is a run of
its own with the same prompts and seed. Seconds are means over the steps after the first two; the
losses are those of the second and the last step (the first has a learning rate near zero).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.layouts import write_inputs
from tests.tiny import CHARACTERS, SPECIAL_TOKENS, make_tokenizer
from trb_megatron.config.values import ConfigError
from trb_megatron.models.build import fp8_platform
from trb_megatron.models.fp8 import check_platform

NUM_IDS, NUM_ROWS = 151_669, 151_936
PHASES = ("rollout", "teacher", "train")
NUM_SKIPPED = 2


def main() -> None:
    """Run each precision and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "blockwise", "delayed"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=1024)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {"bf16": ("training.precision=bf16",)}
    for recipe in options.recipes:
        try:
            check_platform(recipe, fp8_platform(device))
        except ConfigError as error:
            print(f"left out: {error}")
            continue
        runs[f"fp8, {recipe}"] = ("training.precision=fp8", f"training.fp8_recipe={recipe}")
    if len(runs) == 1:
        sys.exit("no recipe can run here: there is nothing to compare")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_file = write_inputs(folder)
        write_model(folder / "student", hidden_size=2048, num_layers=28)
        write_model(folder / "teacher", hidden_size=4096, num_layers=36)
        print("| precision | rollout s | teacher s | train s | tokens/s | peak GB | loss |")
        print("|-|-|-|-|-|-|-|")
        for number, (label, precision) in enumerate(runs.items()):
            run_dir = folder / str(number)
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
            command += ["-m", "trb_megatron.train", str(config_file), f"run.dir={run_dir}"]
            command += [
                *precision,
                f"training.steps={options.steps}",
                f"training.prompts_per_step={options.prompts}",
                "training.max_tokens_per_microbatch=16384",
                f"rollout.max_response_tokens={options.response_tokens}",
                "rollout.max_sequences=256",
                "rollout.page_tokens=auto",
                "behavior.kl_budget=0",
                "optimizer.lr=1e-5",
                "checkpoint.export_hf=false",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"| {label} | {describe(run_dir)} |", flush=True)


def write_model(folder: Path, *, hidden_size: int, num_layers: int) -> None:
    """A random Qwen3 checkpoint in bf16 with Qwen's vocabulary sizes."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=NUM_ROWS,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        eos_token_id=0,
        dtype=torch.bfloat16,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = [f"w{i:x}" for i in range(NUM_IDS - len(SPECIAL_TOKENS) - len(CHARACTERS))]
    make_tokenizer([*CHARACTERS, *words]).save_pretrained(folder)


def describe(run_dir: Path) -> str:
    """The cells of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = rows[NUM_SKIPPED:]
    cells = [f"{mean(row[f'time/{phase}'] for row in measured):.2f}" for phase in PHASES]
    cells += [
        f"{mean(row['perf/tokens_per_s'] for row in measured):,.0f}",
        f"{max(row['perf/peak_memory_gb'] for row in measured):.1f}",
        f"{rows[1]['loss']:.4f} → {rows[-1]['loss']:.4f}",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
