"""Student and teacher on this rank, with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trb_megatron import fp8
from trb_megatron.config import Config, FP8Recipe
from trb_megatron.distributed import ParallelLayout
from trb_megatron.hf_config import HFModelConfig
from trb_megatron.hf_weights import load_hf_weights
from trb_megatron.models import HiddenStateGPTModel, build_model, fp8_platform
from trb_megatron.pair_config import PairConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of parameters and activations."""


@dataclass(frozen=True)
class ModelPair:
    """Both models' parts on this rank; no teacher where a job has none."""

    student: HiddenStateGPTModel
    teacher: HiddenStateGPTModel | None

    @classmethod
    def load(
        cls,
        pair: PairConfig,
        config: Config,
        layout: ParallelLayout,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> ModelPair:
        """Build both models and read their weights; `say` gets one line for each.

        Raises:
            ValueError: a checkpoint whose weights cannot be used, FP8 where it cannot run.
        """
        recipes: dict[str, FP8Recipe] = {}
        if config.training.precision == "fp8":
            recipe = config.training.fp8_recipe
            fp8.check_platform(recipe, fp8_platform(layout.device))
            recipes = {"student": recipe, "teacher": fp8.frozen_recipe(recipe)}

        def load(name: str, hf_config: HFModelConfig) -> HiddenStateGPTModel:
            say(f"{name}: loading {hf_config.path}")
            model = build_model(
                hf_config,
                layout,
                vocab_size=pair.vocab_size,
                dtype=DTYPES[config.training.precision],
                sequence_parallel=config.parallel.sequence_parallel,
                recompute_activations=name == "student" and config.training.recompute_activations,
                fp8_recipe=recipes.get(name),
            )
            load_hf_weights(model, hf_config, layout)
            return model

        models = {name: load(name, hf_config) for name, hf_config in pair.models.items()}
        if "teacher" in models:
            models["teacher"].eval().requires_grad_(False)
        return cls(models["student"], models.get("teacher"))
