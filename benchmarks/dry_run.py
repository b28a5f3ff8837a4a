"""CPU seconds of `trb_megatron.train --dry-run` after imports, by models and world size.

    python -m benchmarks.dry_run [FOLDER]

With FOLDER it only writes the models there, to try layouts of one's own. Without it writes each
model's `config.json` and a tokenizer of Qwen's size (151,669 ids) into a temporary folder; there
are no weights. The first plan of the process, which also pays for transformers' late imports, is
shown apart. CPU seconds of one thread are what a clock shows on an idle machine.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.published import QWEN3_1_7B, QWEN3_8B, QWEN3_14B, QWEN3_32B
from trb_megatron.config.options import Config
from trb_megatron.config.reading import load_config
from trb_megatron.train import dry_run

WORLD_SIZES = (1, 8, 64, 512, 1024)
TOKENIZER_SIZE = 151_669

# Llama-3's shape with the student's tokenizer.
_LLAMA_70B = QWEN3_8B | {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS = {
    "Qwen3-1.7B": {**QWEN3_1_7B, "eos_token_id": 0},
    "Qwen3-8B": {**QWEN3_8B, "eos_token_id": 2},
    "Qwen3-14B": {**QWEN3_14B, "eos_token_id": 2},
    "Qwen3-32B": {**QWEN3_32B, "eos_token_id": 2},
    "Llama-70B": {**_LLAMA_70B, "eos_token_id": 2},
}
"""`config.json` of each model, as published but for the ids of stop tokens."""

PAIRS = {
    ("Qwen3-1.7B", "Qwen3-8B"): (1, 1),
    ("Qwen3-8B", "Qwen3-32B"): (4, 1),
    ("Qwen3-14B", "Llama-70B"): (8, 2),
}
"""(student, teacher) -> tensor and pipeline parallel size, or 1 x 1 on one rank."""


def write_models(folder: Path) -> None:
    """A folder for each of `MODELS`: configuration and tokenizer, no weights."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bpe(), eos_token="<|endoftext|>")
    for name, values in MODELS.items():
        tokenizer.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _bpe() -> Tokenizer:
    """Byte-pair encoding with as many ids and nearly as many merges as Qwen's."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(0x4E00 + i) for i in range(400)]
    num_merges = TOKENIZER_SIZE - len(special) - len(letters)
    merges = list(itertools.islice(itertools.product(letters, letters), num_merges))
    words = [*special, *letters, *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges))


def write_config(folder: Path, student: str, teacher: str) -> Path:
    """A configuration with defaults but for the models of `folder`."""
    file = folder / f"{student}_from_{teacher}.yaml"
    file.write_text(
        f"run: {{dir: {folder}/run}}\nstudent: {{path: {folder}/{student}}}\n"
        f"teacher: {{path: {folder}/{teacher}}}\ndata: {{path: {folder}/prompts.jsonl}}\n"
    )
    return file


def measure(config: Config, world_size: int) -> float:
    """CPU seconds of one dry run."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        dry_run(config, world_size)
    return time.process_time() - started


def main() -> None:
    """Print a table of seconds, or write the models into a folder."""
    if len(sys.argv) > 1:
        write_models(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        first = True
        print("| student | teacher | " + " | ".join(f"{n:,} ranks" for n in WORLD_SIZES) + " |")
        print("|-|-|" + "-|" * len(WORLD_SIZES))
        for (student, teacher), sizes in PAIRS.items():
            cells = []
            for world_size in WORLD_SIZES:
                tp, pp = sizes if world_size % (sizes[0] * sizes[1]) == 0 else (1, 1)
                overrides = [
                    f"parallel.tensor_model_parallel_size={tp}",
                    f"parallel.pipeline_model_parallel_size={pp}",
                    "training.prompts_per_step=1024",
                ]
                config = load_config(write_config(folder, student, teacher), overrides)
                if first:
                    print(f"first: {measure(config, world_size):.2f} s", file=sys.stderr)
                    first = False
                cells.append(f"{measure(config, world_size):.2f}")
            print(f"| {student} | {teacher} | " + " | ".join(cells) + " |")
    assert not any(name.startswith("megatron") for name in sys.modules)


if __name__ == "__main__":
    main()
