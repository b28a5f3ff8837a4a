"""Conversations as prompts, and what chat templates make of them."""

import csv
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from tests.prompts.sources import load, write_jsonl
from trb_megatron.huggingface.tokenizer import load_tokenizer

USER = {"role": "user", "content": "19+23"}
SOLUTION = {"role": "assistant", "content": "That is \\boxed{42}."}
SYSTEM = {"role": "system", "content": "be brief"}
TEXT = [{"type": "text", "text": "19+23"}]
ASKED = "<|im_start|>user\n19+23<|im_end|>\n<|im_start|>assistant\n"


def load_prompt(path: Path, tokenizer: PreTrainedTokenizerFast, prompt: Any, **options: Any) -> str:
    """The text of a prompt, read from a file of three formats that must agree."""
    rows = [{"prompt": prompt, "answer": "42"}] * 2
    write_jsonl(path / "p.jsonl", rows)
    loaded = load(path / "p.jsonl", tokenizer, **options)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path / "p.parquet")
    datasets.Dataset(table).save_to_disk(str(path / "hf"))
    for name in ("p.parquet", "hf"):
        assert load(path / name, tokenizer, **options) == loaded
    return str(tokenizer.decode(loaded.prompts[1].token_ids))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([USER], ASKED),
        ([SYSTEM, USER], f"<|im_start|>system\nbe brief<|im_end|>\n{ASKED}"),
        ([{"role": "user", "content": TEXT}], ASKED),
        ([{**USER, "tool_calls": None, "name": None}], ASKED),
        (json.dumps([USER]), ASKED),
        (json.dumps([USER], indent=1), ASKED),
        (json.dumps([{"type": "message", **USER}]), ASKED),
        (json.dumps([{"name": "Al", "id": 3, "x": {"y": []}, **USER}], indent=2) + "\n", ASKED),
        ('[{"a": 1}]', ASKED.replace("19+23", '[{"a": 1}]')),
        (
            '[{"id": 1, "role": "cook", "content": "x"}] Who cooks?',
            ASKED.replace("19+23", '[{"id": 1, "role": "cook", "content": "x"}] Who cooks?'),
        ),
        (
            [USER, SOLUTION, {"role": "user", "content": "and now?"}],
            "<|im_start|>user\n19+23<|im_end|>\n<|im_start|>assistant\nThat is \\boxed{42}."
            "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("[19, 23]", ASKED.replace("19+23", "[19, 23]")),
        ('{"a": 1} is JSON?', ASKED.replace("19+23", '{"a": 1} is JSON?')),
    ],
    ids=str,
)
def test_conversation_is_read_as_its_owner_means_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: Any, expected: str
) -> None:
    assert load_prompt(tmp_path, tokenizer, prompt) == expected


def message(**values: Any) -> list[dict[str, Any]]:
    return [{**USER, **values}]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([USER, SOLUTION], "ends with a message of the assistant, perhaps the solution"),
        (
            json.dumps([USER, SOLUTION]),
            "ends with a message of the assistant, perhaps the solution",
        ),
        ([USER, SYSTEM], "ends with a message of the system"),
        ([SYSTEM], "ends with a message of the system"),
        ([], "is an empty list of messages"),
        (message(role="human"), "message 1 has the role 'human'.*system, developer, user, assis"),
        (message(role="User"), "message 1 has the role 'User'"),
        (message(role="tool"), "message 1 has the role 'tool'"),
        ([USER, {"content": "x"}], "message 2 has the role None; a message needs a role and cont"),
        ([{"from": "human", "value": "19+23"}], "message 1 has 'from' and 'value' .*ShareGPT"),
        ('[{"from": "human", "value": "x"}]', "message 1 has 'from' and 'value' .*ShareGPT"),
        (["19+23"], "message 1 is no object with role and content"),
        (message(content=None), "message 1: its content holds NoneType"),
        (message(content=" \n\t"), "message 1: its content is empty"),
        (message(content=[]), "its content is a list of parts of the types none"),
        (message(content=[*TEXT, *TEXT]), "parts of the types text, text; one part"),
        (message(content=[{"type": "image", "url": "x"}]), "parts of the types image; one part"),
        (
            [USER, {**SOLUTION, "tool_calls": [{"id": "1"}]}, USER],
            "message 2 has tool_calls: tools are not supported",
        ),
        (USER, "holds one object with the keys 'role', 'content', not text.*'prompt.text'"),
        (json.dumps(USER), "holds one object with the keys 'role', 'content'"),
        (json.dumps({"type": "message", **USER}), "holds one object with the keys 'type', 'role'"),
        (str([{"type": "message", **USER}]), "looks like chat messages, but is: broken JSON"),
        (json.dumps([USER])[:20], "looks like chat messages, but is: broken JSON"),
        (json.dumps([{"type": "message", **SOLUTION}]), "ends with a message of the assistant"),
        ('[{"id": 1, "from": "human", "value": "x"}]', "message 1 has 'from' and 'value'"),
        (str([USER]), "looks like chat messages, but is: broken JSON"),  # pandas' CSV
        (" \n ", "is empty"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_by_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: Any, said: str
) -> None:
    good = {"prompt": [USER], "answer": "1"}
    source = write_jsonl(tmp_path / "p.jsonl", [good, {"prompt": prompt, "answer": "42"}])
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: column 'prompt'.*{said}"):
        load(source, tokenizer)


