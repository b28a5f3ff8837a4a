"""The date that a chat template prints: a run keeps that of its start."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from tests.layouts import write_inputs
from tests.runs import run_module
from trb_megatron.config.reading import load_config
from trb_megatron.huggingface.tokenizer import load_tokenizer
from trb_megatron.run.template_date import with_template_date

DATED = "{{ strftime_now('%d%m%Y') }}={{ messages[0]['content'] }}"
EAST, WEST = "EAST-14", "WEST+12"  # clocks that never show the same date
SAID = re.compile(r"the chat template prints the date (\S+) \(data\.template_date\)\n")


def run(name: str, *arguments: str) -> tuple[date, str]:
    """A command to its end: the date that it says, and all of its output."""
    done = run_module(f"trb_megatron.{name}", *arguments)
    assert done.returncode == 0, done.stderr
    said = SAID.findall(done.stdout + done.stderr)
    assert len(said) == 1, done.stdout + done.stderr
    return date.fromisoformat(said[0]), done.stdout


def test_run_keeps_the_date_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it goes on, and in evaluations; another date is another run."""
    config_file = str(write_inputs(tmp_path))
    for name in ("student", "teacher"):
        (tmp_path / name / "chat_template.jinja").write_text(DATED)
    options = ["data.system_prompt=null", f"evaluation.sets.sums.path={tmp_path / 'prompts.jsonl'}"]
    options += ["evaluation.at_start=false", "evaluation.max_response_tokens=4"]

    monkeypatch.setenv("TZ", EAST)
    first, output = run("train", config_file, *options, "training.steps=1")
    assert f" tokens: '{first:%d%m%Y}=" in output, output
    assert load_config(tmp_path / "run" / "config.yaml").data.template_date == first

    monkeypatch.setenv("TZ", WEST)
    same, output = run("train", config_file, *options, "training.steps=2")
    assert same == first and f" tokens: '{first:%d%m%Y}=" in output, output
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert run("evaluate", config_file, *options)[0] == first
    elsewhere = f"run.dir={tmp_path / 'none'}"
    assert run("evaluate", config_file, *options, elsewhere)[0] != first

    done = run_module("trb_megatron.train", config_file, *options, "data.template_date=2024-02-29")
    assert done.returncode == 2
    assert f"data.template_date: saved '{first}', now '2024-02-29'" in done.stderr


def test_date_without_use_is_told(tmp_path: Path) -> None:
    config = load_config(write_inputs(tmp_path), ["data.template_date=2024-02-29"])
    tokenizer = load_tokenizer(tmp_path / "student")
    told: list[str] = []
    assert with_template_date(config, tokenizer, told.append) == config
    assert told == ["warning: data.template_date=2024-02-29: the template prints no date"]
