"""Answers that are numbers, and texts whose backslashes were lost on the way."""

import csv
import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from trb_megatron.huggingface.tokenizer import load_tokenizer
from trb_megatron.prompts.records import Columns
from trb_megatron.prompts.source import PromptSet, PromptSource, load_prompts


@pytest.fixture(scope="module")
def tokenizer(
    write_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


Load = Callable[..., PromptSet]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Load:
    """Load a file, or the text of a JSON Lines file."""

    def read(
        source: Path | str, system_prompt: str | None = None, answer: str = "answer"
    ) -> PromptSet:
        if isinstance(source, str):
            (tmp_path / "p.jsonl").write_text(source)
            source = tmp_path / "p.jsonl"
        return load_prompts(
            PromptSource(
                path=source,
                format="auto",
                columns=Columns("prompt", answer, None),
                system_prompt=system_prompt,
                apply_chat_template=True,
                max_prompt_tokens=500,
            ),
            tokenizer,
        )

    return read


def read_answers(load: Load, spellings: list[str]) -> list[str]:
    rows = "".join(f'{{"prompt": "p", "answer": {spelling}}}\n' for spelling in spellings)
    return [answer for prompt in load(rows).prompts for answer in prompt.answer or ()]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("spelling", "answer"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("3.2E-5", "0.000032"),
        ("1e+16", "10000000000000000.0"),
        ("6.02e23", "602000000000000000000000.0"),
        ('"6.02e23"', "6.02e23"),
        ("1e400", "1" + "0" * 400 + ".0"),
        ("9007199254740993", "9007199254740993"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("2.0", "2.0"),
        ("1.50", "1.50"),
        ("-0.0", "-0.0"),
        ("[0.00001]", "0.00001"),
    ],
)
def test_json_numbers_are_read_as_they_are_written(load: Load, spelling: str, answer: str) -> None:
    assert read_answers(load, [spelling]) == [answer]


def test_json_numbers_keep_their_value_and_have_no_exponent(load: Load) -> None:
    random = Random(1)
    spellings = [
        f"{random.uniform(-1, 1):.{random.randrange(1, 25)}e}"[:-3] + f"{random.randrange(-99, 99)}"
        for _ in range(200)
    ] + [str(random.randrange(-(10**60), 10**60)) for _ in range(50)]
    answers = read_answers(load, spellings)
    assert not any("e" in answer.lower() for answer in answers)
    assert list(map(Fraction, answers)) == list(map(Fraction, spellings))


def test_numbers_of_columns_have_the_fewest_digits(load: Load, tmp_path: Path) -> None:
    columns = {
        "float64": ([0.00001, 0.1, 1e22, 1234567.125, 0.1 + 0.2, 2.0**50], pyarrow.float64()),
        "float16": ([0.1, 3.0], pyarrow.float16()),
        "float32": ([0.00001, 0.1, 16777216.0, 1e10, 4194304.5], pyarrow.float32()),
        "decimal": ([Decimal("0.00001"), Decimal("14.00"), Decimal(7)], pyarrow.decimal128(20, 5)),
        "int64": ([9007199254740993, -1], pyarrow.int64()),
        "lists": ([[0.00001, 0.5]], pyarrow.list_(pyarrow.float32())),
    }
    answers = {}
    for name, (values, kind) in columns.items():
        table = {
            "prompt": pyarrow.array(["p"] * len(values)),
            "answer": pyarrow.array(values, type=kind),
        }
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        answers[name] = [a for prompt in load(path).prompts for a in prompt.answer or ()]
    assert answers == {
        "float64": [
            *("0.00001", "0.1", "1" + "0" * 22 + ".0", "1234567.125", "0.30000000000000004"),
            "1125899906842624.0",
        ],
        "float16": ["0.1", "3.0"],
        "float32": ["0.00001", "0.1", "16777216.0", "10000000000.0", "4194304.5"],
        "decimal": ["0.00001", "14.00000", "7.00000"],
        "int64": ["9007199254740993", "-1"],
        "lists": ["0.00001", "0.5"],
    }


FLOATS: dict[str, type[np.floating[Any]]] = {
    "halffloat": np.float16,
    "float": np.float32,
    "double": np.float64,
}
PLACES: dict[str, tuple[Callable[[pyarrow.DataType], pyarrow.DataType], Callable[[float], Any]]] = {
    "answer": (lambda kind: kind, lambda value: value),
    "list": (pyarrow.list_, lambda value: [value]),
    "pair": (lambda kind: pyarrow.list_(kind, 2), lambda value: [value, 0.5]),
    "info.answer": (lambda kind: pyarrow.struct([("answer", kind)]), lambda v: {"answer": v}),
    "several.x": (
        lambda kind: pyarrow.struct([("x", pyarrow.list_(kind))]),
        lambda value: {"x": [value]},
    ),
}


@pytest.mark.parametrize("format", ["parquet", "hf"])
@pytest.mark.parametrize("width", FLOATS)
def test_floats_are_those_of_their_column(
    load: Load, tmp_path: Path, width: str, format: str
) -> None:
    """Its bits give the number back, at any depth, and no digit of it can be left out."""
    number = FLOATS[width]
    random = np.random.default_rng(1)
    powers = [2.0**power for power in range(-12, 13)]
    if width != "halffloat":
        powers += [2.0**power for power in range(-120, 121 if width == "double" else 27)]
    drawn = [*random.standard_normal(60), *(random.standard_normal(60) * 1e-3), 0.1, 1 / 3]
    values = [float(number(value)) for value in [*powers, *drawn]]
    for place, (type_of, wrap) in PLACES.items():
        column = pyarrow.array(list(map(wrap, values)), type_of(pyarrow.type_for_alias(width)))
        table = pyarrow.table({"prompt": ["p"] * len(values), place.partition(".")[0]: column})
        path = tmp_path / f"{place}.{format}"
        if format == "hf":
            datasets.Dataset(table).save_to_disk(str(path))
        else:
            pyarrow.parquet.write_table(table, path)
        found = [(prompt.answer or ("",))[0] for prompt in load(path, answer=place).prompts]
        assert [number(answer) for answer in found] == values
        assert [float(answer) for answer in found] == [float(str(number(v))) for v in values]
        assert [float(answer) for answer, v in zip(found, values, strict=True) if v % 1 == 0] == [
            v for v in values if v % 1 == 0
        ]


@pytest.mark.parametrize(
    ("width", "value", "shortest"),
    [
        ("float", 2.0**30, "1073741800"),
        ("float", float(np.float32(1e11)), "100000000000"),
        ("halffloat", 65504.0, "65500"),
    ],
)
def test_whole_number_that_its_bits_cannot_tell_is_refused(
    load: Load, tmp_path: Path, width: str, value: float, shortest: str
) -> None:
    kind = pyarrow.type_for_alias(width)
    infos = pyarrow.struct([("answer", pyarrow.string()), ("other", kind)])
    table = pyarrow.table(
        {
            "prompt": ["p", "q"],
            "answer": pyarrow.array([1.0, value], kind),
            "info": pyarrow.array([{"answer": "1", "other": value}] * 2, infos),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    bits = {"float": 32, "halffloat": 16}[width]
    message = rf"p\.parquet, row 2: column 'answer' holds {value:.0f} in {bits} bits, which are .*"
    with pytest.raises(ValueError, match=rf"{message} of {shortest}, too; store the column as who"):
        load(tmp_path / "p.parquet")
    assert len(load(tmp_path / "p.parquet", answer="info.answer").prompts) == 2


# Texts, and the answers that they are.
SPELLED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('["5", "five"]', ("5", "five")),
    (' [\n "5"\n] ', ("5",)),
    ('["\\\\frac{1}{2}"]', (r"\frac{1}{2}",)),
    ('["5", 5.50, 1e3]', ("5", "5.50", "1000.0")),
    ('[5, "five"]', ("5", "five")),
    ('["so #### 7"]', ("7",)),
    ('["[\\"a\\"]"]', ('["a"]',)),
    ("[1, 2]", ("[1, 2]",)),
    ("[[1, 2], [3, 4]]", ("[[1, 2], [3, 4]]",)),
    ("[x, y)", ("[x, y)",)),
    ("[f'(x), 2]", ("[f'(x), 2]",)),
    ('["a", "b"', ('["a", "b"',)),
    ('"5"', ('"5"',)),
    ('{"a": "b"}', ('{"a": "b"}',)),
)


@pytest.mark.parametrize(("text", "answers"), SPELLED)
def test_list_of_answers_may_be_spelled_in_json(
    load: Load, tmp_path: Path, text: str, answers: tuple[str, ...]
) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], ["p", text]])
    for source in (json.dumps({"prompt": "p", "answer": text}) + "\n", tmp_path / "p.csv"):
        (prompt,) = load(source).prompts
        assert prompt.answer == answers
    (prompt,) = load(json.dumps({"prompt": "p", "answer": [text]})).prompts
    assert prompt.answer == (text.rpartition("####")[2].strip() or text,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("['5', 'five']", 'looks like a list of answers, but is: broken JSON.* ["5", "five"], or'),
        (r'["\sqrt{2}"]', "looks like a list of answers, but is: broken JSON"),
        (r'["\frac{1}{2}"]', "holds a form feed, which is what an unescaped"),
        ('["a"] or ["b"]', "broken JSON at column 7: .* put a text that is the answer as it st"),
        ('["5", true]', "holds a boolean"),
        ('[["a"], ["b"]]', "holds list, not text"),
        ('["5", ""]', "is empty"),
        ("[]", "is an empty list of answers; fill it in"),
        ("[ ]", "is an empty list of answers"),
    ],
)
def test_text_that_is_nearly_a_list_of_answers_is_refused(
    load: Load, text: str, complaint: str
) -> None:
    place = re.escape("p.jsonl:2: column 'answer'") + ".*"
    with pytest.raises(ValueError, match=place + complaint.replace("[", r"\[")):
        load("".join(json.dumps({"prompt": "p", "answer": a}) + "\n" for a in ("1", text)))


