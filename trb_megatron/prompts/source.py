"""Prompt sources: files of prompts, read, rendered and tokenized."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trb_megatron.escapes import find_left_over
from trb_megatron.prompts.files import SourceFiles, find_files
from trb_megatron.prompts.readers import read_rows
from trb_megatron.prompts.records import Columns, Record, parse_record
from trb_megatron.prompts.rendering import ChatTemplate, plain_text

_SHOWN_CHARACTERS = 200  # of the first prompt
_MOST_NAMES = 3  # of files that a summary lists
_TOKENIZER_BATCH = 1024  # records encoded by one call, so that the tokenizer's threads have work


@dataclass(frozen=True)
class Prompt:
    """One tokenized prompt; `index` is its row in the source, counted from 0.

    `answer` lists the acceptable answers (any one is right). `response_ids` carry no stop id.
    """

    index: int
    token_ids: tuple[int, ...]
    answer: tuple[str, ...] | None
    response_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source, in its order, without those that were too long.

    Attributes:
        fingerprint: a hash of token ids, answers and responses, also of prompts that are too long,
            wherever they were read from.
        summary: what was read: rows, files, split, columns.
        first_text: the first prompt as the student sees it, decoded.
        warnings: what can be used but is probably not meant, a line each.
    """

    prompts: tuple[Prompt, ...]
    too_long: tuple[Prompt, ...]
    fingerprint: str
    summary: str = field(compare=False)
    first_text: str = field(compare=False)
    warnings: tuple[str, ...] = field(compare=False)

    def describe_first(self) -> str:
        """The first prompt's end, on one line, for the start-up report."""
        end = self.first_text[-_SHOWN_CHARACTERS:]
        cut = "..." if end != self.first_text else ""
        return f"first prompt, {len(self.prompts[0].token_ids):,} tokens: {cut}{end!r}"


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts come from, and how they become tokens.

    A source is a file of JSON Lines, a JSON array, CSV or parquet, or a folder of such files, or a
    Hugging Face dataset folder on disk.

    Attributes:
        format: "auto", "jsonl", "csv", "parquet" or "hf".
        split: of a folder of several splits; None: `default_split`.
        default_split: of a folder of several splits; None: refuse to choose.
        columns: of prompt, answer and response; those of the last two may be None.
        section: of the configuration that describes the source, for errors.
        needs_answers: every row must have an answer; else either all rows have one, or none has.
        system_prompt: opens a chat that brings none of its own; needs a chat template.
        apply_chat_template: render the tokenizer's template around the prompt, which may then be a
            list of messages; without, a prompt is plain text and must be a string.
        chat_template_kwargs: options of the template.
        template_date: the date that the template prints as today's; None: that of the clock.
        max_prompt_tokens: longer prompts are set apart.
        limit: the first so many rows; None: all.
    """

    path: Path
    format: str
    split: str | None = None
    default_split: str | None = None
    columns: Columns
    section: str = "data"
    needs_answers: bool = True
    system_prompt: str | None
    apply_chat_template: bool
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: date | None = None
    max_prompt_tokens: int
    limit: int | None = None

    @property
    def needed_columns(self) -> dict[str, str]:
        """Columns in which every row must have a value, and what to do where one has none."""
        prompt, answer, response = self.columns
        needed = {prompt: f"name the column of the prompts in {self.section}.prompt_column"}
        if response is not None:
            needed[response] = f"name the column of the responses in {self.section}.response_column"
        if answer is not None and self.needs_answers:
            key = f"{self.section}.answer_column"
            needed[answer] = (
                f"fill it in, name another column in {key}, or set {key}=null for no rewards"
                if self.section == "data"
                else "evaluation needs the right answer of every problem: fill it in, or name "
                f"another column in {key}"
            )
        return needed


def load_prompts(source: PromptSource, tokenizer: PreTrainedTokenizerFast) -> PromptSet:
    """Read and tokenize a source, setting prompts apart that are too long.

    A prompt is a string or a list of chat messages. An answer is a string, a number or a list of
    acceptable ones; of a solution in GSM8K's form only what follows `####` counts. A value that is
    null, blank or an empty list is no answer.

    Raises ValueError naming the file and the line or row of anything that cannot be used, and when
    no prompt is left.
    """
    template = None
    if source.apply_chat_template:
        template = ChatTemplate(
            tokenizer,
            source.section,
            source.system_prompt,
            source.chat_template_kwargs,
            source.template_date,
        )
    files = find_files(
        source.path, source.format, source.section, source.split, source.default_split
    )
    has_answers = False
    prompts: list[Prompt] = []
    too_long: list[Prompt] = []
    left_over: list[tuple[str, str]] = []
    row_options: Counter[str] = Counter()
    for batch in _batched(_read_records(source, files), _TOKENIZER_BATCH):
        has_answers = has_answers or batch[0].answer is not None
        for prompt in _tokenize(batch, tokenizer, template):
            fits = len(prompt.token_ids) <= source.max_prompt_tokens
            (prompts if fits else too_long).append(prompt)
        left_over += [(r.location, r.left_over) for r in batch if r.left_over is not None]
        row_options.update(option for record in batch for option in record.options)
    if not prompts:
        longer = f"all {len(too_long)} are longer than max_prompt_tokens={source.max_prompt_tokens}"
        raise ValueError(f"{source.path}: no prompts: {longer if too_long else 'it is empty'}")
    read = list(source.columns if has_answers else source.columns._replace(answer=None))
    return PromptSet(
        prompts=tuple(prompts),
        too_long=tuple(too_long),
        fingerprint=_fingerprint(prompts, too_long),
        summary=f"{len(prompts) + len(too_long):,} rows of {_describe_files(source, files)}, "
        f"columns {', '.join(column for column in read if column is not None)}",
        first_text=str(tokenizer.decode(list(prompts[0].token_ids))),
        warnings=tuple(_warnings(source, left_over, row_options)),
    )


_SHOWN_ROWS = 3


def _warnings(
    source: PromptSource, left_over: list[tuple[str, str]], row_options: Mapping[str, int]
) -> Iterator[str]:
    """What looks like LaTeX without its backslashes, and columns that others read.

    Args:
        left_over: rows, and what is in them.
        row_options: columns of `ROW_OPTIONS`, and how many rows have a value in them.
    """
    found = source.system_prompt and find_left_over(source.system_prompt)
    if found:
        yield f"the system prompt holds {found}, or put it in single quotes"
    if left_over:
        more = len(left_over) - _SHOWN_ROWS
        rows = "; ".join(f"{location} holds {what}" for location, what in left_over[:_SHOWN_ROWS])
        count = "1 row" if len(left_over) == 1 else f"{len(left_over):,} rows"
        yield f"{count} may have lost backslashes: {rows}" + (
            f"; and {more:,} more" if more > 0 else ""
        )
    for option, number in row_options.items():
        having = "1 row has" if number == 1 else f"{number:,} rows have"
        yield f"{source.path}: {having} a value in the column {option!r}, which is not read: " + (
            "tools are not supported"
            if option == "tools"
            else f"options are those of data.{option} for all rows"
        )


def _describe_files(source: PromptSource, files: SourceFiles) -> str:
    """Which files were read, and which of the folder were not."""
    if files.split is None:
        return str(source.path)
    count = f"{len(files.files):,} files: " if len(files.files) > 1 else ""
    others = [split for split in files.splits if split != files.split]
    return "".join(
        (
            f"{source.path} ({count}{_list_names(source.path, files.files)}",
            f"; split {files.split}, not {', '.join(others)}" if others else "",
            f"; {len(files.unread):,} not read: {_list_names(source.path, files.unread)}"
            if files.unread
            else "",
            ")",
        )
    )


def _list_names(folder: Path, files: Sequence[Path]) -> str:
    names = [file.relative_to(folder).as_posix() for file in files]
    return ", ".join(names if len(names) <= _MOST_NAMES else [names[0], "...", names[-1]])


def _read_records(source: PromptSource, files: SourceFiles) -> Iterator[Record]:
    """The checked rows of all files, one after the other, up to the source's limit."""
    columns, needed = source.columns, source.needed_columns
    optional = [column for column in columns if column is not None]
    rows = itertools.chain.from_iterable(
        read_rows(file, files.format, needed, optional) for file in files.files
    )
    return _with_all_answers_or_none(
        parse_record(index, location, row, columns, needed)
        for index, (location, row) in enumerate(itertools.islice(rows, source.limit))
    )


