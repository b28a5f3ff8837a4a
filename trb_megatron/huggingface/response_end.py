"""The stop id with which a given response ends: that of an assistant turn in the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

_QUESTION, _ANSWER = "Question xq?", "Answer xa."  # in no template


@dataclass(frozen=True)
class ResponseEnd:
    """A stop id, and why it is this one of the student's stop ids."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    token_id: int
    reason: str

    @classmethod
    def find(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: tuple[int, ...],
        template_options: Mapping[str, Any] | None,
    ) -> ResponseEnd:
        """The stop id that ends the assistant's turn in the chat template.

        Where no stop id does, it is the tokenizer's eos token if that is one, else the first.

        Args:
            template_options: variables of the chat template; None: prompts are plain text.

        Raises:
            ValueError: the template fails, and there are several stop ids to choose from.
        """
        token_id, reason = stop_ids[0], "the only stop id"
        if len(stop_ids) > 1:
            reason = "the first stop id"
            if tokenizer.eos_token_id in stop_ids:
                token_id, reason = tokenizer.eos_token_id, "the tokenizer's eos token"
            if template_options is not None:
                found = [i for i in _after_answer(tokenizer, template_options) if i in stop_ids]
                if found:
                    token_id, reason = found[0], "which ends a turn in the chat template"
                else:
                    reason += "; no stop id ends a turn in the chat template"
        return cls(tokenizer, stop_ids, token_id, reason)

    def __str__(self) -> str:
        token = self.tokenizer.convert_ids_to_tokens(self.token_id)
        return f"responses end with {token!r} (id {self.token_id}), {self.reason}"

    def close(self, response_ids: Sequence[int]) -> tuple[int, ...]:
        """A response as a rollout would be: with one stop id, at its end.

        One that ends with a stop id, or with blanks behind one, has its own.
        """
        for number in range(len(response_ids) - 1, -1, -1):
            if response_ids[number] in self.stop_ids:
                return tuple(response_ids[: number + 1])
            if str(self.tokenizer.decode([response_ids[number]])).strip():
                break
        return (*response_ids, self.token_id)


def _after_answer(
    tokenizer: PreTrainedTokenizerFast, template_options: Mapping[str, Any]
) -> list[int]:
    """The ids that the chat template writes behind the assistant's words."""
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template_options)
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template fails for a question and its answer "
            f"({error}), so the stop token of the responses is unknown; name it in "
            "rollout.stop_ids=[ID]"
        ) from error
    assert isinstance(text, str)
    ids = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    return list(ids)
