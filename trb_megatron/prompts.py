"""Prompt sources, and the order in which prompts are visited.

A source is a JSON Lines file, a JSON array, parquet (a file or a folder of files) or a Hugging Face
dataset folder on disk. Whatever is wrong with one is said with its file and line or row.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from trb_megatron.uniforms import Purpose, counter_uniforms

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

    `fingerprint` is a hash of token ids, answers and responses, wherever they were read from.
    """

    prompts: tuple[Prompt, ...]
    num_dropped: int
    fingerprint: str


@dataclass(frozen=True)
class _Record:
    """The text of one row, and where it stands for error messages."""

    index: int
    location: str
    prompt: str | list[dict[str, str]]
    answer: tuple[str, ...] | None
    response: str | None


# ---------------------------------------------------------------- prompts


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    format: str = "auto",
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    response_column: str | None = None,
    system_prompt: str | None = None,
    apply_chat_template: bool = True,
    max_prompt_tokens: int,
    limit: int | None = None,
) -> PromptSet:
    """Read and tokenize the first `limit` rows of a source, dropping prompts that are too long.

    A prompt is a string or a list of chat messages. With `apply_chat_template` the tokenizer's
    template is rendered around it, the system prompt first (unless the messages bring their own)
    and the opening of the assistant's turn last; without, a prompt is plain text and must be a
    string. An answer is a string, a number or a list of acceptable ones; of a solution in GSM8K's
    form only what follows `####` counts. `format` is "auto", "jsonl", "parquet" or "hf".

    Raises ValueError naming the file and the line or row of anything that cannot be used, and when
    no prompt is left.
    """
    path = Path(path)
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; set "
            "apply_chat_template=false and system_prompt=null for plain text prompts"
        )
    columns = [c for c in (prompt_column, answer_column, response_column) if c is not None]
    rows = itertools.islice(_read_rows(path, format, columns), limit)
    records = (
        _parse_record(index, location, row, prompt_column, answer_column, response_column)
        for index, (location, row) in enumerate(rows)
    )
    prompts: list[Prompt] = []
    num_dropped = 0
    for batch in _batched(records, _TOKENIZER_BATCH):
        for prompt in _tokenize(batch, tokenizer, system_prompt, apply_chat_template):
            if len(prompt.token_ids) <= max_prompt_tokens:
                prompts.append(prompt)
            else:
                num_dropped += 1
    if not prompts:
        reason = f"all {num_dropped} are longer than max_prompt_tokens={max_prompt_tokens}"
        raise ValueError(f"{path}: no prompts: {reason if num_dropped else 'it is empty'}")
    return PromptSet(tuple(prompts), num_dropped, _fingerprint(prompts))


def _tokenize(
    records: list[_Record],
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: str | None,
    apply_chat_template: bool,
) -> Iterator[Prompt]:
    if apply_chat_template:
        texts = [_render_chat(record, tokenizer, system_prompt) for record in records]
    else:
        texts = [_plain_text(record) for record in records]
    # A chat template writes its own special tokens; plain text gets those of the tokenizer.
    prompt_ids = _encode(texts, tokenizer, add_special_tokens=not apply_chat_template)
    responses = [record.response or "" for record in records]
    response_ids = _encode(responses, tokenizer, add_special_tokens=False)
    for record, ids, of_response in zip(records, prompt_ids, response_ids, strict=True):
        if not ids:
            raise ValueError(f"{record.location}: the prompt has no tokens")
        response = None if record.response is None else of_response
        yield Prompt(record.index, ids, record.answer, response)