# ---------------------------------------------------------------- templates

BRIEF = "Reason step by step."
USERS_ALONE = "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + USERS_ALONE
)
IN_FIRST_USER = (
    "{% set s = messages[0].content | trim + ' ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "[{{ s if loop.first else '' }}{{ m.content | trim }}]{% endfor %}"
)
SWITCH = (
    "{% for m in messages %}[{{ m.content | replace('/no_think', '') }}]{% endfor %}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}"
)


@pytest.fixture
def with_template(
    tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> Callable[[str], PreTrainedTokenizerFast]:
    return lambda template: load_tokenizer(
        write_tokenizer(tmp_path / "tokenizer", chat_template=template)
    )


Make = Callable[[str], PreTrainedTokenizerFast]


@pytest.mark.parametrize("prompt", ["19+23", f"19+23 {BRIEF}"])
def test_template_that_leaves_out_our_instruction_is_refused(
    tmp_path: Path, with_template: Make, prompt: str
) -> None:
    tokenizer = with_template(USERS_ALONE)
    message = r"p\.jsonl:1: .*leaves out the message of the system.*set data\.system_prompt=null"
    with pytest.raises(ValueError, match=message):
        load_prompt(tmp_path, tokenizer, prompt, system_prompt=BRIEF)
    assert load_prompt(tmp_path, tokenizer, prompt) == f"[{prompt}]"


def test_template_that_leaves_out_a_message_of_the_row_is_refused(
    tmp_path: Path, with_template: Make
) -> None:
    tokenizer = with_template(USERS_ALONE)
    for role in ("system", "developer"):
        prompt = [{"role": role, "content": "be brief"}, USER]
        with pytest.raises(ValueError, match=rf"l:1: .*of the {role} \('be brief'\); give the row"):
            load_prompt(tmp_path, tokenizer, prompt)


LAST_ALONE = "{{ messages[-1].content }}"
NO_ANSWERS = "{% for m in messages if m.role != 'assistant' %}[{{ m.content }}]{% endfor %}"
# They cut the thinking of earlier answers.
CUTTING = (
    "{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim }}]{% endfor %}",
    "{% for m in messages %}[{% if '</think>' in m.content %}{{ m.content.split('</think>')[1] }}"
    "{% else %}{{ m.content }}{% endif %}]{% endfor %}",
)


def conversation(answer: str, question: str = "and 2?") -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


@pytest.mark.parametrize(
    "answer", ["It is 42.", "19+23", "and 2?", "<think>19+23</think>It is 42."]
)
@pytest.mark.parametrize("template", [LAST_ALONE, NO_ANSWERS])
def test_template_that_leaves_out_an_earlier_turn_is_refused(
    tmp_path: Path, with_template: Make, template: str, answer: str
) -> None:
    role = "user" if template == LAST_ALONE else "assistant"
    with pytest.raises(ValueError, match=rf"p\.jsonl:1: .*leaves out the message of the {role} \("):
        load_prompt(tmp_path, with_template(template), conversation(answer))


@pytest.mark.parametrize("template", CUTTING)
def test_template_may_cut_the_thinking_of_earlier_answers(
    tmp_path: Path, with_template: Make, template: str
) -> None:
    tokenizer = with_template(template)
    for thinking in ("<think>so 19+23</think>", "<think>and 2? 42.</think>", ""):
        prompt = conversation(f"{thinking}42.")
        assert load_prompt(tmp_path, tokenizer, prompt) == "[19+23][42.][and 2?]"
    cut = conversation("<think>so 19+23</think>")
    assert load_prompt(tmp_path, tokenizer, cut) == "[19+23][][and 2?]"


def test_template_that_refuses_a_system_message_says_what_to_set(
    tmp_path: Path, with_template: Make
) -> None:
    tokenizer = with_template(NO_SYSTEM)
    with pytest.raises(ValueError, match=r"1: .*no system here.*set data\.system_prompt=null"):
        load_prompt(tmp_path, tokenizer, "19+23", system_prompt=BRIEF)
    assert load_prompt(tmp_path, tokenizer, "19+23") == "[19+23]"
    for options in ({}, {"system_prompt": BRIEF}):  # the row's own: null would not help
        with pytest.raises(ValueError, match=r"p\.jsonl:1: .*fails: no system here$"):
            load_prompt(tmp_path, tokenizer, [SYSTEM, USER], **options)
    broken = with_template("{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*fails: never$"):
        load_prompt(tmp_path, broken, "19+23", system_prompt=BRIEF)


def test_template_may_say_a_message_elsewhere_and_otherwise(
    tmp_path: Path, with_template: Make
) -> None:
    merged = with_template(IN_FIRST_USER)
    assert load_prompt(tmp_path, merged, " 19+23\n", system_prompt=f"{BRIEF}\n") == (
        f"[{BRIEF} 19+23]"
    )
    switch = with_template(SWITCH)
    assert load_prompt(tmp_path, switch, "19+23", system_prompt="be brief /no_think") == (
        "[be brief ][19+23]"
    )


def test_options_of_a_template(tmp_path: Path, with_template: Make) -> None:
    tokenizer = with_template(SWITCH)

    def read(**options: Any) -> str:
        return load_prompt(tmp_path, tokenizer, "19+23", chat_template_kwargs=options)

    assert read() == read(enable_thinking=True) == "[19+23]"
    assert read(enable_thinking=False) == "[19+23]<think></think>"
    for name in ("enable_thinkin", "thinking", "x", "messages", "add_generation_prompt"):
        with pytest.raises(ValueError, match=rf"data\.chat_template_kwargs\.{name}: is no option"):
            read(**{name: False})


USER_CONTENT = "{{ messages[0].content }}"

# Templates, and the options that they read.
OPTIONS: tuple[tuple[str, str], ...] = (
    ("{% set mode = 'a' if effort is defined and effort else 'b' %}{{ mode }}", "effort"),
    ("{% set effort = effort | default('high') %}{{ effort }}", "effort"),
    ("{% if effort is not defined %}{% set effort = 1 %}{% endif %}{{ effort }}", "effort"),
    ("{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}", "day"),
    ("{# thinking: see README #}{{ 'defined' }} role", ""),
    ("{% for m in messages %}{{ m.role }}{{ m['name'] }}{{ loop.first }}{% endfor %}", ""),
    ("{% macro show(a, b=depth) %}{{ a }}{{ c }}{% endmacro %}{{ show(1) }}", "c depth"),
    ("{% set ns = namespace(found=x) %}{{ ns.found }}{{ range(2) | list }}", "x"),
    (
        "{% generation %}{{ level }}{% endgeneration %}{% for i in [1] %}{% break %}{% endfor %}",
        "level",
    ),
    ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}", ""),
)


