"""Prompt sources and their order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from tests.prompts.sources import load, write_jsonl
from trb_megatron.huggingface.tokenizer import load_tokenizer
from trb_megatron.prompts.order import PromptOrder
from trb_megatron.prompts.source import PromptSet

ROWS = [
    {"prompt": "what is the sum of 1 and 2?", "answer": "3", "text": "the answer is 3"},
    {"prompt": "the sum of 2 and 2?", "answer": 4, "text": "4"},
    {"prompt": "numbers", "answer": ["x", "y + 1"], "text": "x"},
]


# ---------------------------------------------------------------- content


def test_chat_template_is_rendered_around_the_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    loaded = load(source, tokenizer, system_prompt="think", response_column="text")
    assert [p.index for p in loaded.prompts] == [0, 1, 2]
    assert [p.answer for p in loaded.prompts] == [("3",), ("4",), ("x", "y + 1")]
    first = loaded.prompts[0]
    assert tokenizer.decode(first.token_ids) == (
        "<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\nwhat is the sum of 1 and 2?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first.response_ids is not None
    assert tokenizer.decode(first.response_ids) == "the answer is 3"


def test_messages_bring_their_own_system_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    system = {"role": "system", "content": "own"}
    user = {"role": "user", "content": "numbers"}
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [system, user]}, {"prompt": [user]}])
    with_own, without = load(source, tokenizer, answer_column=None, system_prompt="given").prompts
    assert "own" in tokenizer.decode(with_own.token_ids)
    assert "given" not in tokenizer.decode(with_own.token_ids)
    assert "given" in tokenizer.decode(without.token_ids)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*apply_chat_template=true"):
        load(source, tokenizer, answer_column=None, apply_chat_template=False)


def test_plain_text_is_the_prompt_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    prompt = load(source, tokenizer, apply_chat_template=False).prompts[2]
    assert tokenizer.decode(prompt.token_ids) == "numbers"
    assert prompt.response_ids is None


def test_plain_text_gets_the_tokenizers_own_special_tokens(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    def add_bos(tokenizer: dict[str, Any]) -> None:
        bos = {"id": "<|im_start|>", "type_id": 0}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_start|>": {"id": "<|im_start|>", "ids": [287], "tokens": ["<|im_start|>"]}
            },
        }

    with_bos = load_tokenizer(write_tokenizer(tmp_path / "bos", add_bos))
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    plain = load(source, with_bos, apply_chat_template=False, response_column="text").prompts[2]
    assert with_bos.decode(plain.token_ids) == "<|im_start|>numbers"
    assert plain.response_ids is not None and with_bos.decode(plain.response_ids) == "x"
    chat = load(source, with_bos).prompts[2]
    assert with_bos.decode(chat.token_ids).count("<|im_start|>") == 2  # the template's own


def test_missing_chat_template_says_what_to_set(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    without = load_tokenizer(write_tokenizer(tmp_path / "t", chat_template=None))
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(ValueError, match="apply_chat_template=false"):
        load(source, without)


def test_gsm8k_solution_is_cut_to_its_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "p", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002 "}]
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer).prompts
    assert prompt.answer == ("1,002",)


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    lengths = [len(p.token_ids) for p in load(source, tokenizer).prompts]
    loaded = load(source, tokenizer, max_prompt_tokens=lengths[1])
    assert [p.index for p in loaded.prompts] == [1, 2]
    assert len(loaded.too_long) == 1
    with pytest.raises(ValueError, match=r"p\.jsonl: .*all 3 are longer than max_prompt_tokens=2"):
        load(source, tokenizer, max_prompt_tokens=2)


def test_limit_counts_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    assert len(load(source, tokenizer, limit=2).prompts) == 2


# ---------------------------------------------------------------- formats


def test_formats_agree_and_so_do_their_fingerprints(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{**row, "answer": str(number)} for number, row in enumerate(ROWS)]
    jsonl = write_jsonl(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=2))
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, part in (("b", rows[1:]), ("a", rows[:1])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hf"))
    expected = load(jsonl, tokenizer, response_column="text")
    for name in ("p.json", "p.parquet", "parquet", "hf"):
        assert load(tmp_path / name, tokenizer, response_column="text") == expected, name


def test_fingerprint_depends_on_everything_that_is_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def fingerprint(rows: list[Any], **options: Any) -> str:
        return load(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, **options).fingerprint

    changed = [{**ROWS[0], "answer": "5"}, *ROWS[1:]]
    fingerprints = {
        fingerprint(ROWS),
        fingerprint(ROWS[::-1]),
        fingerprint(changed),
        fingerprint(ROWS, response_column="text"),
        fingerprint(ROWS, system_prompt="think"),
    }
    assert len(fingerprints) == 5


def test_fingerprint_knows_prompts_that_are_too_long(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def load_rows(rows: list[Any], most: int = 20) -> PromptSet:
        return load(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, max_prompt_tokens=most)

    short = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    long = {"prompt": "a b c " * 50, "answer": "3"}
    sets = [
        load_rows(short),
        load_rows([*short, long]),
        load_rows([long, *short]),
        load_rows([*short, long, long]),
        load_rows([*short, {**long, "answer": "4"}]),
        load_rows([*short, {**long, "prompt": "a c b " * 50}]),
        load_rows([*short, long], most=500),
    ]
    assert [len(loaded.prompts) for loaded in sets] == [2, 2, 2, 2, 2, 2, 3]
    assert len({loaded.fingerprint for loaded in sets}) == 7


def test_format_can_be_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "p.txt", ROWS)
    assert len(load(source, tokenizer, format="jsonl").prompts) == 3
    with pytest.raises(ValueError, match=r"p\.txt: .*\.jsonl.*set data\.format"):
        load(source, tokenizer)


def test_real_evaluation_sets(shared_data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def answers(name: str, **columns: str) -> list[tuple[str, ...] | None]:
        loaded = load(shared_data / name, tokenizer, max_prompt_tokens=100_000, **columns)
        return [prompt.answer for prompt in loaded.prompts]

    gsm8k = answers("gsm8k/test.jsonl", prompt_column="question")
    assert len(gsm8k) == 1319 and gsm8k[0] == ("18",)
    assert len(answers("math500/test.json")) == 500
    columns = {"prompt_column": "question", "answer_column": "final_answer"}
    assert len(answers("olympiadbench/test.jsonl", **columns)) == 675


# ---------------------------------------------------------------- without answers

NOTHING = "no such column"


def write_source(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A source in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def rows_with(answers: list[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": str(i)}], "level": i}
        | ({} if answer is NOTHING else {"answer": answer})
        for i, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "hf"])
@pytest.mark.parametrize("missing", [NOTHING, None, "", " ", []], ids=repr)
def test_answers_are_in_all_rows_or_in_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, missing: Any
) -> None:
    source = write_source(tmp_path / name, rows_with([missing, missing]))
    loaded = load(source, tokenizer, needs_answers=False)
    assert [prompt.answer for prompt in loaded.prompts] == [None, None]
    with pytest.raises(ValueError, match=r"'answer'.* or set data\.answer_column=null for no"):
        load(source, tokenizer)
    with pytest.raises(ValueError, match=r"'answer'.*evaluation needs .*evaluation\.sets\.x\.ans"):
        load(source, tokenizer, section="evaluation.sets.x")


@pytest.mark.parametrize("missing", [NOTHING, None, "", []], ids=repr)
@pytest.mark.parametrize("is_first", [True, False])
def test_answers_in_some_rows_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, missing: Any, is_first: bool
) -> None:
    answers = [missing, "1"] if is_first else ["1", missing]
    source = write_source(tmp_path / "p.jsonl", rows_with(answers))
    row, other = (1, 2) if is_first else (2, 1)
    message = rf"p\.jsonl:{row}: .*'answer'.*p\.jsonl:{other} has an answer.*answer_column=null"
    with pytest.raises(ValueError, match=message):
        load(source, tokenizer, needs_answers=False)
    with pytest.raises(ValueError, match=rf"p\.jsonl:{row}: .*fill it in.*answer_column=null"):
        load(source, tokenizer)
    assert len(load(source, tokenizer, answer_column=None).prompts) == 2


def test_answers_in_some_files_of_a_folder_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_source(tmp_path / "f" / "a.parquet", rows_with(["1"]))
    write_source(tmp_path / "f" / "b.parquet", rows_with([NOTHING]))
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: .*a\.parquet, row 1 has an answer"):
        load(tmp_path / "f", tokenizer, needs_answers=False)
    with pytest.raises(
        ValueError, match=r"b\.parquet: .*'answer'; the columns are .*'level'; fill"
    ):
        load(tmp_path / "f", tokenizer)


# ---------------------------------------------------------------- bad input

GOOD_LINE = b'{"prompt": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "answer"\n', "broken JSON"),
        (b'{"prompt": "caf\xe9", "answer": "1"}\n', "not valid UTF-8"),
        (b'{"prompt": "\\ud800", "answer": "1"}\n', "not valid Unicode"),
        (b'"text"\n', "expected an object"),
        (b'{"question": "p", "answer": "1"}\n', "no value in the column 'prompt'.*'question'"),
        (b'{"prompt": null, "answer": "1"}\n', "no value in the column 'prompt'"),
        (b'{"prompt": "  ", "answer": "1"}\n', "'prompt' is empty"),
        (b'{"prompt": 5, "answer": "1"}\n', "holds int, not text"),
        (b'{"prompt": [], "answer": "1"}\n', "empty list of messages"),
        (b'{"prompt": ["hello"], "answer": "1"}\n', "role and content"),
        (b'{"prompt": [{"role": "user"}], "answer": "1"}\n', "content holds NoneType"),
        (b'{"prompt": "p"}\n', "no value in the column 'answer'"),
        (b'{"prompt": "p", "answer": ""}\n', "'answer' is empty"),
        (b'{"prompt": "p", "answer": true}\n', "holds a boolean"),
        (b'{"prompt": "p", "answer": []}\n', "empty list of answers"),
        (b'{"prompt": "p", "answer": "so ####"}\n', "nothing after ####"),
    ],
)
def test_broken_line_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: bytes, message: str
) -> None:
    source = tmp_path / "p.jsonl"
    source.write_bytes(GOOD_LINE + b"\n" + line)  # an empty line counts, but is no row
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{message}"):
        load(source, tokenizer)


def test_template_that_refuses_a_role_is_named_with_the_line(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    template = "{{ raise_exception('no such role') }}"
    strict = load_tokenizer(write_tokenizer(tmp_path / "t", chat_template=template))
    source = write_jsonl(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: the chat template fails: no such role"):
        load(source, strict)


def test_byte_order_mark_is_no_part_of_the_first_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tmp_path / "p.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE)
    assert len(load(source, tokenizer).prompts) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": "p", "answer": 1},\n {"prompt"]', r"p\.json:2: broken JSON"),
        (b'[{"prompt": "p"},\n {"prompt": "\xe9"}]', r"p\.json:2: not valid UTF-8"),
        (b'[{"prompt": "p", "answer": 1}, {"answer": 1}]', r"p\.json, entry 2: no value"),
        (b"[]", r"p\.json: no prompts: it is empty"),
        (b"", r"p\.json: no prompts: it is empty"),
    ],
)
def test_broken_json_array_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes, message: str
) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "p.json", tokenizer)


def test_unusable_sources_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl", tokenizer)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match=r"p\.parquet: cannot be read as parquet"):
        load(tmp_path / "p.parquet", tokenizer)
    table = pyarrow.Table.from_pylist([{"question": "p", "answer": "1"}])
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet: .*'prompt'; the columns are 'question'"):
        load(tmp_path / "q.parquet", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: the folder holds no files; .*\.parquet"):
        load(tmp_path / "empty", tokenizer)
    with pytest.raises(ValueError, match="empty: cannot be read as a dataset folder"):
        load(tmp_path / "empty", tokenizer, format="hf")
    with pytest.raises(ValueError, match="empty: the folder holds no jsonl files"):
        load(tmp_path / "empty", tokenizer, format="jsonl")


def test_null_in_parquet_is_named_by_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": None, "answer": "1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet, row 2: no value in the column 'prompt'"):
        load(tmp_path / "p.parquet", tokenizer)


# ---------------------------------------------------------------- order


def test_order_visits_each_prompt_once_per_epoch() -> None:
    order = PromptOrder(num_prompts=7, seed=3, shuffle=True)
    epochs = [order.indices(7 * epoch, 7) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != PromptOrder(num_prompts=7, seed=4, shuffle=True).indices(0, 7)


def test_order_continues_from_any_position() -> None:
    whole = PromptOrder(num_prompts=5, seed=0, shuffle=True).indices(0, 23)
    for start in range(20):
        assert (
            PromptOrder(num_prompts=5, seed=0, shuffle=True).indices(start, 3)
            == (whole[start : start + 3])
        )


def test_order_is_pinned() -> None:
    # Known values: a resumed run must visit the same prompts with another version of anything.
    assert PromptOrder(num_prompts=5, seed=0, shuffle=True).indices(0, 10) == [
        *(3, 2, 1, 4, 0),
        *(4, 0, 1, 2, 3),
    ]


def test_unshuffled_order_is_that_of_the_source() -> None:
    assert PromptOrder(3, 0, shuffle=False).indices(2, 5) == [2, 0, 1, 2, 0]