def _render_chat(
    record: _Record, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> str:
    messages = record.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything, about roles in particular
        raise ValueError(f"{record.location}: the chat template fails: {error}") from error
    assert isinstance(text, str)
    return text


def _plain_text(record: _Record) -> str:
    if not isinstance(record.prompt, str):
        raise ValueError(
            f"{record.location}: chat messages need a chat template; set apply_chat_template=true"
        )
    return record.prompt


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, *, add_special_tokens: bool
) -> list[tuple[int, ...]]:
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def _batched(records: Iterable[_Record], size: int) -> Iterator[list[_Record]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        record = [prompt.token_ids, prompt.answer, prompt.response_ids]
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------- one row


def _parse_record(
    index: int,
    location: str,
    row: Any,
    prompt_column: str,
    answer_column: str | None,
    response_column: str | None,
) -> _Record:
    if not isinstance(row, dict):
        raise ValueError(f"{location}: expected an object with the column {prompt_column!r}")
    for column in (prompt_column, answer_column, response_column):
        if column is not None and row.get(column) is None:
            raise ValueError(f"{location}: {_missing_column(column, list(row))}")
    return _Record(
        index=index,
        location=location,
        prompt=_parse_prompt(row[prompt_column], f"{location}: column {prompt_column!r}"),
        answer=(
            None
            if answer_column is None
            else _parse_answers(row[answer_column], f"{location}: column {answer_column!r}")
        ),
        response=(
            None
            if response_column is None
            else _parse_text(row[response_column], f"{location}: column {response_column!r}")
        ),
    )


def _missing_column(column: str, columns: list[str]) -> str:
    return f"no value in the column {column!r}; the columns are {', '.join(map(repr, columns))}"


def _parse_text(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{location} holds {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{location} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{location} is not valid Unicode text") from None
    return value


def _parse_prompt(value: Any, location: str) -> str | list[dict[str, str]]:
    if not isinstance(value, list):
        return _parse_text(value, location)
    if not value:
        raise ValueError(f"{location} is an empty list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{location}: a chat message needs a role and content")
        _parse_text(message.get("content"), f"{location}: a message's content")
    return value


def _parse_answers(value: Any, location: str) -> tuple[str, ...]:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{location} is an empty list of answers")
        return tuple(_parse_answer(answer, location) for answer in value)
    return (_parse_answer(value, location),)


def _parse_answer(value: Any, location: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    answer = _parse_text(value, location)
    final = answer.rpartition("####")[2].strip()  # the whole answer where there is no mark
    if not final:
        raise ValueError(f"{location} has nothing after ####")
    return final


# ---------------------------------------------------------------- sources


def _read_rows(path: Path, format: str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (location for error messages, row) in the source's order."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    readers = {"jsonl": _read_json, "parquet": _read_parquet, "hf": _read_hf_dataset}
    return readers[_detect_format(path) if format == "auto" else format](path, columns)


def _detect_format(path: Path) -> str:
    if path.is_dir():
        is_saved_dataset = any((path / n).exists() for n in ("state.json", "dataset_dict.json"))
        return "hf" if is_saved_dataset else "parquet"
    formats = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    if path.suffix not in formats:
        raise ValueError(f"{path}: cannot tell its format by its name; set format")
    return formats[path.suffix]


def _read_json(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a JSON Lines source is a file")
    with path.open("rb") as file:
        if file.read(1024).lstrip().startswith(b"["):
            file.seek(0)
            yield from _read_json_array(path, file.read())
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number}"
            if line.strip():
                yield location, _parse_json(_decode(line, location), location)


def _read_json_array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, entry {number}", row


def _decode(line: bytes, location: str) -> str:
    try:
        return line.decode("utf-8-sig")  # a byte-order mark is no part of the first line
    except UnicodeDecodeError:
        raise ValueError(f"{location}: not valid UTF-8") from None


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: broken JSON at column {error.colno}: {error.msg}") from None


def _read_parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: the folder holds no parquet files")
    for file in files:
        try:
            with ParquetFile(file) as table:
                _check_columns(file, columns, table.schema_arrow.names)
                batches = table.iter_batches(columns=columns)
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                for number, row in enumerate(rows, start=1):
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as parquet: {error}") from error


def _read_hf_dataset(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install datasets`") from None

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library's errors for a damaged folder are of many kinds
        raise ValueError(f"{path}: cannot be read as a dataset folder: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{path}: holds several splits; name one, such as {path / min(dataset)}")
    _check_columns(path, columns, dataset.column_names)
    for number, row in enumerate(dataset.select_columns(columns), start=1):
        yield f"{path}, row {number}", row


def _check_columns(path: Path, wanted: list[str], present: list[str]) -> None:
    for column in wanted:
        if column not in present:
            raise ValueError(f"{path}: {_missing_column(column, present)}")


# ---------------------------------------------------------------- order


class PromptOrder:
    """The endless order in which prompts are visited: a fresh permutation in each epoch.

    Nothing is remembered: which prompts come next depends on the seed and on how many were taken
    before, so that a resumed run continues where it stopped.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool) -> None:
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle

    def indices(self, position: int, count: int) -> list[int]:
        """Return which prompts, counted from 0, the `count` places from `position` on visit."""
        visited = []
        for place in range(position, position + count):
            epoch, row = divmod(place, self._num_prompts)
            visited.append(self._epoch_order(epoch)[row])
        return visited

    def _epoch_order(self, epoch: int) -> tuple[int, ...] | range:
        if not self._shuffle:
            return range(self._num_prompts)
        return _permutation(self._num_prompts, self._seed, epoch)


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _permutation(num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    uniforms = counter_uniforms(
        seed=seed,
        step=epoch,
        prompt_index=torch.arange(num_prompts),
        rollout_index=0,
        position=0,
        purpose=Purpose.SHUFFLE,
    )
    return tuple(torch.argsort(uniforms, stable=True).tolist())
