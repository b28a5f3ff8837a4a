"""Whole training runs inside the ranks of a test, and what can be compared of them."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_distributed
from trb_megatron.huggingface.config import read_hf_config

TIMINGS = ("time/", "perf/")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


def weights_digest(folder: Path) -> str:
    """SHA-256 of the safetensors files of an export."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"{folder} holds no export"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def load_frozen(folder: Path, layout: Any) -> Any:
    """This rank's part of a tiny HF checkpoint, fp32, for rollouts alone; imports Megatron."""
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    config = read_hf_config(folder)
    model = build_model(config, layout, vocab_size=128, dtype=torch.float32)
    load_hf_weights(model, config, layout)
    return model.eval().requires_grad_(False)


def run_module(name: str, *arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m NAME ...` to its end, by torchrun where there are ranks."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, "-m", name, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )


def train(config_file: Path, world_size: int, *overrides: str, timeout_s: float = 240) -> None:
    """A run from start (or its last checkpoint) to its end, on fresh ranks."""
    arguments = (config_file, overrides)
    run_distributed(train_here, world_size, *arguments, timeout_s=timeout_s)


def train_here(config_file: Path, overrides: tuple[str, ...]) -> Any:
    """A run on the ranks that exist already; returns the trainer."""
    trainer = make_trainer(config_file, overrides)
    trainer.train()
    return None


def make_trainer(config_file: Path, overrides: tuple[str, ...]) -> Any:
    """A trainer on the ranks that exist already, without graders."""
    from trb_megatron.config.reading import load_config

    config = load_config(config_file, list(overrides))
    layout = _join(config.parallel)

    from trb_megatron.setup import set_up
    from trb_megatron.trainer import Trainer

    return Trainer(set_up(config, layout, rewards=None))


@cache
def _join(parallel: Any) -> Any:
    """This process's layout; groups are built once."""
    from trb_megatron.distributed.layout import initialize

    return initialize(parallel)


@dataclass(frozen=True)
class Holdings:
    """What one rank really holds: its stage, counts of parameters by model, and bytes."""

    stage: int
    num_parameters: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    teacher: int


def measure_holdings(trainer: Any) -> Holdings:
    """What this rank holds after a training step, from the storages of its tensors."""
    models = {"student": trainer.models.student, "teacher": trainer.models.teacher}
    parameters = {name: list(model.parameters()) for name, model in models.items() if model}
    optimizer = trainer.optimizer
    inner = [member.optimizer for member in getattr(optimizer, "chained_optimizers", [optimizer])]
    owned = [param for o in inner for group in o.param_groups for param in group["params"]]
    moments = [
        state[name]
        for o in inner
        for state in o.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    student = {_storage(param): None for param in parameters["student"]}
    masters = [param for param in owned if _storage(param) not in student]
    return Holdings(
        stage=trainer.layout.pp_rank,
        num_parameters={n: sum(p.numel() for p in params) for n, params in parameters.items()},
        weights=num_bytes(parameters["student"]),
        gradients=num_bytes(buffer.grad_data for buffer in trainer.student_ddp.buffers),
        optimizer=num_bytes([*masters, *moments]),
        teacher=num_bytes(parameters.get("teacher", [])),
    )


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
