"""Options of prompts and problems: their files, and how they become tokens."""

from typing import Annotated, Literal

from trb_megatron.config.values import (
    ConfigPath,
    Count,
    Date,
    Flag,
    Name,
    Section,
    TemplateOption,
    auto_or_between,
)

MATH_SYSTEM_PROMPT = (
    "Please reason step by step, and put your final answer within \\boxed{}."  # arXiv 2605.31159
)
AUTO_ANSWER_COLUMN = "answer"
"""The column in which `data.answer_column: auto` looks for answers."""

PromptFormat = Literal["auto", "jsonl", "csv", "parquet", "hf"]


class JobDataConfig(Section):
    """The training prompts, and how all prompts become tokens."""

    path: ConfigPath | None = None
    """Used for training alone."""
    format: PromptFormat = "auto"
    """Format of `data.path`; `auto` tells it by the name of a file and the content of a folder."""
    split: Name | None = None
    """Split of a folder that has several; `null`: `train`."""
    prompt_column: Name = "prompt"
    """Column of the prompts: text, or a list of chat messages. A dot leads into a column that holds
    an object, as in `extra_info.answer`, here and in the next two."""
    answer_column: Name | None = "auto"
    """Column of the right answers, by which responses are rewarded; `auto`: `answer`, where the
    prompts have such a column; `null`: no rewards during training."""
    response_column: Name | None = None
    """Column of the responses that supervised training imitates; not used for distillation."""
    system_prompt: str | None = MATH_SYSTEM_PROMPT
    """System message before each prompt that brings none of its own; `null`: none."""
    apply_chat_template: Flag = True
    """Render prompts with the chat template of the student's tokenizer; `false`: prompts are plain
    text."""
    chat_template_kwargs: dict[Name, TemplateOption] = {}  # noqa: RUF012 - pydantic copies it
    """Options of the chat template, such as `{enable_thinking: false}`."""
    template_date: Date | None = None
    """Date for a chat template that prints today's; `null`: the day on which the run first
    started."""
    max_prompt_tokens: Count = 1024
    """Longest prompt in tokens, chat template included. Longer ones are dropped and counted."""
    shuffle: Flag = True
    """Visit the prompts in a new random order in each epoch; `false`: in the order of the file."""


class DataConfig(JobDataConfig):
    """The training prompts, and how all prompts become tokens."""

    path: ConfigPath
    """File of prompts, or folder of such files, or Hugging Face dataset folder."""


class EvaluationSet(Section):
    """One file of problems with known answers."""

    path: ConfigPath
    """File or folder of problems."""
    format: PromptFormat = "auto"
    """Format of `path`, as in `data.format`."""
    split: Name | None = None
    """Split of a folder, needed where it has several."""
    prompt_column: Name = "prompt"
    """Column of the problems."""
    answer_column: Name = "answer"
    """Column of the right answers."""
    limit: Count | None = None
    """Use only the first so many problems; `null`: all."""
    max_prompt_tokens: Annotated[Literal["auto"] | int, auto_or_between(1, 2**31 - 1)] = "auto"
    """Problems of more tokens, template included, get no response and count as wrong; `auto`:
    `data.max_prompt_tokens`."""
    system_prompt: str | None = "auto"
    """System message before each problem that brings none of its own; `null`: none; `auto`:
    `data.system_prompt`."""
