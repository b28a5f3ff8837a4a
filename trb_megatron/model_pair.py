"""Student and teacher of a run, and what they must agree on: tokenizer, vocabulary, stop ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from trb_megatron import fp8
from trb_megatron.config import Config, FP8Recipe
from trb_megatron.distributed import ParallelLayout
from trb_megatron.hf_weights import load_hf_weights
from trb_megatron.models import (
    HFModelConfig,
    HiddenStateGPTModel,
    build_model,
    check_layout,
    fp8_platform,
    padded_vocab_size,
    read_hf_config,
)
from trb_megatron.stop_alignment import StopAlignment
from trb_megatron.tokenizer import check_same_tokenizer, load_tokenizer, stop_ids, tokenizer_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of parameters and activations."""


@dataclass(frozen=True)
class ModelPair:
    """Both models on this rank, loaded and checked against each other.

    Attributes:
        teacher, teacher_config: None where a job has no teacher.
        tokenizer: the student's; the teacher's gives the same ids.
        tokenizer_size: highest token id + 1, the support of every distribution.
        student_stop_ids: ids that end a response, the student's own.
        alignment: the stop events of both models (the student's twice without a teacher).
    """

    student: HiddenStateGPTModel
    teacher: HiddenStateGPTModel | None
    student_config: HFModelConfig
    teacher_config: HFModelConfig | None
    tokenizer: PreTrainedTokenizerFast
    tokenizer_size: int
    student_stop_ids: tuple[int, ...]
    alignment: StopAlignment

    @classmethod
    def load(
        cls,
        config: Config,
        layout: ParallelLayout,
        *,
        with_teacher: bool,
        say: Callable[[str], None] = lambda line: None,
    ) -> ModelPair:
        """Read both checkpoints; everything is checked before the first weight is read.

        `say` gets one line for each phase.

        Raises:
            ValueError: a checkpoint that cannot be used, tokenizers that differ, a layout that does
                not fit a model, ids beyond a vocabulary, FP8 where it cannot run.
        """
        student_path = config.student.path
        teacher_path = config.teacher.path if with_teacher and config.teacher else None
        tokenizer = load_tokenizer(student_path)
        size = tokenizer_size(tokenizer)
        student_config = read_hf_config(student_path)
        teacher_config = None
        if teacher_path is not None:
            check_same_tokenizer(tokenizer, load_tokenizer(teacher_path))
            teacher_config = read_hf_config(teacher_path)
        configs = [c for c in (student_config, teacher_config) if c is not None]
        recipe: FP8Recipe | None = None
        if config.training.precision == "fp8":
            recipe = config.training.fp8_recipe
            fp8.check_platform(recipe, fp8_platform(layout.device))
        for hf_config in configs:
            check_layout(hf_config, layout.tp_size, layout.pp_size)
            if recipe is not None:
                fp8.check_sizes(hf_config, layout.tp_size)
            if size > hf_config.vocab_size:
                raise ValueError(
                    f"{hf_config.path}: the tokenizer has ids up to {size - 1}, "
                    f"but vocab_size is {hf_config.vocab_size}"
                )
        alignment = _align(config, teacher_path, size)
        vocab_size = padded_vocab_size([c.vocab_size for c in configs], layout.tp_size)
        say(
            f"vocabulary: {size:,} ids; rows "
            + ", ".join(f"{c.vocab_size:,}" for c in configs)
            + f" padded to {vocab_size:,}"
        )
        if teacher_path is not None and not alignment.is_trivial:
            say(
                f"stop ids: student {list(alignment.student_ids)}, teacher "
                f"{list(alignment.teacher_ids)}, merged into {alignment.stop_id}"
            )

        def load(
            name: str, hf_config: HFModelConfig, fp8_recipe: FP8Recipe | None
        ) -> HiddenStateGPTModel:
            say(f"{name}: loading {hf_config.path}")
            model = build_model(
                hf_config,
                layout,
                vocab_size=vocab_size,
                dtype=DTYPES[config.training.precision],
                sequence_parallel=config.parallel.sequence_parallel,
                recompute_activations=name == "student" and config.training.recompute_activations,
                fp8_recipe=fp8_recipe,
            )
            load_hf_weights(model, hf_config, layout)
            return model

        student = load("student", student_config, recipe)
        teacher = None
        if teacher_config is not None:
            recipe = None if recipe is None else fp8.frozen_recipe(recipe)
            teacher = load("teacher", teacher_config, recipe).eval().requires_grad_(False)
        return cls(
            student=student,
            teacher=teacher,
            student_config=student_config,
            teacher_config=teacher_config,
            tokenizer=tokenizer,
            tokenizer_size=size,
            student_stop_ids=alignment.student_ids,
            alignment=alignment,
        )

    def check_length(self, num_tokens: int, what: str, *, student_only: bool = False) -> None:
        """Refuse sequences that are longer than the positions of a model that reads them."""
        configs = [self.student_config] + ([] if student_only else [self.teacher_config])
        for config in configs:
            if config is not None and num_tokens > config.max_positions:
                raise ValueError(
                    f"{what} = {num_tokens} exceeds the {config.max_positions} positions "
                    f"(max_position_embeddings) of {config.path}; lower them"
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _align(config: Config, teacher_path: Path | None, size: int) -> StopAlignment:
    """The stop events of both models, `rollout.stop_ids` overriding both."""
    student_ids = config.rollout.stop_ids or stop_ids(config.student.path)
    teacher_ids = student_ids
    if teacher_path is not None:
        teacher_ids = config.rollout.stop_ids or stop_ids(teacher_path)
    for token_id in (*student_ids, *teacher_ids):
        if token_id >= size:
            raise ValueError(
                f"stop id {token_id} is not in the tokenizer, whose highest id is {size - 1}; "
                "correct generation_config.json or rollout.stop_ids"
            )
    return StopAlignment(student_ids, teacher_ids)
