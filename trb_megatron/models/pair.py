"""Student and teacher on this rank, with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trb_megatron.config.options import JobConfig
from trb_megatron.config.values import FP8Recipe
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.models import fp8
from trb_megatron.models.build import build_model, fp8_platform
from trb_megatron.models.gpt import HiddenStateGPTModel
from trb_megatron.models.sources import DTYPES, ModelSources
from trb_megatron.models.weights import load_hf_weights


@dataclass(frozen=True)
class Models:
    """Both models' parts on this rank; no teacher where a job has none."""

    student: HiddenStateGPTModel
    teacher: HiddenStateGPTModel | None

    @classmethod
    def load(
        cls,
        sources: ModelSources,
        config: JobConfig,
        layout: ParallelLayout,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> Models:
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
                vocab_size=sources.vocab_size,
                dtype=DTYPES[config.training.precision],
                sequence_parallel=config.parallel.sequence_parallel,
                recompute_activations=name == "student" and config.training.recompute_activations,
                fp8_recipe=recipes.get(name),
            )
            for warning in load_hf_weights(model, hf_config, layout):
                say(f"warning: {warning}")
            return model

        models = {name: load(name, hf_config) for name, hf_config in sources.models.items()}
        if "teacher" in models:
            models["teacher"].eval().requires_grad_(False)
        return cls(models["student"], models.get("teacher"))