def _with_all_answers_or_none(records: Iterable[Record]) -> Iterator[Record]:
    with_answer: Record | None = None
    without: Record | None = None
    for record in records:
        if record.answer is not None:
            with_answer = with_answer or record
        elif record.no_answer is not None:
            without = without or record
        if with_answer is not None and without is not None:
            raise ValueError(
                f"{without.no_answer}; but {with_answer.location} has an answer: fill in the "
                "missing ones, or set data.answer_column=null for no rewards"
            )
        yield record


def _tokenize(
    records: list[Record], tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None
) -> Iterator[Prompt]:
    render = plain_text if template is None else template.render
    texts = [render(record) for record in records]
    # A chat template writes its own special tokens; plain text gets those of the tokenizer.
    prompt_ids = _encode(texts, tokenizer, add_special_tokens=template is None)
    responses = [record.response or "" for record in records]
    response_ids = _encode(responses, tokenizer, add_special_tokens=False)
    for record, ids, of_response in zip(records, prompt_ids, response_ids, strict=True):
        if not ids:
            raise ValueError(f"{record.location}: the prompt has no tokens")
        response = None if record.response is None else of_response
        yield Prompt(record.index, ids, record.answer, response)


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, *, add_special_tokens: bool
) -> list[tuple[int, ...]]:
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def _batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _fingerprint(prompts: Sequence[Prompt], too_long: Sequence[Prompt]) -> str:
    """Of all prompts in their order, and which are too long: as problems, those count as wrong."""
    are_too_long = {prompt.index for prompt in too_long}
    digest = hashlib.sha256()
    for prompt in sorted((*prompts, *too_long), key=lambda prompt: prompt.index):
        record: list[Any] = [prompt.token_ids, prompt.answer, prompt.response_ids]
        if prompt.index in are_too_long:
            record.append("too long")
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()
