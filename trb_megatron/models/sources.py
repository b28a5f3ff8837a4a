"""Student and teacher as their folders describe them, checked against each other; no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.config.options import JobConfig
from trb_megatron.distributed.layout import is_rank_zero
from trb_megatron.huggingface.config import (
    HFModelConfig,
    check_layout,
    padded_vocab_size,
    read_hf_config,
)
from trb_megatron.huggingface.tokenizer import (
    check_ids,
    check_same_tokenizer,
    difference_in_transformers,
    load_tokenizer,
    stop_ids,
    tokenizer_digest,
    tokenizer_size,
)
from trb_megatron.models import fp8
from trb_megatron.prompts.source import PromptSet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Type of parameters and activations, by `training.precision`."""

# <think>, and [THINK] of Magistral; no <s>, <|im_end|> or <end_of_turn>
_TAG = re.compile(r"</?[A-Za-z]{2,}>|\[/?THINK\]")
_OPENED = re.compile(r"(?i:<(?:think|thinking|thought|reasoning|answer)>|\[THINK\])\Z")
_LONGEST_OPENING = 20  # tokens
_NUM_CHECKED_PROMPTS = 1000  # of each set


@dataclass(frozen=True)
class ModelSources:
    """Both models as their folders describe them, and what they agree on.

    Attributes:
        teacher: None where a job has no teacher.
        tokenizer: the student's; the teacher's gives the same ids.
        tokenizer_size: highest token id + 1, the support of every distribution.
        tokenizer_digests: of the tokenizers by model.
        vocab_size: rows of both models' vocabularies on all tensor-parallel ranks together, padded.
        alignment: the stop events of both models (the student's twice without a teacher).
    """

    student: HFModelConfig
    teacher: HFModelConfig | None
    tokenizer: PreTrainedTokenizerFast
    tokenizer_size: int
    tokenizer_digests: dict[str, str]
    vocab_size: int
    alignment: StopAlignment

    @classmethod
    def read(cls, config: JobConfig, *, with_teacher: bool) -> ModelSources:
        """Read the folders' configurations, tokenizers and stop ids.

        Raises:
            ValueError: a folder that cannot be used, tokenizers that differ, a parallel layout or
                FP8 that does not fit a model, ids beyond a vocabulary, sequences beyond a model's
                positions.
        """
        student_path = config.student.path
        teacher_path = config.teacher.path if with_teacher and config.teacher else None
        student = read_hf_config(student_path)
        tokenizer = load_tokenizer(student_path)
        size = tokenizer_size(tokenizer)
        digests = {"student": tokenizer_digest(tokenizer)}
        teacher = None
        if teacher_path is not None:
            teacher = read_hf_config(teacher_path)
            of_teacher = load_tokenizer(teacher_path)
            check_same_tokenizer(tokenizer, of_teacher)
            digests["teacher"] = tokenizer_digest(of_teacher)
        tp_size = config.parallel.tensor_model_parallel_size
        models = [model for model in (student, teacher) if model is not None]
        check_layout(models, tp_size, config.parallel.pipeline_model_parallel_size)
        for model in models:
            if config.training.precision == "fp8":
                fp8.check_sizes(model, tp_size)
            if size > model.vocab_size:
                raise ValueError(
                    f"{model.path}: the tokenizer has ids up to {size - 1}, "
                    f"but vocab_size is {model.vocab_size}"
                )
        _check_lengths(config, student, teacher)
        return cls(
            student=student,
            teacher=teacher,
            tokenizer=tokenizer,
            tokenizer_size=size,
            tokenizer_digests=digests,
            vocab_size=padded_vocab_size([model.vocab_size for model in models], tp_size),
            alignment=_align(config, teacher_path, size),
        )

    @property
    def models(self) -> dict[str, HFModelConfig]:
        """The configurations by name, without a teacher that isn't there."""
        pair = {"student": self.student, "teacher": self.teacher}
        return {name: model for name, model in pair.items() if model is not None}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the student's own."""
        return self.alignment.student_ids

    def check_tokenizers(self, prompt_sets: Iterable[PromptSet]) -> list[str]:
        """Make sure that the models' files give the prompts' ids.

        Returns:
            On rank 0, where transformers would read other ids, for people to know.

        Raises:
            ValueError: names the folder and the first text whose ids differ.
        """
        prompts = [p for found in prompt_sets for p in found.prompts[:_NUM_CHECKED_PROMPTS]]
        texts = [str(self.tokenizer.decode(list(prompt.token_ids))) for prompt in prompts]
        check_ids([model.path for model in self.models.values()], self.tokenizer, texts)
        found = difference_in_transformers(self.student.path, texts) if is_rank_zero() else None
        return [] if found is None else [found]

    @cached_property
    def _hidden_ids(self) -> frozenset[int]:
        """Special tokens that are no text: all but tags, some of which say where an answer is."""
        tokenizer = self.tokenizer
        named = {getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        return frozenset(
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and (token.content in named or not _TAG.fullmatch(token.content))
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without the stop id at its end and special tokens.

        Tags such as `<think>` and `</answer>` are text, also where a tokenizer calls them special.
        """
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode([i for i in ids if i not in self._hidden_ids]))

    def decode_to_grade(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Text of a response, behind the `<think>` with which a chat template may end the prompt.

        Without it, a response that was cut off while thinking would look like an answer.
        """
        opened = _OPENED.search(self.decode(prompt_ids[-_LONGEST_OPENING:]).rstrip())
        return (opened[0] if opened else "") + self.decode(response_ids)


def _check_lengths(
    config: JobConfig, student: HFModelConfig, teacher: HFModelConfig | None
) -> None:
    """Refuse sequences that are longer than the positions of a model that reads them."""
    uses: list[tuple[str, int, list[HFModelConfig]]] = []
    if teacher is not None:
        num_tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        keys = "data.max_prompt_tokens + rollout.max_response_tokens"
        uses.append((keys, num_tokens, [student, teacher]))
    # What is chosen by itself is chosen to fit, when the problems are known.
    if config.evaluation.max_response_tokens != "auto":
        for name, problems in config.evaluation.sets.items():
            section = "data" if problems.max_prompt_tokens == "auto" else f"evaluation.sets.{name}"
            num_tokens = config.longest_problem(name) + config.evaluation.max_response_tokens
            keys = f"{section}.max_prompt_tokens + evaluation.max_response_tokens"
            uses.append((keys, num_tokens, [student]))
    for keys, num_tokens, models in uses:
        for model in models:
            if num_tokens > model.max_positions:
                raise ValueError(
                    f"{keys} = {num_tokens} "
                    f"exceeds the {model.max_positions} positions (max_position_embeddings) of "
                    f"{model.path}; lower them"
                )


def _align(config: JobConfig, teacher_path: Path | None, size: int) -> StopAlignment:
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
