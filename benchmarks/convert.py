"""Memory and speed of converting a checkpoint in both directions.

    python benchmarks/convert.py [--folder DIR] [--gigabytes 2.2] [--json FILE]

Writes a synthetic Qwen3 checkpoint, converts it to Megatron and back, and samples what all
processes of each conversion hold: RssAnon + RssShmem of /proc/PID/status (mapped pages of files
are not counted). The interpreter's baseline is the peak of a --dry-run. The yardstick for speed
reads the same files, writes them and flushes them to the disk. Exit status 1 when a conversion
needs more than its largest fused tensor + 512 MB over the baseline, runs at less than half of the
yardstick's speed, or gives other bytes back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config

from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.model_tensors import expected_tensors
from trb_megatron.huggingface.param_mapping import stored_params
from trb_megatron.huggingface.tensors import (
    HFTensors,
    ShardWriter,
    TensorInfo,
    plan_shards,
    shard_name,
    write_index,
)

ALLOWANCE_BYTES = 512 * 10**6
HIDDEN_SIZE, VOCAB_SIZE, LAYER_GIGABYTES = 2048, 151_936, 0.1007
COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Figures:
    """One conversion: peak memory of all its processes, and its speed."""

    direction: str
    gigabytes: float
    seconds: float
    copy_seconds: float
    peak_megabytes: float
    baseline_megabytes: float
    largest_tensor_megabytes: float

    @property
    def holds(self) -> bool:
        over = (self.peak_megabytes - self.baseline_megabytes) * 1e6
        allowed = self.largest_tensor_megabytes * 1e6 + ALLOWANCE_BYTES
        return over <= allowed and self.seconds <= 2 * self.copy_seconds


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of the checkpoint")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures, is_same = measure(Path(folder), options.gigabytes)
    print(
        f"{'':<16} {'GB':>5} {'GB/s':>6} {'copy':>6} {'peak MB':>8} {'baseline':>8} {'largest':>8}"
    )
    for f in figures:
        print(
            f"{f.direction:<16} {f.gigabytes:>5.2f} {f.gigabytes / f.seconds:>6.2f} "
            f"{f.gigabytes / f.copy_seconds:>6.2f} {f.peak_megabytes:>8.0f} "
            f"{f.baseline_megabytes:>8.0f} {f.largest_tensor_megabytes:>8.0f}"
            f"{'' if f.holds else '  DOES NOT HOLD'}"
        )
    print("the same bytes came back" if is_same else "OTHER BYTES CAME BACK")
    if options.json is not None:
        rows = [asdict(f) | {"holds": f.holds} for f in figures]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if is_same and all(f.holds for f in figures) else 1)


def measure(folder: Path, gigabytes: float) -> tuple[list[Figures], bool]:
    """Convert there and back; the figures, and whether every tensor came back as it was."""
    source = write_synthetic(folder / "hf", gigabytes)
    megatron, back = folder / "megatron", folder / "back"
    config = read_hf_config(source)
    params = stored_params(config.family, config.shape(VOCAB_SIZE))
    largest = max(2 * torch.Size(p.full_shape).numel() for p in params.values()) / 1e6
    figures = []
    for module, origin, target in (
        ("hf_to_megatron", source, megatron),
        ("megatron_to_hf", megatron, back),
    ):
        command = [sys.executable, "-m", f"checkpoints_tools.{module}", str(origin), str(target)]
        _, baseline = run_sampled([*command, "--dry-run"])
        copy_seconds = copy(origin, folder / "copy")
        seconds, peak = run_sampled(command)
        size = sum(file.stat().st_size for file in origin.iterdir()) / 1e9
        figures.append(Figures(module, size, seconds, copy_seconds, peak, baseline, largest))
    return figures, digests(source) == digests(back)


def write_synthetic(folder: Path, gigabytes: float) -> Path:
    """A Qwen3 checkpoint of random bf16 weights, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    embedding_gigabytes = 2 * VOCAB_SIZE * HIDDEN_SIZE / 1e9
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=max(1, round((gigabytes - embedding_gigabytes) / LAYER_GIGABYTES)),
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    config.save_pretrained(folder)
    vocabulary = models.WordLevel({"<eos>": 0, "word": 1}, unk_token="word")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    expected = expected_tensors(read_hf_config(folder))
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in expected.items()]
    shards = plan_shards(infos, 10**9)
    for i, shard in enumerate(shards):
        with (folder / shard_name(i, len(shards))).open("wb") as file:
            writer = ShardWriter(file, shard)
            for info in shard:
                writer.write(info.name, torch.randn(info.shape, dtype=torch.bfloat16))
    write_index(folder, shards)
    os.sync()
    return folder


def copy(source: Path, target: Path) -> float:
    """Seconds to read, write and flush all files of a folder."""
    start = time.perf_counter()
    target.mkdir()
    for path in (path for path in source.iterdir() if path.is_file()):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def run_sampled(command: list[str]) -> tuple[float, float]:
    """Run a command; its seconds, and the peak of what its processes hold together in MB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(held_bytes(pid) for pid in family(process.pid)))
        time.sleep(0.005)
    if process.returncode != 0:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)}: {process.stderr.read().decode()}")
    return time.perf_counter() - start, peak / 1e6


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            pids += family(int(child))
    return pids


def held_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    held = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(kilobytes) * 1024 for _, kilobytes, _ in held)


def digests(folder: Path) -> dict[str, str]:
    """A hash of every tensor."""
    tensors = HFTensors(folder)
    return {
        name: hashlib.sha256(tensors.slice(name)[:].view(torch.uint8).numpy().data).hexdigest()
        for name in tensors.names
    }


if __name__ == "__main__":
    main()
