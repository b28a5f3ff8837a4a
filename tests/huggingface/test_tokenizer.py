"""Tokenizers: equal or not, their sizes, and stop ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trb_megatron.huggingface.families import FAMILIES
from trb_megatron.huggingface.tokenizer import (
    PROBES,
    check_ids,
    check_same_tokenizer,
    difference_in_transformers,
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


def _split_digits_in_threes(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated",
             "invert": False},
            tokenizer["pre_tokenizer"],
        ],
    }  # fmt: skip


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
        (_split_digits_in_threes, "pre_tokenizer 0 is .*ByteLevel.* and .*Split"),
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


def _trim_offsets(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["trim_offsets"] = not tokenizer["pre_tokenizer"]["trim_offsets"]


def _spell_model_settings(tokenizer: dict[str, Any]) -> None:
    model = tokenizer["model"]
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": 0.0}
    model |= {"fuse_unk": True, "byte_fallback": True, "unk_token": "the"}


def _nest_steps(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [tokenizer["pre_tokenizer"]]}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": []}


def _normalize_added_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][1]["normalized"] = True


def _truncate(tokenizer: dict[str, Any]) -> None:
    tokenizer["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip


HARMLESS = [
    *(_trim_offsets, _spell_model_settings, _nest_steps, _normalize_added_token, _truncate),
    _ignore_merges,
]


@pytest.mark.parametrize("edit", HARMLESS)
def test_spelling_that_changes_no_ids_is_no_difference(
    tmp_path: Path,
    write_tokenizer: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    edit: Callable[[dict[str, Any]], None],
) -> None:
    folder = write_tokenizer(tmp_path / "teacher", edit)
    teacher = load_tokenizer(folder)
    assert teacher.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()
    check_same_tokenizer(tokenizer, teacher)
    check_ids([folder], tokenizer, [*PROBES, "the cat" * 20])


def _forget_last_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def test_ignored_merges_matter_if_they_do_not_make_every_token(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    def ignore(tokenizer: dict[str, Any]) -> None:
        _forget_last_merge(tokenizer)
        _ignore_merges(tokenizer)

    student = load_tokenizer(write_tokenizer(tmp_path / "student", _forget_last_merge))
    teacher = load_tokenizer(write_tokenizer(tmp_path / "teacher", ignore))
    with pytest.raises(ValueError, match=r"model setting .*ignore_merges"):
        check_same_tokenizer(student, teacher)


# ---------------------------------------------------------------- the file decides


def _lower(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


EDITS = (_split_digits_in_threes, _lower, _add_prefix_space, _normalize, lambda tokenizer: None)
CLASSES = ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("edit", EDITS)
def test_ids_are_those_of_the_file_whatever_the_class(
    tmp_path: Path,
    write_tokenizer: Callable[..., Path],
    edit: Callable[[dict[str, Any]], None],
    family: str,
) -> None:
    """Also where a special token of tokenizer_config.json is an ordinary word of the file."""
    for number, name in enumerate(CLASSES):
        options = {"tokenizer_class": name, "pad_token": "the", "bos_token": "<|im_start|>"}
        folder = write_tokenizer(tmp_path / str(number), edit, **options)
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        of_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        for text in (*PROBES, "<|im_start|>user\nthe 1234567 THE<|im_end|>"):
            expected = of_file.encode(text, add_special_tokens=False).ids
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.bos_token_id == of_file.token_to_id("<|im_start|>")
        check_ids([folder], tokenizer, list(PROBES))


def test_what_transformers_reads_differently_is_said(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    folder = write_tokenizer(tmp_path / "lower", _lower, tokenizer_class="Qwen2Tokenizer")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    found = difference_in_transformers(folder)
    assert found is not None
    assert f"reads other ids from {folder} than tokenizer.json says: Qwen2Tokenizer gives" in found
    assert found.endswith("; there, load it by PreTrainedTokenizerFast.from_pretrained(...)")
    plain = write_tokenizer(tmp_path / "plain")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    assert difference_in_transformers(plain, ["the cat"]) is None


FLAGS = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}


@pytest.mark.parametrize(
    ("edit", "settings", "token"),
    [
        (_add_token, {"added_tokens_decoder": {"289": {"content": "<think>", **FLAGS}}}, "<think>"),
        (None, {"additional_special_tokens": ["<think>"]}, "<think>"),
        (None, {"split_special_tokens": True}, "<|im_end|>"),
    ],
)
def test_added_tokens_that_other_files_change_are_said(
    tmp_path: Path,
    write_tokenizer: Callable[..., Path],
    edit: Callable[[dict[str, Any]], None] | None,
    settings: dict[str, Any],
    token: str,
) -> None:
    """The ids are those of tokenizer.json, and transformers' others are a warning."""
    folder = write_tokenizer(tmp_path, edit, **settings)
    tokenizer = load_tokenizer(folder)
    text = f"the {token} of the <|im_start|> cat"
    of_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = of_file.encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    check_ids([folder], tokenizer, [text])
    found = difference_in_transformers(folder)
    assert found is not None and f"reads other ids from {folder} than tokenizer.json" in found
    assert "take that out for both to agree" in found


def test_other_ids_of_a_folder_are_refused(
    tmp_path: Path, write_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_tokenizer(tmp_path / "other", _add_prefix_space)
    with pytest.raises(ValueError, match=r"other/tokenizer\.json gives \d+ other ids .* for 'the'"):
        check_ids([folder], tokenizer, ["the"])


@pytest.mark.parametrize(("token", "token_id"), [("<think>", "289"), ("the", "3")])
def test_tokens_that_only_the_configuration_adds_are_refused(
    tmp_path: Path, write_tokenizer: Callable[..., Path], token: str, token_id: str
) -> None:
    folder = write_tokenizer(
        tmp_path / "added", added_tokens_decoder={token_id: {"content": token, "special": False}}
    )
    with pytest.raises(
        ValueError, match=f"added_tokens_decoder has '{token}' as id {token_id}, but"
    ):
        load_tokenizer(folder)


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
