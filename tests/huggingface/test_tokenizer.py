"""Tokenizers: equal or not, their sizes, and stop ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trb_megatron.huggingface.tokenizer import (
    check_same_tokenizer,
    load_tokenizer,
    stop_ids,
    tokenizer_size,
)


@pytest.fixture(scope="module")
def tokenizer(
    write_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_special_tokens_templates_and_sizes_may_differ(
    tmp_path: Path, write_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = write_tokenizer(
        tmp_path / "chat", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=None
    )
    check_same_tokenizer(tokenizer, load_tokenizer(chat))


def test_ordinary_token_may_be_special_for_one_model(
    tmp_path: Path, write_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    # As the eos token, "the" becomes an added token of this tokenizer, with its old id.
    teacher = load_tokenizer(write_tokenizer(tmp_path / "t", eos_token="the"))
    assert teacher.eos_token_id == tokenizer.get_vocab()["the"]
    check_same_tokenizer(tokenizer, teacher)


def _swap_two_tokens(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    by_id = {i: token for token, i in vocab.items()}
    vocab[by_id[260]], vocab[by_id[261]] = 261, 260


def _add_token(tokenizer: dict[str, Any]) -> None:
    extra = {**tokenizer["added_tokens"][-1], "content": "<think>"}
    extra["id"] += 1
    tokenizer["added_tokens"].append(extra)


def _swap_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    merges[0], merges[2] = merges[2], merges[0]


def _normalize(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}


def _add_prefix_space(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True


def _strip_around_added_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][1]["lstrip"] = True


def _ignore_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_swap_two_tokens, r"id 260 is '(\S+)' for the student and '(?!\1')\S+' for the teacher"),
        (_add_token, "id 289 is absent for the student and '<think>' for the teacher"),
        (_swap_merges, "merge or score 0 is"),
        (_normalize, "normalizer 0 is absent for the student and .*NFC"),
        (_add_prefix_space, "pre_tokenizer 0 is .*'add_prefix_space': True"),
        (_strip_around_added_token, "added token 0 is .*im_start.*'lstrip': True"),
        (_ignore_merges, "model setting .*ignore_merges"),
    ],
)
def test_different_tokenizers_are_refused_with_the_first_difference(
    tmp_path: Path,
    write_tokenizer: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    teacher = load_tokenizer(write_tokenizer(tmp_path / "teacher", edit))
    with pytest.raises(ValueError, match=message):
        check_same_tokenizer(tokenizer, teacher)


def test_tokenizer_size_is_the_highest_id_plus_one(
    tmp_path: Path, write_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer_size(tokenizer) == 289 == len(tokenizer.get_vocab())
    with_hole = load_tokenizer(write_tokenizer(tmp_path / "t", _leave_a_hole))
    last = max(with_hole.get_vocab().values())
    assert tokenizer_size(with_hole) == last + 1 > 400 > len(with_hole.get_vocab())
    assert with_hole.convert_ids_to_tokens(last) is not None


def _leave_a_hole(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["".join(tokenizer["model"]["merges"][-1])] = 400


def test_tokenizer_that_cannot_be_loaded_is_named(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    broken = write_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(ValueError, match="broken: the tokenizer cannot be loaded"):
        load_tokenizer(broken)


# ---------------------------------------------------------------- stop ids


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [7, 3, 7]}, {"eos_token_id": 5}, (7, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, (0,)),
        ({}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": []}, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
    ],
)
def test_stop_ids_are_those_of_generation_then_of_the_model(
    tmp_path: Path, generation: Any, model: Any, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert stop_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"no eos_token_id in .*generation_config\.json or .*/config\.json"),
        (b'{"eos_token_id": "</s>"}', r"config\.json: eos_token_id is '</s>'"),
        (b'{"eos_token_id": [-1]}', r"config\.json: eos_token_id is"),
        (b"{", r"config\.json: not valid JSON"),
        (b'{"x": "\xe9"}', r"config\.json: not valid JSON"),
        (b"[]", r"config\.json: expected a JSON object"),
    ],
)
def test_unusable_stop_ids_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        stop_ids(tmp_path)
