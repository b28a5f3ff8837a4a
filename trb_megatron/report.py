"""What a job says of itself when it starts: versions, layout, and the code paths in use."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from trb_megatron.config import Config
from trb_megatron.distributed import ParallelLayout
from trb_megatron.fp8 import frozen_recipe
from trb_megatron.models import flash_attention_version


def describe_environment(layout: ParallelLayout, dtype: torch.dtype) -> list[str]:
    """Lines on versions, optional accelerators of Megatron-Core, and the parallel layout.

    `dtype` is that of the models' activations.
    """
    optional = {
        "Transformer Engine": _version_of("transformer-engine", "transformer_engine.pytorch"),
        "Apex": _version_of("apex", "apex.multi_tensor_apply"),
    }
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        **{name: found or "absent" for name, found in optional.items()},
    }
    device = "cpu"
    if layout.device.type == "cuda":
        device = torch.cuda.get_device_name(layout.device)
    flash_attention = flash_attention_version(layout.device, dtype)
    kernel = f"flash-attention {flash_attention}" if flash_attention else "masked SDPA"
    return [
        ", ".join(f"{name} {found}" for name, found in versions.items()),
        f"{dist.get_world_size()} ranks on {device}: TP {layout.tp_size} x PP {layout.pp_size} x "
        f"DP {layout.dp_size}; rollout attention: {kernel} over pages",
    ]


def describe_precision(config: Config) -> list[str]:
    """Lines on the number format that each part of a run computes in."""
    training = config.training
    dtype = "fp32" if training.precision == "fp32" else "bf16"
    student = teacher = rollouts = dtype
    if training.precision == "fp8":
        recipe, frozen = training.fp8_recipe, frozen_recipe(training.fp8_recipe)
        student, teacher = f"fp8 ({recipe})", f"fp8 ({frozen})"
        rollouts = dtype if recipe == "delayed" else student
    products = [f"student {student}", f"the student's rollouts and evaluation {rollouts}"]
    if training.task == "distill":
        products.insert(1, f"teacher {teacher}")
    return [
        f"matrix products of the layers: {', '.join(products)}",
        f"{dtype}: weights, attention, norms, embeddings, vocabulary projection, key/value cache",
        "fp32: master weights, gradient sums, optimizer state, solver, losses, sampling",
    ]


def _version_of(distribution: str, module: str) -> str | None:
    """Version of an installed package; None when it lacks `module`.

    The module tells NVIDIA's Apex from the unrelated "apex" of the package index.
    """
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return version(distribution)
    except (ModuleNotFoundError, PackageNotFoundError):
        return None
