"""Steps of on-policy distillation beside TRL's DistillationTrainer: the same work, in one run.

    python -m benchmarks.beside_trl [--environment FOLDER]

Random models: student 4 layers x 128, teacher 8 layers x 256. A step is 128 prompts of 16 tokens
with a response of 64 each, the full reverse KL, and AdamW; fp32, one thread, and no blending, which
TRL lacks. The two systems take turns. TRL lies in an environment of its own, which is made unless
it is there. The losses of the first step are printed, so that one sees that the work is the same.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.random_models import random_qwen3
from trb_megatron.config.plain_yaml import dump_yaml

TRL = "trl==1.16.0"
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 128, 16, 64
EOS, PAD = 0, 1


def main() -> None:
    """Measure both systems at each size of the vocabulary and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environment", type=Path, default=Path(".venv-trl"))
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[512, 32_768])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32, help="responses in one pass of TRL")
    parser.add_argument("--microbatch", type=int, default=2048, help="tokens in one pass of ours")
    options = parser.parse_args()
    trl_python = make_environment(options.environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(
        "| vocabulary | system | step, s | rollouts, s | peak memory, GB | first loss |\n"
        "|-|-|-|-|-|-|"
    )
    for vocab_size in options.vocabularies:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_models(folder, vocab_size)
            runs: dict[str, list[dict[str, Any]]] = {"TRL": [], "trb_megatron": []}
            for _ in range(options.repetitions):
                runs["TRL"].append(run_trl(trl_python, folder, options))
                runs["trb_megatron"].append(run_ours(folder, options))
        for system, results in runs.items():
            cells = {
                key: statistics.median(value for result in results for value in result[key])
                for key in results[0]
            }
            print(
                f"| {vocab_size:,} | {system} | {cells['step']:.2f} | {cells['rollout']:.2f} | "
                f"{cells['peak']:.2f} | {cells['loss']:.5f} |",
                flush=True,
            )


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment with TRL and this process's torch; made if need be."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        command = [python, "-m", "pip", "install", "--quiet", f"torch=={torch_version}", TRL]
        subprocess.run(command, check=True)
    return python.absolute()


def write_models(folder: Path, vocab_size: int) -> None:
    """Student, teacher and prompts; the stop token has a logit of zero, so nothing stops."""
    words = {"<eos>": EOS, "<pad>": PAD, **{f"w{i}": i for i in range(2, vocab_size)}}
    words_alone = Tokenizer(WordLevel(words, unk_token="<pad>"))
    words_alone.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_alone, eos_token="<eos>", pad_token="<pad>"
    )
    for name, layers, width in (("student", 4, 128), ("teacher", 8, 256)):
        model: Any = random_qwen3(
            vocab_size=vocab_size,
            layers=layers,
            width=width,
            seed=layers,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        model.get_output_embeddings().weight.data[EOS] = 0
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    prompts = [
        " ".join(f"w{rng.randrange(2, vocab_size)}" for _ in range(PROMPT_TOKENS))
        for _ in range(PROMPTS)
    ]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))


def run_trl(python: Path, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of TRL's steps but the first, of their rollouts, memory, and the first loss."""
    script = Path(__file__).with_name("trl_steps.py")
    sizes = (RESPONSE_TOKENS, options.rows, options.steps)
    output = _run([str(python), str(script), str(folder), *map(str, sizes)])
    result: dict[str, list[float]] = json.loads(output.splitlines()[-1])
    return result


def run_ours(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """The same of ours."""
    with tempfile.TemporaryDirectory() as run_dir:
        config = {
            "run": {"dir": run_dir},
            "student": {"path": str(folder / "student")},
            "teacher": {"path": str(folder / "teacher")},
            "data": {
                "path": str(folder / "prompts.jsonl"),
                "system_prompt": None,
                "apply_chat_template": False,
                "max_prompt_tokens": PROMPT_TOKENS,
            },
            "training": {
                "steps": options.steps,
                "prompts_per_step": PROMPTS,
                "precision": "fp32",
                "max_tokens_per_microbatch": options.microbatch,
            },
            "rollout": {
                "max_response_tokens": RESPONSE_TOKENS,
                "rollouts_per_prompt": 1,
                "max_sequences": PROMPTS,
            },
            "behavior": {"kl_budget": 0.0},
            "loss": {"name": "reverse_kl_full"},
            "optimizer": {"lr": 1e-4},
            "checkpoint": {"export_hf": False},
        }
        file = Path(run_dir) / "beside_trl.yaml"
        file.write_text(dump_yaml(config))
        _run([sys.executable, "-m", "trb_megatron.train", str(file)])
        rows = [json.loads(row) for row in (Path(run_dir) / "metrics.jsonl").open()]
    return {
        "step": [row["time/step"] for row in rows[1:]],
        "rollout": [row["time/rollout"] for row in rows[1:]],
        "peak": [rows[-1]["perf/peak_memory_run_gb"]],
        "loss": [rows[0]["loss"]],
    }


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
