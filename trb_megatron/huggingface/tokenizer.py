"""Tokenizers of model folders: loading, comparing, and the ids that end a response.

The tokenizer of a folder is its `tokenizer.json`, whatever class its other files name.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trb_megatron.huggingface.formats import refuse_other_formats
from trb_megatron.huggingface.tensors import read_json

TOKENIZER_FILE = "tokenizer.json"


class _FileTokenizer(PreTrainedTokenizerFast):
    """`tokenizer.json` as it is, with the chat templates and special tokens of other files.

    The classes that `AutoTokenizer` chooses by `model_type` and `tokenizer_class` may put another
    normalizer or pre-tokenizer in place of the file's.
    """

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add none: a special token of another file would cut words that hold it."""
        return 0


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a model folder; nothing is downloaded and no code of it runs.

    Its ids are those of `tokenizers.Tokenizer.from_file`. A folder without a `tokenizer.json`
    has what transformers makes of its other files.

    Raises ValueError naming the folder when there is none that can be loaded, or when its weights
    have another format than safetensors: their folder often has no tokenizer, either.
    """
    refuse_other_formats(Path(path))
    has_file = (Path(path) / TOKENIZER_FILE).is_file()
    kind = _FileTokenizer if has_file else AutoTokenizer
    try:
        tokenizer = _load_as(kind, path)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ValueError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{path}: needs a fast tokenizer (a {TOKENIZER_FILE})")
    if has_file:
        tokenizer.split_special_tokens = False  # an option of another file
        _check_added_tokens(Path(path), tokenizer.get_vocab())
    return tokenizer


def _load_as(kind: Any, path: str | Path) -> Any:
    """A folder's tokenizer in this class; nothing is downloaded and no code of it runs."""
    return kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _check_added_tokens(path: Path, vocabulary: dict[str, int]) -> None:
    """Refuse tokens of tokenizer_config.json that the tokenizer doesn't have, or elsewhere."""
    file = path / "tokenizer_config.json"
    added = read_json(file).get("added_tokens_decoder", {}) if file.is_file() else {}
    for token_id, token in added.items():
        content = token["content"] if isinstance(token, dict) else token
        if str(vocabulary.get(content)) != token_id:
            raise ValueError(
                f"{file}: added_tokens_decoder has {content!r} as id {token_id}, but in "
                f"{TOKENIZER_FILE} it is {vocabulary.get(content, 'absent')}; save the tokenizer "
                "again by save_pretrained() of transformers"
            )


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
    _check_same_part("model setting", _model_settings(student), _model_settings(teacher))
    for part in ("normalizer", "pre_tokenizer"):
        _check_same_part(part, _steps(ours[part]), _steps(theirs[part]))
    special = {*student.all_special_tokens, *teacher.all_special_tokens}
    _check_same_part("added token", _added_tokens(ours, special), _added_tokens(theirs, special))


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides the ids of ordinary text, however its file spells it."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [
        *(
            sorted(tokenizer.get_vocab().items()),
            _merges_or_scores(raw),
            _model_settings(tokenizer),
        ),
        *(_steps(raw["normalizer"]), _steps(raw["pre_tokenizer"])),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


def _model_settings(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """The settings of a model that change ids, by name."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    # A field that is absent, null, false, 0 or empty switches nothing on.
    settings = {k: v for k, v in model.items() if k not in ("vocab", "merges") and v}
    if "<0x00>" not in vocabulary:
        settings.pop("byte_fallback", None)
    if set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys() and model["type"] == "BPE":
        # Nothing is unknown.
        settings.pop("unk_token", None)
    if "unk_token" not in settings:
        settings.pop("fuse_unk", None)
    if settings.get("ignore_merges") and _merges_make_every_token(tokenizer):
        del settings["ignore_merges"]
    return sorted(settings.items())


def _merges_make_every_token(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether each word that is a token becomes it by merges, too."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merging = Tokenizer.from_str(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {**model, "ignore_merges": False}}
        )
    ).model
    return all(len(merging.tokenize(token)) == 1 for token in model["vocab"] if token)


def _steps(part: dict[str, Any] | None) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer in a row, as far as they change ids."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("normalizers", part.get("pretokenizers", []))
        return [step for one in inner for step in _steps(one)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _added_tokens(tokenizer: dict[str, Any], special: set[str]) -> list[Any]:
    """The added tokens, without those that only a choice of special tokens makes added."""
    ignored = ["id", "special"]
    if not _steps(tokenizer["normalizer"]):
        ignored.append("normalized")
    return [
        {key: value for key, value in token.items() if key not in ignored}
        for token in sorted(tokenizer["added_tokens"], key=lambda token: token["id"])
        if token["content"] not in special
    ]


# Digits, blanks, accents (one of them as a mark of its own), signs, scripts and code: the places
# in which normalizers and pre-tokenizers differ.
PROBES = (
    *("1234567 + 89 = ?", "3.14159e-05, 1,000,000 €", "  two  blanks\t\ttabs\n\n\nlines \r\n"),
    *("It's I'LL don't we've", "café cafe\u0301 ½ ﬁ №", "你好 世界 こんにちは", "العربية עברית"),
    *("🙂👩‍🔬", "def f(x):\n    return {'a': x_1 ** 2}  # ok", "\\frac{1}{2} \\boxed{18}"),
)


def check_ids(paths: Sequence[Path], tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Check that `tokenizer` gives the ids that the `tokenizer.json` of each folder gives.

    Raises ValueError naming the folder and the first text whose ids differ.
    """
    ours = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for path in paths:
        if not (path / TOKENIZER_FILE).is_file():
            continue
        of_file = Tokenizer.from_file(str(path / TOKENIZER_FILE))
        of_file.no_truncation()
        of_file.no_padding()
        theirs = of_file.encode_batch(texts, add_special_tokens=False)
        for text, ids, encoding in zip(texts, ours, theirs, strict=True):
            if ids != encoding.ids:
                raise ValueError(
                    f"{path / TOKENIZER_FILE} gives {len(encoding.ids)} other ids than the "
                    f"student's tokenizer, which gives {len(ids)}, for {text[-60:]!r}"
                )


def difference_in_transformers(path: Path, texts: Sequence[str] = ()) -> str | None:
    """How transformers' own reading of a folder gives other ids than `tokenizer.json`, if it does.

    Args:
        texts: on which ids are compared, besides some that are hard to tokenize and all added
            tokens.
    """
    if not (path / TOKENIZER_FILE).is_file():
        return None
    ours, theirs = load_tokenizer(path), _load_as(AutoTokenizer, path)
    added = {*ours.get_added_vocab(), *theirs.get_added_vocab()}
    around_added = " ".join(f"the {token} of" for token in sorted(added))
    for text in (*PROBES, around_added, *texts):
        expected, found = _ids(ours, text), _ids(theirs, text)
        if expected == found:
            continue
        advice = (
            "tokenizer_config.json, special_tokens_map.json or added_tokens.json adds tokens or "
            "changes them; take that out for both to agree"
        )
        if _ids(_load_as(PreTrainedTokenizerFast, path), text) == expected:
            advice = "there, load it by PreTrainedTokenizerFast.from_pretrained(...)"
        return (
            f"transformers' AutoTokenizer reads other ids from {path} than {TOKENIZER_FILE} says: "
            f"{type(theirs).__name__} gives {len(found)} instead of {len(expected)} for "
            f"{text[:40]!r}; {advice}"
        )
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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
