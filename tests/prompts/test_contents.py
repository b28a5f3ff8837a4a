"""What the text of a source means: compression, encodings, CSV, nested columns, labels, numbers."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from tests.prompts.sources import load, write_jsonl


def gz(content: bytes) -> bytes:
    """Without the time, so that each process that collects tests sees the same ones."""
    return gzip.compress(content, mtime=0)


ROWS = [{"prompt": f"numbers {i}", "answer": str(i)} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)
MARK = b"\xef\xbb\xbf"


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# A file's name and content that hold ROWS.
FILES: tuple[tuple[str, bytes], ...] = (
    ("p.jsonl.gz", gz(LINES.encode())),
    ("p.json.gz", gz(json.dumps(ROWS).encode())),
    ("p.ndjson.zst", zstd(LINES.encode())),
    ("p.csv.zst", zstd(CSV.encode())),
    ("p.tsv.gz", gz(CSV.replace(",", "\t").encode())),
    ("p.jsonl.gz", gz(LINES[:20].encode()) + gz(LINES[20:].encode())),
    ("p.jsonl.zst", zstd(LINES[:20].encode()) + zstd(LINES[20:].encode())),
    # A frame to skip comes first in what pzstd writes.
    ("p.jsonl.zst", bytes.fromhex("502a4d180400000000000000") + zstd(LINES.encode())),
    ("p.jsonl.gz", LINES.encode()),  # as browsers leave what they have decompressed
    ("p.jsonl", gz(LINES.encode())),
    ("p.JSONL", LINES.encode()),
    ("p.jsonl", MARK + LINES.encode()),
    ("p.jsonl", LINES.replace("\n", "\r\n").encode()),
    ("p.jsonl", LINES.rstrip().encode()),
    ("p.json", MARK + json.dumps(ROWS, indent=1).encode()),
    ("p.json", b"\n \n" + json.dumps(ROWS, indent=1).encode() + b"\n\n"),
    ("p.json.gz", gz(MARK + json.dumps(ROWS).encode())),
    ("p.csv", MARK + CSV.encode()),
    ("p.csv", CSV.replace("\n", "\r\n").encode() + b"\r\n\r\n"),
    ("p.tsv", CSV.replace(",", "\t").encode()),
)


@pytest.mark.parametrize(("name", "content"), FILES, ids=lambda value: repr(value)[:40])
def test_compressions_and_encodings_hold_the_same_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes
) -> None:
    expected = load(write_jsonl(tmp_path / "expected" / "p.jsonl", ROWS), tokenizer)
    (tmp_path / name).write_bytes(content)
    assert load(tmp_path / name, tokenizer) == expected


def row_of(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_is_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'answer,prompt,note\n00012,"a ""b"", c\nd",\n1e5,x,1\n'
    loaded = load(row_of(tmp_path / "p.csv", text), tokenizer, apply_chat_template=False)
    assert [prompt.answer for prompt in loaded.prompts] == [("00012",), ("1e5",)]
    assert tokenizer.decode(loaded.prompts[0].token_ids) == 'a "b", c\nd'
    long = f'prompt,answer\n"{"a" * 200_000}",1\n'
    path = row_of(tmp_path / "long.csv", long)
    assert len(load(path, tokenizer, max_prompt_tokens=10**6).prompts) == 1


MISSING_WORDS = (
    *("nan", "-nan", "NaN", "-NaN", "NA", "<NA>", "N/A", "n/a", "#NA", "#N/A", "null", "NULL"),
    *("None", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "#N/A N/A"),
)


def test_words_for_missing_values_are_refused_in_csv(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """`load_dataset` reads them as null."""
    content = "prompt,answer\n" + "".join(f'{w},"{w}"\n' for w in MISSING_WORDS) + "b,4\n"
    source = row_of(tmp_path / "all.csv", content)
    read = datasets.load_dataset("csv", data_files=str(source), cache_dir=str(tmp_path / "cache"))
    assert {value for row in read["train"].to_list()[:-1] for value in row.values()} == {None}
    for word in (*MISSING_WORDS, " nan "):
        for name, cells in (("answer", f'a,"{word}"'), ("prompt", f'"{word}",4')):
            source = row_of(tmp_path / "p.csv", f"prompt,answer,x\nb,1,None\n{cells},2\n")
            message = rf"p\.csv:3: column '{name}' holds '{word}', .* missing value; .* JSON Lines"
            with pytest.raises(ValueError, match=message):
                load(source, tokenizer, needs_answers=False)
    rows = [{"prompt": "p", "answer": "None"}]
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer).prompts
    assert prompt.answer == ("None",)


# A file's name and content, and what is said of it.
BROKEN: tuple[tuple[str, str | bytes, str], ...] = (
    ("p.csv", "prompt,answer\na,1\n\nb\n", r"p\.csv:4: 1 cells, but the first line names 2"),
    ("p.csv", 'prompt,answer\n"a\nb",1\nc,2,3\n', r"p\.csv:4: 3 cells"),
    ("p.csv", 'prompt,answer\na,1\n"b,1\n', r"p\.csv:3: broken CSV"),
    ("p.csv", "prompt,answer\na,\n", r"p\.csv:2: no value in the column 'answer'"),
    ("p.csv", "question,answer\na,1\n", r"p\.csv: .*'prompt'; the columns are 'question', 'ans"),
    ("p.csv", "prompt;answer\na;1\n", r"p\.csv: .*'prompt'; the columns are 'prompt;answer'"),
    ("p.csv", "prompt,answer,answer\na,1,2\n", r"p\.csv: two columns are called 'answer'"),
    ("p.csv", b"prompt,answer\na,1\n\xe9,2\n", r"p\.csv:3: not valid UTF-8"),
    ("p.csv", "prompt,answer\na,1\n".encode("utf-16"), r"p\.csv:1: .* is UTF-16; save .* UTF-8"),
    ("p.jsonl", LINES.encode("utf-16"), r"p\.jsonl:1: not valid UTF-8: it is UTF-16"),
    ("p.csv", "", r"p\.csv: no prompts: it is empty"),
    ("p.jsonl.gz", gz(LINES.encode() * 99)[:-20], r"gz: cannot be decompressed \(gzip"),
    ("p.jsonl.zst", zstd(LINES.encode() * 99)[:-3], r"zst: cannot be decompressed \(zstd"),
    (
        "p.jsonl",
        '{"prompt": "p", "answer": "1", "prompt": "q"}',
        r"l:1: the key 'prompt' stands tw",
    ),
    (
        "p.jsonl",
        '{"prompt": "p", "answer": "1", "x": {"a": 1, "a": 1}}',
        r"l:1: the key 'a' stands",
    ),
    ("p.json", '[{"prompt": "p", "answer": 1}, {"a": 1, "a": 2}]', r"n, entry 2: the key 'a' st"),
    ("p.json", '[{"prompt": "p", "answer": 1},]', r"p\.json:1: broken JSON"),
    ("p.json", '[{"prompt": "p", "answer": 1}\n{"a": 1}]', r"p\.json:2: .*expected , or \]"),
    ("p.json", '[{"prompt": "p", "answer": 1}]\n[1]', r"p\.json:2: .*more behind the array"),
    ("p.json", '[{"prompt": "p", "answer": 1}', r"p\.json:1: broken JSON"),
    ("p.jsonl", '{"prompt": ' + "[" * 100_000, r"p\.jsonl:1: nested too deeply"),
    (
        "p.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        r"p\.jsonl: is a Git-LFS pointer.*git lfs pull",
    ),
    ("p.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
)


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=lambda value: repr(value)[:40])
def test_broken_file_is_named(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    content: str | bytes,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        load(row_of(tmp_path / name, content), tokenizer)


# ---------------------------------------------------------------- no numbers


@pytest.mark.parametrize("needs_answers", [True, False])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '["1", NaN]'])
def test_what_is_no_number_is_no_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: str, needs_answers: bool
) -> None:
    lines = f'{{"prompt": "p", "answer": {value}}}\n' * 2
    with pytest.raises(ValueError, match=r"p\.jsonl:1: column 'answer' holds -?(nan|inf), which"):
        load(row_of(tmp_path / "p.jsonl", lines), tokenizer, needs_answers=needs_answers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_in_tables(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    table = pyarrow.table({"prompt": ["p", "q"], "answer": pyarrow.array([1.0, value])})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "hf"))
    for name in ("p.parquet", "hf"):
        with pytest.raises(ValueError, match=rf"{name}, row 2: column 'answer' holds -?(nan|inf)"):
            load(tmp_path / name, tokenizer)


def test_prompt_that_is_no_number_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = row_of(tmp_path / "p.jsonl", '{"prompt": NaN, "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: column 'prompt' holds float, not text"):
        load(source, tokenizer)


# ---------------------------------------------------------------- nested columns

NESTED = [
    {
        "extra_info": {"question": f"sum {i}", "level": {"number": i}},
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "a.b": "literal",
        "a": {"b": "inside", "b.c": {"d": "deep"}},
    }
    for i in range(2)
]


def write_nested(path: Path) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, NESTED)
    if path.suffix == ".json":
        return row_of(path, json.dumps(NESTED))
    table = pyarrow.Table.from_pylist(NESTED)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "hf"])
def test_nested_columns_are_named_with_dots(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    source = write_nested(tmp_path / name)

    def read(prompt: str, answer: str, response: str) -> tuple[Any, ...]:
        columns = {"prompt_column": prompt, "answer_column": answer, "response_column": response}
        (_, second) = load(source, tokenizer, apply_chat_template=False, **columns).prompts
        assert second.response_ids is not None
        return (
            tokenizer.decode(second.token_ids),
            second.answer,
            tokenizer.decode(second.response_ids),
        )

    columns = ("extra_info.question", "reward_model.ground_truth", "extra_info.question")
    assert read(*columns) == ("sum 1", ("1",), "sum 1")
    assert read("a.b", "extra_info.level.number", "a.b.c.d") == ("literal", ("1",), "deep")
    known = r"'extra_info\.question', 'extra_info\.level\.number', 'reward_model\.style'"
    for wrong in ("extra_info.answer", "extra_info.question.x", "prompt", "extra_info."):
        with pytest.raises(ValueError, match=rf"no value in the column '{wrong}'; .* {known}"):
            read(wrong, *columns[1:])
        with pytest.raises(ValueError, match=rf"no value in the column '{wrong}'; .* {known}"):
            read(columns[0], wrong, columns[2])
    with pytest.raises(ValueError, match="holds one object with the keys 'question', 'level'"):
        read("extra_info", *columns[1:])


# ---------------------------------------------------------------- class labels


def test_class_labels_are_their_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": label,
            "several": datasets.List(label),
            "inside": {"label": label, "of_rows": [{"label": label}]},
        }
    )
    rows = [
        {
            "prompt": "p",
            "answer": i,
            "several": [i, 1 - i],
            "inside": {"label": i, "of_rows": [{"label": i}]},
        }
        for i in (0, 1)
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "hf"))
    dataset.to_parquet(str(tmp_path / "p.parquet"))
    for name in ("hf", "p.parquet"):
        for column, expected in (
            ("answer", [("no",), ("yes",)]),
            ("several", [("no", "yes"), ("yes", "no")]),
            ("inside.label", [("no",), ("yes",)]),
        ):
            loaded = load(tmp_path / name, tokenizer, answer_column=column)
            assert [prompt.answer for prompt in loaded.prompts] == expected, (name, column)


@pytest.mark.parametrize(
    ("number", "message"), [(-1, "no value in the column 'answer'"), (2, "2 is no class label")]
)
def test_number_without_a_label_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, number: int, message: str
) -> None:
    names = datasets.Features({"answer": datasets.ClassLabel(names=["no", "yes"])})
    table = pyarrow.table({"prompt": ["p"], "answer": pyarrow.array([number], pyarrow.int64())})
    table = table.replace_schema_metadata(names.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=rf"p\.parquet, row 1: {message}"):
        load(tmp_path / "p.parquet", tokenizer)


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["answer"]])
def test_format_of_a_saved_dataset_changes_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format: str, columns: list[str] | None
) -> None:
    rows = [{"prompt": [{"role": "user", "content": "19+23"}], "answer": [i, i]} for i in range(2)]
    expected = load(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer)
    dataset = datasets.Dataset.from_list(rows).with_format(format, columns=columns)
    dataset.save_to_disk(str(tmp_path / "hf"))
    assert load(tmp_path / "hf", tokenizer) == expected


def test_categories_of_pandas_are_their_values(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers = pyarrow.array(["no", "yes", "no"]).dictionary_encode()
    table = pyarrow.table({"prompt": ["p"] * 3, "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    loaded = load(tmp_path / "p.parquet", tokenizer)
    assert [prompt.answer for prompt in loaded.prompts] == [("no",), ("yes",), ("no",)]
