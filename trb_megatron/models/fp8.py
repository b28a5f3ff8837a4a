"""FP8 matrix products by Transformer Engine: Megatron's settings, and what they need to run.

Only the products of the layers are FP8: inputs, weights and gradients are rounded on the way into
them. Parameters and activations between layers are bf16, and so are attention, norms, embeddings
and the vocabulary projection. Three recipes say which scale a tensor is rounded with:

- `tensorwise`: from the tensor's largest magnitude now;
- `blockwise`: the same, of each 1 x 128 of inputs and gradients and 128 x 128 of weights;
- `delayed`: from the largest magnitude of the last `DELAYED_HISTORY` training passes. These
  histories begin empty, every pass writes to them, and only passes with a gradient turn them into
  scales. Models that are only read would never get one, and rollouts would disturb the training's:
  the teacher is tensorwise, and the student outside of training bf16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trb_megatron.config.values import ConfigError, FP8Recipe
from trb_megatron.huggingface.config import QKV_ROWS, HFModelConfig

MULTIPLE = 16
"""Both sizes of each matrix in a product, and so the tokens on each rank, are multiples of it.

Megatron's `get_fp8_align_size`; Transformer Engine asks for 8 x 16 in forward, and in backward the
tokens take the place of the 16.
"""
DELAYED_HISTORY = 1024
INFERENCE_COPY_BYTES = 1
"""Of a parameter's FP8 copy, for products with it."""
COPY_BYTES = {"student": 2 * INFERENCE_COPY_BYTES, "teacher": INFERENCE_COPY_BYTES}
"""The student trains: it has a copy of the transpose, too."""


def frozen_recipe(recipe: FP8Recipe) -> FP8Recipe:
    """The recipe of a model that is not trained."""
    return "tensorwise" if recipe == "delayed" else recipe


def megatron_settings(recipe: FP8Recipe) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig for a recipe.

    Gradients have the wider range of e5m2 where one scale serves a whole tensor.
    """
    settings = {"fp8": "e4m3" if recipe == "blockwise" else "hybrid", "fp8_recipe": recipe}
    if recipe != "delayed":
        return settings
    return settings | {
        "fp8_amax_history_len": DELAYED_HISTORY,
        "fp8_amax_compute_algo": "max",
        # Every microbatch ends in a reduction of the magnitudes, but data-parallel replicas do not
        # have equally many: over their group it would wait forever.
        "tp_only_amax_red": True,
    }


@dataclass(frozen=True)
class Platform:
    """The requirements of FP8 besides a model.

    Attributes:
        compute_capability, cuda_version: of the GPU and of torch, (major, minor); None on a CPU.
        transformer_engine: version that Megatron-Core could import, or None.
    """

    compute_capability: tuple[int, int] | None
    cuda_version: tuple[int, int] | None
    transformer_engine: str | None


# Transformer Engine's own checks (is_fp8_available, is_fp8_block_scaling_available) and Megatron's
# (get_fp8_recipe): compute capability, CUDA, Transformer Engine.
_NEEDED = {
    "delayed": ((8, 9), (12, 1), (2, 2)),  # 2.2 for its tensorwise teacher
    "tensorwise": ((8, 9), (12, 1), (2, 2)),
    "blockwise": ((9, 0), (12, 9), (2, 3)),
}


def check_platform(recipe: FP8Recipe, platform: Platform) -> None:
    """Refuse FP8 where it cannot run.

    Raises:
        ConfigError: names all that is missing.
    """
    way_out = "or set training.precision=bf16"
    if platform.compute_capability is None or platform.cuda_version is None:
        raise ConfigError(
            "training.precision=fp8 needs NVIDIA GPUs, but this job runs on CPUs; start it where "
            f"torch finds GPUs, {way_out}"
        )
    if platform.transformer_engine is None:
        raise ConfigError(
            "training.precision=fp8 needs Transformer Engine, which is not installed or cannot be "
            f"imported; install trb-megatron[te], {way_out}"
        )
    names = ("GPUs of compute capability", "CUDA", "Transformer Engine")
    found = (
        platform.compute_capability,
        platform.cuda_version,
        tuple(int(part) for part in re.findall(r"\d+", platform.transformer_engine)[:2]),
    )
    missing = [
        f"{name} {_dotted(least)} (found {_dotted(have)})"
        for name, least, have in zip(names, _NEEDED[recipe], found, strict=True)
        if have < least
    ]
    if missing:
        raise ConfigError(
            f"training.fp8_recipe={recipe} needs {' and '.join(missing)}; choose another recipe, "
            f"{way_out}"
        )


def check_sizes(config: HFModelConfig, tp_size: int) -> None:
    """Refuse a model that FP8 products cannot take at a tensor-parallel size.

    Raises:
        ConfigError: names each size of a rank's matrices that is not a multiple of `MULTIPLE`.
    """
    sharded = {
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        QKV_ROWS: config.num_qkv_rows,
    }
    if config.num_experts > 0:
        sharded["moe_intermediate_size"] = config.expert_ffn_hidden_size
    else:
        sharded["intermediate_size"] = config.ffn_hidden_size
    sizes = {"hidden_size": config.hidden_size}
    sizes |= {f"{name} / {tp_size} ranks": size // tp_size for name, size in sharded.items()}
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size % MULTIPLE != 0]
    if wrong:
        raise ConfigError(
            f"{config.path}: training.precision=fp8 needs sizes that are multiples of {MULTIPLE}, "
            f"but {', '.join(wrong)}; lower parallel.tensor_model_parallel_size or set "
            "training.precision=bf16"
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
