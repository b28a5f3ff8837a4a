"""Tokenizers of model folders: loading, comparing, and the ids that end a response."""

import itertools
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trb_megatron.huggingface.formats import refuse_other_formats
from trb_megatron.huggingface.tensors import read_json


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a model folder; nothing is downloaded and no code of it runs.

    Raises ValueError naming the folder when there is none that can be loaded, or when its weights
    have another format than safetensors: their folder often has no tokenizer, either.
    """
    refuse_other_formats(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ValueError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{path}: needs a fast tokenizer (a tokenizer.json)")
    return tokenizer


def tokenizer_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Highest token id + 1: the support of every distribution over tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer_fits(path: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder and check that the model knows all of its ids.

    Raises ValueError naming the folder when an id lies beyond the model's `vocab_size` rows, when a
    special token is none of the tokenizer's, or when no token has one of the model's stop ids.
    """
    tokenizer = load_tokenizer(path)
    size = tokenizer_size(tokenizer)
    if size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {size - 1}, but vocab_size is {vocab_size}"
        )
    vocabulary = tokenizer.get_vocab()
    for token in tokenizer.all_special_tokens:
        if token not in vocabulary:
            raise ValueError(f"{path}: the special token {token!r} is not in the tokenizer")
    for token_id in stop_ids(path):
        if token_id >= size:
            raise ValueError(
                f"{path}: stop id {token_id} is not in the tokenizer, whose highest id is "
                f"{size - 1}; correct generation_config.json"
            )
    return tokenizer


def check_same_tokenizer(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    """Check that both tokenizers turn every text into the same ids.

    Chat templates and the choice of eos, pad and other special tokens may differ: the student's are
    used throughout. Raises ValueError naming the first difference.
    """
    texts = [tokenizer.backend_tokenizer.to_str() for tokenizer in (student, teacher)]
    if texts[0] == texts[1]:  # what follows takes seconds for 150,000 tokens
        return
    _check_same_vocabulary(student, teacher)
    ours, theirs = map(json.loads, texts)
    _check_same_part("merge or score", _merges_or_scores(ours), _merges_or_scores(theirs))
    _check_same_part("model setting", _model_settings(ours), _model_settings(theirs))
    for part in ("normalizer", "pre_tokenizer"):
        _check_same_part(part, [ours[part]], [theirs[part]])
    special = {*student.all_special_tokens, *teacher.all_special_tokens}
    _check_same_part("added token", _added_tokens(ours, special), _added_tokens(theirs, special))


def _check_same_vocabulary(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for token_id in sorted({*ours, *theirs}):
        if ours.get(token_id) != theirs.get(token_id):
            raise ValueError(
                f"student and teacher have different tokenizers: id {token_id} is "
                f"{_quote(ours.get(token_id))} for the student and "
                f"{_quote(theirs.get(token_id))} for the teacher"
            )


def _check_same_part(name: str, ours: list[Any], theirs: list[Any]) -> None:
    for number, (one, other) in enumerate(itertools.zip_longest(ours, theirs)):
        if one != other:
            raise ValueError(
                "student and teacher have the same vocabulary but different tokenizers: "
                f"{name} {number} is {_quote(one)} for the student and {_quote(other)} for the "
                "teacher"
            )


def _quote(entry: Any) -> str:
    return "absent" if entry is None else repr(entry)


def _merges_or_scores(tokenizer: dict[str, Any]) -> list[Any]:
    """The rules that decide between segmentations: BPE's merges or Unigram's scored entries."""
    model = tokenizer["model"]
    return model["vocab"] if model["type"] == "Unigram" else model.get("merges", [])


def _model_settings(tokenizer: dict[str, Any]) -> list[Any]:
    settings = tokenizer["model"]
    return sorted((k, v) for k, v in settings.items() if k not in ("vocab", "merges"))


def _added_tokens(tokenizer: dict[str, Any], special: set[str]) -> list[Any]:
    """The added tokens, without those that only a choice of special tokens makes added."""
    ignored = ("id", "special")
    return [
        {key: value for key, value in token.items() if key not in ignored}
        for token in sorted(tokenizer["added_tokens"], key=lambda token: token["id"])
        if token["content"] not in special
    ]


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """The token ids that end a response, in the order in which the model folder lists them.

    They are `eos_token_id` of generation_config.json, else of config.json. Raises ValueError naming
    the files when neither has any.
    """
    files = [Path(path) / name for name in ("generation_config.json", "config.json")]
    for file in files:
        if file.exists():
            ids = read_json(file).get("eos_token_id")
            if ids is not None and ids != []:
                return _parse_stop_ids(ids, file)
    raise ValueError(
        f"no eos_token_id in {files[0]} or {files[1]}: responses would never stop; add it there or "
        "set rollout.stop_ids"
    )


def _parse_stop_ids(value: Any, file: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{file}: eos_token_id is {value!r}; expected token ids")
    return tuple(dict.fromkeys(ids))  # without repetitions