@pytest.mark.parametrize(("template", "names"), OPTIONS)
def test_options_are_the_variables_that_a_template_reads(
    tmp_path: Path, with_template: Make, template: str, names: str
) -> None:
    tokenizer = with_template(template + USER_CONTENT)
    words = set(re.findall(r"[a-z_]+", template)) | {"nothing", "messages", "tokenize"}
    for name in words:
        options = {"chat_template_kwargs": {name: 1}}
        if name in names.split():
            load_prompt(tmp_path, tokenizer, "19+23", **options)
            continue
        known = ", ".join(names.split()) or "none"
        message = rf"kwargs\.{name}: is no option .*, which has {known}; correct its name or leave"
        with pytest.raises(ValueError, match=message):
            load_prompt(tmp_path, tokenizer, "19+23", **options)


def test_template_that_cannot_be_parsed_is_named(tmp_path: Path, with_template: Make) -> None:
    tokenizer = with_template("\n{% for %}")
    with pytest.raises(ValueError, match="tokenizer: its chat template is broken at line 2: Expec"):
        load_prompt(tmp_path, tokenizer, "19+23", chat_template_kwargs={"x": 1})


DATES = (
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%-d. %B, %A %H:%M') }}|"
    "{{ strftime_now('100 %%d %j') }}|{% if strftime_now is defined %}yes{% endif %}|"
    "{%- macro inside() %}{{ strftime_now('%Y') }}{% endmacro %}{{ inside() }}|"
    "{{ messages[0]['content'] }}"
)


def test_template_prints_the_date_that_it_is_given(tmp_path: Path, with_template: Make) -> None:
    given = date(2024, 2, 9)
    expected = "09 Feb 2024|9. February, Friday 00:00|100 %d 040|yes|2024|19+23"
    for before in ("", "\n", " "):
        tokenizer = with_template(before + DATES)
        assert load_prompt(tmp_path, tokenizer, "19+23", template_date=given) == before + expected


# ---------------------------------------------------------------- columns of TRL


@pytest.mark.parametrize("format", ["jsonl", "parquet", "hf", "csv"])
def test_columns_that_trl_renders_with_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format: str
) -> None:
    def warnings(column: str, values: list[Any], **options: Any) -> tuple[str, ...]:
        rows = [{"prompt": "p", "answer": "1", column: value} for value in values]
        path = tmp_path / f"{column}.{format}"
        if format == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows({**row, column: json.dumps(row[column])} for row in rows)
        elif format == "jsonl":
            write_jsonl(path, rows)
        elif format == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return load(path, tokenizer, **options).warnings

    (warning,) = warnings("tools", [[], [{"name": "f"}], [{"name": "g"}], None])
    assert warning.endswith(
        f"tools.{format}: 2 rows have a value in the column 'tools', which is not read: tools are "
        "not supported"
    )
    (warning,) = warnings("chat_template_kwargs", [{"effort": 1}, {}, None])
    assert "1 row has a value in the column 'chat_template_kwargs', which is not" in warning
    assert warning.endswith(": options are those of data.chat_template_kwargs for all rows")
    assert warnings("tools", [None, [], None]) == ()
    assert warnings("others", [[{"name": "f"}]]) == ()
    assert warnings("tools", ["p"], prompt_column="tools") == ()