@pytest.mark.parametrize(
    ("spelling", "complaint"),
    [
        ("true", "holds a boolean"),
        ("[false]", "holds a boolean"),
        ("Infinity", "holds inf, which is no answer"),
        ("[1, -Infinity]", "holds -inf, which is no answer"),
        ("1e1000", "more than 1,000 digits; write it as text"),
        ("1e-99999999999", "more than 1,000 digits; write it as text"),
        ("1" * 1001, "more than 1,000 digits; write it as text"),
        ("1" * 5000, "write it as text"),
    ],
)
def test_what_is_no_number_for_an_answer_is_refused(
    load: Load, spelling: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: .*{complaint}"):
        read_answers(load, ["1", spelling])


# ---------------------------------------------------------------- escapes

REFUSED = (
    (r"\boxed{}", "backspace"), (r"\beta", "backspace"), (r"\binom{5}{2}", "backspace"),
    (r"\frac{1}{2}", "form feed"), (r"\forall x", "form feed"), (r"x \f y", "form feed"),
)  # fmt: skip
WARNED = {
    r"\text{cm}": "text", r"\theta": "theta", r"\times 3": "times", r"\tan(x)": "tan",
    r"\tan\\theta": "tan", r"x \to 0": "to", r"\tau": "tau", r"\tilde{x}": "tilde",
    r"\triangle ABC": "triangle", r"\tfrac{1}{2}": "tfrac", r"\therefore": "therefore",
    r"\textbf{B}": "textbf", r"x \neq 2": "neq", r"x \ne 2": "ne", r"\nu = 3": "nu",
    r"\nabla f": "nabla", r"\notin A": "notin", r"\not= 3": "not", r"\neg p": "neg",
    r"\rho = 2": "rho", r"x \rightarrow y": "rightarrow", r"(1\right)": "right",
    r"\\langle x\rangle": "rangle", r"\rfloor": "rfloor", r"\rceil": "rceil",
}  # fmt: skip


@pytest.mark.parametrize("column", ["prompt", "answer", "messages", "list"])
def test_control_characters_of_latex_are_refused(load: Load, column: str) -> None:
    for latex, name in REFUSED:
        row = json_row(column, latex)
        place = r"p\.jsonl:2: column 'prompt'" if column in ("prompt", "messages") else "'answer'"
        with pytest.raises(ValueError, match=rf"{place}.* holds a {name}, .*; write \\\\[a-z]"):
            load(json_row("prompt", "good") + row)


@pytest.mark.parametrize("column", ["prompt", "answer", "messages", "list"])
@pytest.mark.parametrize("latex", WARNED)
def test_latex_that_lost_its_backslash_is_told(load: Load, column: str, latex: str) -> None:
    (warning,) = load(json_row("prompt", "good") + json_row(column, latex)).warnings
    assert warning.startswith("1 row may have lost backslashes: ")
    assert "p.jsonl:2 holds a " in warning
    assert f"unescaped \\{WARNED[latex]} becomes" in warning


def test_system_prompt_that_lost_its_backslashes_is_told(load: Load) -> None:
    (warning,) = load(json_row("prompt", "good"), system_prompt="Use \text{}.").warnings
    assert warning.startswith("the system prompt holds a tab, which is what an unescaped \\text")


def test_many_such_rows_are_one_warning(load: Load) -> None:
    (warning,) = load(json_row("prompt", r"\theta") * 1000).warnings
    assert warning.startswith("1,000 rows may")
    assert warning.count("p.jsonl:") == 3 and warning.endswith("; and 997 more")


QUIET = (
    "a\tb\tc", "an apple\tan orange\tto go",
    "for x in y:\n\tprint(x)\n\ttext = 1\n\tif t:\n\t\to = 3",
    "a\nnot b\neither\nnew\nexists\nequal\nI\nu r\ne.g. this", "x\r\nho ho\r\nright", "1\n2\n3",
    "name\ttotal\theight\n1\t2\t3", "choose:\na) 1\nb) 2\nc) 3\nd) 4\ne) 5", "left\tright\ttop",
    r"\boxed{}", r"\frac{1}{2}", r"\text{cm}", r"\neq", r"\rho", "egg\neggs\neq", "\tother\tones",
    "poem:\nan angel\nother\nu\ne\no", "a\ttheta\tother",
    "a 1\nb 2\nc 3\nd 4\ne 5",
)  # fmt: skip


def test_tabs_and_newlines_of_other_texts_pass_quietly(load: Load) -> None:
    rows = [
        json.dumps({"prompt": text, "answer": text}) + "\n" for text in QUIET if text != QUIET[14]
    ]
    assert load("".join(rows)).warnings == ()


def test_real_problems_pass_quietly(load: Load, shared_data: Path) -> None:
    for name, prompt in (("gsm8k/test.jsonl", "question"), ("math500/test.json", "prompt")):
        text = (shared_data / name).read_text()
        rows = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
        read = load("".join(json.dumps({"prompt": r[prompt], "answer": "1"}) + "\n" for r in rows))
        assert read.warnings == ()


def json_row(column: str, latex: str) -> str:
    """A row with LaTeX whose backslashes are not escaped, but where they are written twice."""
    values: dict[str, Any] = {
        "prompt": f'"prompt": "so {latex}", "answer": "1"',
        "answer": f'"prompt": "p", "answer": "{latex}"',
        "messages": f'"prompt": [{{"role": "user", "content": "so {latex}"}}], "answer": "1"',
        "list": f'"prompt": "p", "answer": ["1", "{latex}"]',
    }
    return f"{{{values[column]}}}\n"
