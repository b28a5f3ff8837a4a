"""Which files of a source are read: splits, formats, and what a folder says about itself."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from tests.prompts.sources import load, write_jsonl
from trb_megatron.prompts.files import find_files

SHARD = "-00000-of-00001.parquet"
SHARDS = tuple(f"-0000{number}-of-00003-{number}ab.parquet" for number in range(3))
MISSES_ONE = (
    r"!has 2 of 3 files data/train-\*-of-00003; data/train-00001-of-00003 is not there; fetch .*"
    r" or name a file in data\.path"
)

# Files of a folder, the split that is asked for, and those that training reads, or what it says.
FOLDERS: tuple[tuple[str, str | None, str], ...] = (
    ("train.jsonl test.jsonl", None, "train.jsonl"),
    ("train.jsonl test.jsonl", "test", "test.jsonl"),
    ("Train.jsonl Test.jsonl", None, "Train.jsonl"),
    ("gsm8k_train.csv gsm8k_test.csv", None, "gsm8k_train.csv"),
    ("train-1.jsonl train-2.jsonl validation.jsonl", None, "train-1.jsonl train-2.jsonl"),
    ("train.jsonl.gz dev.jsonl.gz", None, "train.jsonl.gz"),
    (f"data/train{SHARD} data/test{SHARD}", None, f"data/train{SHARD}"),
    (
        f"data/train_sft{SHARD} data/test_sft{SHARD}",
        None,
        "!splits test_sft, train_sft; .*data.split",
    ),
    (f"data/train_sft{SHARD} data/test_sft{SHARD}", "train_sft", f"data/train_sft{SHARD}"),
    ("train/a.jsonl train/b.jsonl test/a.jsonl", None, "train/a.jsonl train/b.jsonl"),
    ("valid/a.jsonl test/a.jsonl", None, "!has the splits validation, test; .*data.split"),
    ("train.jsonl test.jsonl", "dev", "!has no split dev, but train, test; .*data.split"),
    ("a.jsonl b.jsonl", None, "a.jsonl b.jsonl"),
    ("latest.jsonl contest.jsonl", None, "contest.jsonl latest.jsonl"),
    ("trainer.jsonl tested.jsonl", None, "tested.jsonl trainer.jsonl"),
    ("a.jsonl README.md LICENSE .hidden.jsonl .cache/b.jsonl __x/c.jsonl", None, "a.jsonl"),
    ("a.jsonl dataset_info.json config.json x.txt b.arrow c", None, "a.jsonl"),
    ("train-1.jsonl train-2.jsonl.xz", None, r"!train-2\.jsonl\.xz: belongs to .* train, but its"),
    ("train-1.jsonl train-2.jsonl.1", None, r"!train-2\.jsonl\.1: .*kind cannot be read; .*\.csv"),
    ("a.csv b.csv.zip", None, r"!b\.csv\.zip: .*: convert or remove it, or name a file in data"),
    ("a.parquet b.PARQUET.part", None, r"!b\.PARQUET\.part: belongs to the split train"),
    ("train.jsonl test.jsonl.bz2", None, "train.jsonl"),
    ("a.jsonl.xz", None, r"!a\.jsonl\.xz: belongs to the split train, but its kind"),
    (f"data/train{SHARDS[0]} data/train{SHARDS[2]}", None, MISSES_ONE),
    (f"data/train{SHARDS[2]} data/train{SHARDS[1]}", None, "!train-00000-of-00003 is not there"),
    (
        " ".join(f"data/train{shard}" for shard in SHARDS),
        None,
        "data/train" + " data/train".join(SHARDS),
    ),
    (
        "a-00001-of-00002.jsonl a-00002-of-00002.jsonl",
        None,
        "a-00001-of-00002.jsonl a-00002-of-00002.jsonl",
    ),
    ("x/a-00000-of-00002.jsonl y/b.jsonl", None, "!has 1 of 2 files x/a-.*; x/a-00001-of-00002 is"),
    (f"data/test{SHARDS[0]} data/train{SHARD}", None, f"data/train{SHARD}"),
    ("train.jsonl test.csv", None, "train.jsonl"),
    ("train.jsonl train.csv", None, r"!\.csv, \.jsonl\).* the same rows; .* or set data\.format"),
    ("a.jsonl a.jsonl.gz", None, r"!files of several kinds \(\.jsonl, \.jsonl\.gz\)"),
    ("train/test.jsonl train/b.jsonl", None, "train/b.jsonl train/test.jsonl"),
    (
        "train_test.jsonl test.jsonl",
        None,
        "!train_test.jsonl: belongs to the splits train and test",
    ),
    ("notes.txt", None, r"!holds no files; those read end in .*\.csv.*\.zst.*\.parquet"),
)


def make_files(folder: Path, names: str) -> Path:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("names", "split", "expected"), FOLDERS)
def test_folder_is_read_as_load_dataset_would(
    tmp_path: Path, names: str, split: str | None, expected: str
) -> None:
    folder = make_files(tmp_path, names)
    if expected.startswith("!"):
        with pytest.raises(ValueError, match=expected[1:]):
            find_files(folder, "auto", "data", split, "train")
        return
    found = find_files(folder, "auto", "data", split, "train").files
    assert [file.relative_to(folder).as_posix() for file in found] == expected.split()


def test_problems_are_of_a_split_that_is_named(tmp_path: Path) -> None:
    section = "evaluation.sets.x"
    folder = make_files(tmp_path, "train.jsonl test.jsonl")
    with pytest.raises(ValueError, match=r"splits train, test; .*by evaluation\.sets\.x\.split"):
        find_files(folder, "auto", section)
    assert find_files(folder, "auto", section, "test").files == (folder / "test.jsonl",)
    with pytest.raises(ValueError, match=r"test\.jsonl: is a file, .*leave out .*x\.split"):
        find_files(folder / "test.jsonl", "auto", section, "test")


def test_format_chooses_among_files_of_several(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "train.jsonl train.csv train.parquet")
    for format, name in (("jsonl", "train.jsonl"), ("csv", "train.csv")):
        assert find_files(folder, format, "data").files == (folder / name,)


@pytest.mark.parametrize(
    "name", ["p.xlsx", "p.txt", "p", "p.jsonl.bz2", "p.parquet.gz", "p.arrow", "p.json.zip"]
)
def test_other_files_are_refused_with_what_can_be_read(tmp_path: Path, name: str) -> None:
    make_files(tmp_path, name)
    with pytest.raises(ValueError, match=rf"{name}: cannot tell .*\.jsonl.*\.tsv.*\.gz or \.zst"):
        find_files(tmp_path / name, "auto", "data")


def test_random_folders_are_those_of_the_datasets_library(tmp_path: Path) -> None:
    """Every split has the files that `load_dataset` gives it, or the folder is refused."""
    random_ = random.Random(0)
    words = [
        "train",
        "training",
        "test",
        "eval",
        "dev",
        "val",
        "valid",
        "latest",
        "trainer",
        "part",
    ]
    num_read = 0
    for number in range(70):
        folder = tmp_path / str(number)
        for _ in range(random_.randint(1, 5)):
            depth = random_.choice((0, 0, 1, 2))
            parts = [random_.choice(words) for _ in range(depth + 1)]
            parts[-1] += random_.choice(("", "-00000-of-00001", "_set", "1", " x")) + ".jsonl"
            parts[-1] += random_.choice(("", "", "", "", "", ".bak", ".1"))
            if random_.random() < 0.2:
                parts.insert(0, "data")
            write_jsonl(folder.joinpath(*parts), [{"prompt": "p"}])
        builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache"))
        for split, names in builder.config.data_files.items():
            try:
                found = find_files(folder, "auto", "data", str(split)).files
            except ValueError as error:
                is_odd = any(not name.endswith(".jsonl") for name in names)
                assert "belongs to the splits" in str(error) or is_odd, (split, names)
            else:
                # It lists a file twice that two of its patterns match.
                assert set(map(str, found)) == set(map(str, names)), split
                num_read += 1
    assert num_read > 45


# ---------------------------------------------------------------- what a folder says itself


def write_readme(folder: Path, configs: Any) -> None:
    text = json.dumps({"license": "mit", "configs": configs})
    (folder / "README.md").write_text(f"---\n{text}\n---\n# Data\n")


def test_readme_declares_the_splits(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "main/a.parquet main/b.parquet socratic/a.parquet")
    of_main = {
        "config_name": "main",
        "data_files": [
            {"split": "train", "path": "main/a*"},
            {"split": "test", "path": ["main/b.parquet"]},
        ],
    }
    write_readme(folder, [of_main])
    source = find_files(folder, "auto", "data", None, "train")
    assert source.files == (folder / "main" / "a.parquet",)
    assert source.unread == (folder / "socratic" / "a.parquet",)
    assert find_files(folder, "auto", "data", "test").files == (folder / "main" / "b.parquet",)

    other = {"config_name": "socratic", "data_files": "socratic/*.parquet"}
    write_readme(folder, [of_main, other])
    with pytest.raises(ValueError, match=r"README\.md: .*several: main, socratic\).*name a file"):
        find_files(folder, "auto", "data")
    write_readme(folder, [of_main, {**other, "default": True}])
    assert find_files(folder, "auto", "data").files == (folder / "socratic" / "a.parquet",)
    write_readme(folder, [{"config_name": "main", "data_dir": "main"}])
    assert [file.name for file in find_files(folder, "auto", "data").files] == [
        "a.parquet",
        "b.parquet",
    ]
    twice = [{"split": "train", "path": path} for path in ("main/a*", "main/b*")]
    for broken in (
        *("text", [{}], ["x"], [3]),
        [{"config_name": "x", "data_files": twice}],
        [{"config_name": "x", "data_files": ""}],
        [{"config_name": "x", "data_files": "/main/*"}],
    ):
        write_readme(folder, broken)
        with pytest.raises(ValueError, match=r"README\.md: .*which files to read.*; name a file"):
            find_files(folder, "auto", "data")
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: broken YAML"):
        find_files(folder, "auto", "data")


SHARDED = "a-00000-of-00002.jsonl a-00001-of-00002.jsonl b-00000-of-00002.jsonl c.csv d.jsonl.xz"

# Patterns of README.md for the split train, and what is read, or said.
PATTERNS: tuple[tuple[list[str], str], ...] = (
    (["a*"], "a-00000-of-00002.jsonl a-00001-of-00002.jsonl"),
    (["a-00001*", "a*"], "a-00001-of-00002.jsonl a-00000-of-00002.jsonl"),
    (["d*"], r"!d\.jsonl\.xz: belongs to the split train, but its kind"),
    (["sub/**"], "sub/e.jsonl sub/f/g.jsonl"),
    (["c.csv"], "c.csv"),
    (["b-00000-of-00002.jsonl"], "b-00000-of-00002.jsonl"),
    (["b*"], "!has 1 of 2 files b-.*-of-00002; b-00001-of-00002 is not there; fetch"),
    (["a*", "x*"], r"!README\.md names x\*, but it is not there; fetch what is missing, or name"),
    (["a-00000-of-00002.jsonl", "gone.jsonl"], r"!README\.md names gone\.jsonl, but it is not"),
    (["gone/*"], r"!README\.md names gone/\*, but it is not there"),
    (["sub"], r"!README\.md names sub, but it is not there"),
    (["d.jsonl.xz"], r"!d\.jsonl\.xz: belongs to .*, but its kind cannot be read"),
    (["notes.txt"], r"!notes\.txt: belongs to .*, but its kind cannot be read"),
)


@pytest.mark.parametrize("before", ["---\n", "\ufeff---\n", "\n \n---\n", "\r\n---\r\n"])
@pytest.mark.parametrize(("patterns", "expected"), PATTERNS, ids=str)
def test_all_that_the_readme_names_is_there(
    tmp_path: Path, before: str, patterns: list[str], expected: str
) -> None:
    folder = make_files(tmp_path, f"{SHARDED} sub/e.jsonl sub/f/g.jsonl notes.txt")
    files = [{"split": "train", "path": patterns}, {"split": "test", "path": "no/such/*"}]
    configs = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
    (folder / "README.md").write_bytes(f"{before}{configs}\n---\n# x\n".encode())
    if expected.startswith("!"):
        with pytest.raises(ValueError, match=expected[1:]):
            find_files(folder, "auto", "data", None, "train")
        return
    found = find_files(folder, "auto", "data", None, "train")
    assert [file.relative_to(folder).as_posix() for file in found.files] == expected.split()
    assert found.splits == ("train", "test")
    with pytest.raises(ValueError, match=r"README\.md names no/such/\*, but it is not there"):
        find_files(folder, "auto", "data", "test")


def test_saved_dataset_of_several_splits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def make(prompt: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": prompt, "answer": "1"}])

    folder = tmp_path / "hf"
    datasets.DatasetDict(train=make("a"), test=make("b")).save_to_disk(str(folder))

    def prompts(path: Path, **options: Any) -> list[str]:
        loaded = load(path, tokenizer, apply_chat_template=False, **options).prompts
        return [tokenizer.decode(prompt.token_ids) for prompt in loaded]

    assert prompts(folder, default_split="train") == prompts(folder / "train") == ["a"]
    assert prompts(folder, split="test") == prompts(folder / "test") == ["b"]
    with pytest.raises(ValueError, match=r"hf: has the splits train, test; .*data\.split"):
        load(folder, tokenizer)
    with pytest.raises(ValueError, match=r"train: is one dataset, without splits; leave out"):
        load(folder / "train", tokenizer, split="train")
    with pytest.raises(ValueError, match="train: no value in the column 'question'"):
        load(folder / "train", tokenizer, prompt_column="question")
    (folder / "train" / "state.json").unlink()
    assert prompts(folder, split="test") == ["b"]
    for path in (folder, folder / "train"):
        (path / "state.json").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"hf: dataset_dict\.json names the split train, but it is"
    ):
        load(folder, tokenizer, default_split="train")


def test_summary_says_what_was_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": f"numbers {i}", "answer": str(i)} for i in range(3)]
    for name in ("train-1", "train-2", "test", "other"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    make_files(tmp_path, "train.arrow README.md dataset_infos.json")
    loaded = load(tmp_path, tokenizer, prompt_column="question", default_split="train")
    assert loaded.summary == (
        f"6 rows of {tmp_path} (2 files: train-1.jsonl, train-2.jsonl; split train, not test; "
        "2 not read: other.jsonl, train.arrow), columns question, answer"
    )
    tail = "'<|im_start|>user\\nnumbers 0<|im_end|>\\n<|im_start|>assistant\\n'"
    tokens = len(loaded.prompts[0].token_ids)
    assert loaded.describe_first() == f"first prompt, {tokens} tokens: {tail}"
    one = load(tmp_path / "test.jsonl", tokenizer, prompt_column="question", answer_column=None)
    assert one.summary == f"3 rows of {tmp_path / 'test.jsonl'}, columns question"
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "sum " * 90 + "\u202e", "answer": 1}])
    described = load(long, tokenizer).describe_first()
    assert ": ...'" in described and "\\u202e<|im_end|>" in described and "\n" not in described
    assert len(described) < 260
