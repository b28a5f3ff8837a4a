"""500 mutations of valid configurations: each is refused by name, or has the value stated here.

What is expected is written down in this file (`OPTIONS`, `CONFLICTS`, `DOCUMENTS`), not taken from
the code under test. A seeded generator combines it with base configurations, in a file or as an
override. A few dozen of the mutants, and layouts of real models, go through the command line.
"""

import json
import random
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic import BaseModel

from trb_megatron.config.conflicts import check_world_size
from trb_megatron.config.options import Config, JobConfig
from trb_megatron.config.reading import load_config, load_job_config, save_config
from trb_megatron.config.values import ConfigError

ROOT = Path(__file__).parents[2]
SEED = 6
MOST = 2**31 - 1


# ---------------------------------------------------------------- what every option accepts


class Options(NamedTuple):
    """YAML of values that are refused, and of values that are accepted and what they mean."""

    bad: tuple[str, ...]
    good: tuple[tuple[str, Any], ...]


NOT_SCALARS = ("[a]", "[[1]]", "{}", "{a: 1}")
NOT_NUMBERS = ("true", "yes", "many", "'1'", "1_0", "1:30", "0x1F", "2026-11-21", *NOT_SCALARS)
NOT_FINITE = (".nan", ".inf", "-.inf", "1e400", "9" * 5000)


def number(least: float, most: float, *good: float, bad: tuple[str, ...] = ()) -> Options:
    """A finite number between two bounds."""
    beyond = (repr(most * 1.01), "1e300", "-1e300", "-1") if most < 1e300 else ("-1e-300", "-1")
    numbers = good or (least, most)
    return Options(
        (*NOT_NUMBERS, *NOT_FINITE, *beyond, "null", "''", *bad),
        tuple((repr(value), float(value)) for value in numbers),
    )


def positive(least: float, most: float, *good: float) -> Options:
    """A number of which zero and what is nearly zero are refused, too."""
    return number(least, most, *good, bad=("0", "-0.0", repr(least * 0.99), "1e-300"))


def whole(least: int, most: int = MOST, *good: int, null: bool = False) -> Options:
    """A whole number; `10.0` and `1e1` are none."""
    numbers = good or (least, most, min(least + 7, most))
    return Options(
        (
            *(*NOT_NUMBERS, *NOT_FINITE, "1.5", "2.0", "1e1", "''"),
            *(str(least - 1), str(most + 1), "-7", "9" * 19, "9" * 30),
            *(() if null else ("null",)),
        ),
        tuple((f"{sign}{value}", value) for value in numbers for sign in ("", "00", "+"))
        + ((("null", None), ("~", None)) if null else ()),
    )


def whole_or_auto(least: int, most: int) -> Options:
    """A whole number or the word auto."""
    bad, good = whole(least, most)
    return Options((*bad, "Auto", "[auto]", "automatic"), (*good, ("auto", "auto")))


def flag(*good: bool) -> Options:
    """true or false; YAML 1.1's yes, no, on and off are text."""
    spellings = {True: ("true", "True", "TRUE"), False: ("false", "False", "FALSE")}
    return Options(
        (
            *("yes", "no", "on", "off", "y", "0", "1", "1.0", "'true'", "tru", "null", "''"),
            *NOT_SCALARS,
        ),
        tuple((text, value) for value in good or (True, False) for text in spellings[value]),
    )


def text(*, null: bool = False, empty: bool = False, null_is_good: bool = True) -> Options:
    """Text; what looks like another type of YAML 1.1, but not of 1.2, is text."""
    words = ("yes", "no", "on", "2026-11-21", "2026-99-99", "1:30", "0x1F", "0o17", "1_0", "a b")
    good = [
        *((word, word) for word in words),
        ("'5'", "5"),
        ("'1e-5'", "1e-5"),
        ('"null"', "null"),
        ("'é'", "é"),
    ]
    if null and null_is_good:
        good += [("null", None), ("", None)]
    bad = ["5", "1.5", "1e-5", "true", ".nan", *NOT_SCALARS]
    return Options(
        (*bad, *(() if empty else ("''",)), *(() if null else ("null", "~"))), tuple(good)
    )


def path() -> Options:
    """A path: text that may name a file."""
    bad, good = text()
    return Options(
        (*bad, '"a\\0b"', '"\\ud800"'),
        (*((word, Path(value)) for word, value in good), ("~/x", Path.home() / "x")),
    )


def choice(*names: str, good: tuple[str, ...] = ()) -> Options:
    """One of some words."""
    return Options(
        ("other", names[0].upper(), names[0] + "s", "5", "true", "null", "''", *NOT_SCALARS),
        tuple((name, name) for name in good),
    )


def whole_list(least: int, good: str, *, null: bool = False) -> Options:
    """A list of different whole numbers."""
    bad = ("5", "'5'", "[]", "[5, 5]", "[1.0]", "['1']", "[true]", "[[1]]", "[null]", "{1: 2}")
    return Options(
        (*bad, f"[{least - 1}]", f"[{MOST + 1}]", "a", *(() if null else ("null",))),
        ((good, tuple(json.loads(good))), *((("null", None),) if null else ())),
    )


def mapping(good: str) -> Options:
    """Names with scalar values."""
    bad = ("5", "a", "[a]", "true", "null", "{a: [1]}", "{a: {b: 1}}", "{a: .nan}", "{a: .inf}")
    return Options((*bad, "{'': 2}"), (("{}", {}), (good, json.loads(good))))


# Values that would be good alone, but not together with some base, are left out.
OPTIONS: dict[str, Options] = {
    "run.dir": path(),
    "run.seed": whole(0, 2**63 - 1),
    "student.path": path(),
    "teacher.path": path(),
    "parallel.tensor_model_parallel_size": whole(1, MOST, 2, 3, 64),
    "parallel.pipeline_model_parallel_size": whole(1),
    "parallel.sequence_parallel": flag(False),
    "parallel.expert_model_parallel_size": whole(1, 1),
    "parallel.timeout_minutes": positive(0.02, 43_200),
    "data.path": path(),
    "data.format": choice("auto", "jsonl", good=("auto", "jsonl", "csv", "parquet", "hf")),
    "data.split": text(null=True),
    "data.prompt_column": text(),
    "data.answer_column": text(null=True),
    "data.response_column": text(null=True, null_is_good=False),
    "data.system_prompt": text(null=True, empty=True),
    "data.apply_chat_template": flag(True),
    "data.chat_template_kwargs": mapping('{"enable_thinking": false, "effort": "low", "n": 1.5}'),
    "data.template_date": Options(
        (
            *("5", "20261125", "2026-11-31", "2026-11-25 10:00", "11/25/2026", "today", "''"),
            *NOT_SCALARS,
        ),
        (("null", None), ("2026-11-25", date(2026, 11, 25)), ("'2024-02-29'", date(2024, 2, 29))),
    ),
    "data.max_prompt_tokens": whole(1),
    "data.shuffle": flag(),
    "training.task": choice("distill", "supervised"),
    "training.steps": whole(1),
    "training.prompts_per_step": whole(1, 2**20),
    "training.precision": choice("fp32", "bf16", good=("fp32", "bf16", "fp8")),
    "training.fp8_recipe": choice("delayed", "blockwise", good=("tensorwise",)),
    "training.max_tokens_per_microbatch": whole(1),
    "training.teacher_hidden_device": choice("device", "host", good=("device", "host")),
    "training.max_nonfinite_steps": whole(0),
    "training.recompute_activations": flag(),
    "rollout.rollouts_per_prompt": whole(1, 2**16),
    "rollout.max_response_tokens": whole(1),
    "rollout.temperature": number(0, 100, 0.01, 1, 100, bad=("1e-300", "0.0099")),
    "rollout.stop_ids": whole_list(0, "[7, 3, 0]", null=True),
    "rollout.max_sequences": whole(1, 2**16),
    "rollout.page_tokens": whole_or_auto(1, 2**16),
    "rollout.cache_gb": positive(1e-9, 1e6)._replace(bad=(*NOT_NUMBERS, *NOT_FINITE, "0", "2e6")),
    "rollout.max_prefill_tokens": whole(1),
    "rollout.cuda_graphs": flag(),
    "rollout.draft_tokens": whole_or_auto(0, 255),
    "rollout.keep_teacher_hidden": flag(),
    "behavior.policy": choice("trb", "skd", "teacher"),
    "behavior.warmup_steps": whole(0, MOST, 1, 25, MOST),
    "behavior.kl_budget": number(0, 1e308, 1e-300, 0.05, 1e308),
    "behavior.schedule": choice("linear", "constant", good=("linear", "constant")),
    "behavior.skd_top_k": whole(1, MOST, 25),
    "behavior.skd_temperature": positive(0.01, 100, 1),
    "loss.name": choice("reverse_kl_topk", "jsd"),
    "loss.top_k": whole(1),
    "loss.temperature": positive(0.01, 100),
    "loss.jsd_weight": positive(0.001, 0.999),
    "loss.veto_coef": number(0, 1, 0),
    "loss.workspace_mb": whole(1, 10**6),
    "optimizer.lr": positive(1e-12, 1),
    "optimizer.beta1": number(0, 0.9999, bad=("1", "1.0")),
    "optimizer.beta2": number(0, 0.9999, bad=("1", "1.0")),
    "optimizer.eps": positive(1e-20, 1),
    "optimizer.weight_decay": number(0, 1e308, 0, 1, 5),
    "optimizer.clip_grad": number(0, 1e6, 0, 1e-6, 1, bad=("1e-300",)),
    "optimizer.warmup_steps": whole(0),
    "optimizer.distributed": flag(),
    "checkpoint.every": whole(1),
    "checkpoint.keep": whole(1),
    "checkpoint.export_hf": flag(),
    "evaluation.sets.math.path": path(),
    "evaluation.sets.math.format": choice(
        "auto", "jsonl", good=("auto", "jsonl", "csv", "parquet", "hf")
    ),
    "evaluation.sets.math.split": text(null=True),
    "evaluation.sets.math.prompt_column": text(),
    "evaluation.sets.math.answer_column": text(),
    "evaluation.sets.math.limit": whole(1, null=True),
    "evaluation.sets.math.max_prompt_tokens": whole_or_auto(1, 2**31 - 1),
    "evaluation.sets.math.system_prompt": text(null=True, empty=True),
    "evaluation.every": whole(1),
    "evaluation.at_start": flag(),
    "evaluation.at_end": flag(),
    "evaluation.samples": whole(1, 2**16),
    "evaluation.pass_at": whole_list(1, "[1]"),
    "evaluation.temperature": number(0, 100, 0.01, 1, 100, bad=("1e-300", "0.0099")),
    "evaluation.max_response_tokens": whole_or_auto(1, 2**31 - 1),
    "rewards.workers": whole(1, 1024),
    "rewards.timeout_s": positive(0.01, 86_400),
    "rewards.grader": Options(
        ("grade", "a:b:c", "a/b.py:grade", "1a:b", ":b", "a:", "5", "true", "''", *NOT_SCALARS),
        (("my_rewards:grade", "my_rewards:grade"), ("a.b:c", "a.b:c"), ("null", None)),
    ),
    "logging.tensorboard": flag(),
    "logging.wandb_project": text(null=True),
}
# What a section has when it is left empty; those without default are refused.
SECTIONS: dict[str, dict[str, Any] | None] = {
    "run": None,
    "student": None,
    "data": None,
    "parallel": {"parallel.tensor_model_parallel_size": 1, "parallel.timeout_minutes": 30.0},
    "training": {"training.steps": 400, "training.precision": "bf16"},
    "rollout": {"rollout.rollouts_per_prompt": 4, "rollout.stop_ids": None},
    "behavior": {"behavior.kl_budget": 0.01, "behavior.warmup_steps": 50},
    "loss": {"loss.name": "reverse_kl_topk", "loss.top_k": 16},
    "optimizer": {"optimizer.lr": 1e-5, "optimizer.beta2": 0.999},
    "checkpoint": {"checkpoint.every": 50, "checkpoint.keep": 2},
    "evaluation": {"evaluation.sets": {}, "evaluation.pass_at": (1,)},
    "rewards": {"rewards.workers": 2},
    "logging": {"logging.wandb_project": None},
}


# ---------------------------------------------------------------- valid configurations

DISTILL = """
run: {dir: runs/a}
student: {path: models/student}
teacher: {path: models/teacher}
parallel: {tensor_model_parallel_size: 2}
data: {path: prompts.jsonl}
evaluation: {sets: {math: {path: math.jsonl}}}
"""
SUPERVISED = """
run: {dir: runs/b, seed: 3}
student: {path: models/student}
data: {path: pairs.parquet, response_column: text}
training: {task: supervised}
loss: {name: cross_entropy}
"""
SHIPPED = (
    "configs/qwen3_1.7b_from_8b.yaml",
    "demo/distill.yaml",
    "demo/supervised_student.yaml",
    "demo/supervised_teacher.yaml",
)


def read_bases() -> dict[str, dict[str, Any]]:
    """Valid configurations as plain values, each with a set of problems called math."""
    bases = {"distill": yaml.safe_load(DISTILL), "supervised": yaml.safe_load(SUPERVISED)}
    policies = {
        "skd": {"policy": "skd", "skd_top_k": 15, "skd_temperature": 0.2},
        "teacher": {"policy": "teacher", "warmup_steps": 15},
    }
    for name, behavior in policies.items():
        bases[name] = {**yaml.safe_load(DISTILL), "behavior": behavior}
    bases["skd"]["rollout"] = {"draft_tokens": 8}
    for file in SHIPPED:
        bases[file] = yaml.safe_load((ROOT / "launch" / file).read_text())
    for base in bases.values():
        sets = base.setdefault("evaluation", {}).setdefault("sets", {})
        sets["math"] = {"path": "math.jsonl"}
    return bases


BASES = read_bases()
DISTILLING = ("distill", "configs/qwen3_1.7b_from_8b.yaml", "demo/distill.yaml")


# ---------------------------------------------------------------- what cannot be combined

# base, overrides, what the message names; nothing: accepted.
CONFLICTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("distill", ("teacher=null",), ("teacher.path", "training.task=distill")),
    ("distill", ("loss.name=cross_entropy",), ("loss.name", "training.task=supervised")),
    ("distill", ("behavior.warmup_steps=0",), ("behavior.warmup_steps", "behavior.kl_budget=0")),
    ("distill", ("rollout.temperature=0",), ("rollout.temperature", "behavior.kl_budget=0")),
    ("distill", ("rollout.temperature=-0.0",), ("rollout.temperature", "behavior.kl_budget=0")),
    ("distill", ("rollout.temperature=0", "behavior.kl_budget=0"), ()),
    ("distill", ("behavior.warmup_steps=0", "behavior.kl_budget=0"), ()),
    ("distill", ("behavior.skd_top_k=24",), ("behavior.skd_top_k", "behavior.policy=skd")),
    ("distill", ("behavior.skd_temperature=0.6",), ("behavior.skd_temperature",)),
    ("distill", ("loss.veto_coef=0.2",), ("loss.veto_coef", "loss.name=veto")),
    ("distill", ("loss.veto_coef=0.2", "loss.name=veto"), ()),
    ("distill", ("parallel.sequence_parallel=true",), ()),
    (
        "distill",
        ("parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=1"),
        ("parallel.sequence_parallel", "parallel.tensor_model_parallel_size"),
    ),
    ("distill", ("training.fp8_recipe=blockwise",), ("training.fp8_recipe", "training.precision")),
    ("distill", ("training.fp8_recipe=delayed", "training.precision=fp8"), ()),
    ("distill", ("data.apply_chat_template=false",), ("data.system_prompt=null",)),
    (
        "distill",
        (
            "data.apply_chat_template=false",
            "data.system_prompt=null",
            "data.chat_template_kwargs.enable_thinking=false",
        ),
        ("data.chat_template_kwargs", "data.apply_chat_template=true"),
    ),
    (
        "distill",
        (
            "data.apply_chat_template=false",
            "data.system_prompt=null",
            "data.template_date=2026-11-25",
        ),
        ("data.template_date", "data.apply_chat_template=true"),
    ),
    ("distill", ("data.apply_chat_template=false", "data.system_prompt=null"), ()),
    (
        "distill",
        (
            *("data.apply_chat_template=false", "data.system_prompt=null"),
            *("evaluation.sets.math.path=x", "evaluation.sets.math.system_prompt=y"),
        ),
        ("evaluation.sets.math.system_prompt=null",),
    ),
    ("distill", ("optimizer.lr=1", "optimizer.weight_decay=1"), ("optimizer.weight_decay",)),
    ("distill", ("optimizer.weight_decay=1e300",), ("optimizer.weight_decay", "optimizer.lr")),
    ("distill", ("evaluation.pass_at=[1, 8]",), ("evaluation.pass_at", "evaluation.samples")),
    ("distill", ("evaluation.pass_at=[1, 8]", "evaluation.samples=8"), ()),
    (
        "distill",
        ("evaluation.temperature=0", "evaluation.samples=2"),
        ("evaluation.samples", "evaluation.temperature=0"),
    ),
    ("distill", ("evaluation.temperature=0",), ()),
    ("skd", ("behavior.kl_budget=0",), ("behavior.kl_budget", "behavior.policy=skd")),
    ("skd", ("behavior.policy=trb",), ("behavior.skd_top_k", "behavior.skd_temperature")),
    ("skd", ("behavior.warmup_steps=0",), ("behavior.warmup_steps", "behavior.policy=skd")),
    ("skd", ("rollout.temperature=0",), ("rollout.temperature", "behavior.policy=skd")),
    ("skd", ("behavior.skd_top_k=1000",), ()),
    ("teacher", ("behavior.kl_budget=0",), ("behavior.kl_budget", "behavior.policy=teacher")),
    ("teacher", ("rollout.temperature=0",), ("rollout.temperature", "behavior.policy=teacher")),
    ("teacher", ("behavior.kl_budget=0.05",), ()),
    ("supervised", ("training.task=distill",), ("teacher.path", "loss.name")),
    ("supervised", ("data.response_column=null",), ("data.response_column",)),
    ("supervised", ("loss.name=jsd",), ("loss.name=cross_entropy",)),
    ("supervised", ("rollout.temperature=0",), ()),
    ("supervised", ("teacher.path=x",), ()),
)


# ---------------------------------------------------------------- whole documents

BOMB = "bomb0: &bomb0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"bomb{i}: &bomb{i} [{', '.join(9 * [f'*bomb{i - 1}'])}]\n" for i in range(1, 12)
)
FILE = "mutant.yaml"

# How a file's text is changed, and what the message names, or the values of what is accepted. `N`
# stands for the line behind the base.
DOCUMENTS: tuple[tuple[Callable[[str], str | bytes], tuple[str, ...] | dict[str, Any]], ...] = (
    (lambda base: "\ufeff" + base, {"run.dir": Path("runs/a")}),
    (lambda base: base.replace("\n", "\r\n"), {"run.dir": Path("runs/a")}),
    (lambda base: "---\n" + base + "...\n", {"run.dir": Path("runs/a")}),
    (lambda base: "# comment\n" + base + "\n\n", {"run.dir": Path("runs/a")}),
    (lambda base: base.encode("utf-16"), (f"{FILE}:1:", "UTF-8")),
    (lambda base: base.encode("utf-32"), (f"{FILE}:1:", "UTF-8")),
    (lambda base: base.encode() + b"loss: caf\xe9\n", (f"{FILE}:N:", "UTF-8")),
    (lambda base: base + "loss: \0\n", (f"{FILE}:N:",)),
    (lambda base: base + "loss: \x07\n", (f"{FILE}:N:",)),
    (lambda base: "", ("run: required", "student: required", "data: required")),
    (lambda base: "~", ("run: required", "student: required", "data: required")),
    (lambda base: "- run\n", ("expected sections",)),
    (lambda base: "run\n", ("expected sections",)),
    (lambda base: "5", ("expected sections",)),
    (lambda base: "\t", (f"{FILE}:1:",)),
    (lambda base: base + "loss:\n\ttop_k: 3\n", (f"{FILE}:",)),
    (lambda base: base + "loss: {top_k: 3\n", (f"{FILE}:",)),
    (lambda base: base + "loss: 'top_k\n", (f"{FILE}:",)),
    (lambda base: base + "loss: top_k: 3\n", (f"{FILE}:N:",)),
    (lambda base: base + " loss: {}\n", (f"{FILE}:N:",)),
    (lambda base: base + "loss: ]\n", (f"{FILE}:N:",)),
    (lambda base: base + "---\nloss: {}\n", (f"{FILE}:N:",)),
    (lambda base: base + "%YAML 3.0\n---\n", (f"{FILE}:",)),
    (lambda base: base + "loss: *nothing\n", (f"{FILE}:N:", "nothing")),
    (lambda base: base + "loss: {top_k: 3}\nloss: {top_k: 4}\n", ("'loss' is given twice",)),
    (lambda base: base + "loss: {top_k: 3, top_k: 4}\n", (f"{FILE}:N:", "'top_k' is given twice")),
    (lambda base: base + "run: {dir: b}\n", (f"{FILE}:N:", "'run' is given twice")),
    (lambda base: base + "? [loss]\n: 3\n", (f"{FILE}:N:", "key")),
    (lambda base: base + "? {loss: 3}\n: 3\n", (f"{FILE}:N:", "key")),
    (lambda base: base + "1: 2\n", ("1: unknown key",)),
    (lambda base: base + "null: 2\n", ("null: unknown key",)),
    (lambda base: base + "2026-11-21: 2\n", ("2026-11-21: unknown key",)),
    (lambda base: base + "loss.top_k: 2\n", ("loss.top_k: unknown key", "override")),
    (lambda base: base + "loss: {<<: {top_k: 3}}\n", ("loss.<<: unknown key",)),
    (lambda base: base + "loss: !!int 3\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: {top_k: !!int abc}\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: !!python/object:os.system {}\n", (f"{FILE}:N:", "tag")),
    (
        lambda base: base + "loss: {top_k: !!python/object/apply:os.system ['false']}\n",
        (f"{FILE}:N:", "tag"),
    ),
    (lambda base: base + "loss: {name: !!python/name:os.system }\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: !!binary aGk=\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: !!set {a, b}\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: {top_k: !!timestamp abc}\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: !own 3\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + "loss: ! 3\n", (f"{FILE}:N:", "tag")),
    (lambda base: base + BOMB, ("bomb11: unknown key",)),
    (lambda base: base + BOMB + "loss: *bomb11\n", ("loss: expected a section",)),
    (lambda base: base + BOMB + "rollout: {stop_ids: *bomb11}\n", ("rollout.stop_ids.0",)),
    (lambda base: base + "loss: &own {top_k: *own}\n", ("loss.top_k",)),
    (lambda base: base + "loss: &own [*own]\n", ("loss: expected a section",)),
    (lambda base: base + "rollout: {stop_ids: &own [1, *own]}\n", ("rollout.stop_ids.1",)),
    (lambda base: base + f"loss: {'[' * 3000}{']' * 3000}\n", (f"{FILE}:N:", "nested")),
    (lambda base: base + f"loss: {'{a: ' * 2000}{'}' * 2000}\n", (f"{FILE}:N:", "nested")),
    (lambda base: base + f"loss: {'[' * 3000}\n", (f"{FILE}:N:", "nested")),
    (lambda base: base + "loss: {top_k: 007}\n", {"loss.top_k": 7}),
    (lambda base: base + "optimizer: {lr: 1e-5}\n", {"optimizer.lr": 1e-5}),
    (lambda base: base + "optimizer: {lr: .5, beta1: 0.}\n", {"optimizer.lr": 0.5}),
    (
        lambda base: base + "loss: {top_k: &k 9}\nrollout: {page_tokens: *k}\n",
        {"loss.top_k": 9, "rollout.page_tokens": 9},
    ),
    (lambda base: base + "loss: &l {}\nrewards: *l\n", {"rewards.workers": 2}),
    (lambda base: base + "loss:\nrewards: ~\n", {"rewards.workers": 2, "loss.top_k": 16}),
)

# Overrides that cannot be applied; the message names each.
BROKEN_OVERRIDES = (
    ("loss.top_k", "section.key=value"),
    ("=3", "section.key=value"),
    ("loss..top_k=3", "section.key=value"),
    ("loss.=3", "section.key=value"),
    ("", "section.key=value"),
    ("loss.top_k=[1", "loss.top_k"),
    ("loss.top_k='1", "loss.top_k"),
    ("loss.top_k=\x07", "loss.top_k"),
    ("loss.top_k=\udcff", "loss.top_k"),
    ("loss.top_k=\t3", "loss.top_k"),
    ("loss.top_k=!!python/name:os.system", "loss.top_k"),
    ("loss.top_k=" + 3000 * "[", "loss.top_k"),
    ("loss.top_k=*k", "loss.top_k"),
    ("loss.top_k.more=3", "loss.top_k"),
    ("loss=3", "loss: expected a section"),
    ("evaluation.sets.math=3", "evaluation.sets.math: expected a section"),
    ("evaluation.sets.math=null", "evaluation.sets.math: expected a section"),
    ("evaluation.sets.two words.path=x", "evaluation.sets.two words"),
    ("evaluation.sets.new.limit=3", "evaluation.sets.new.path: required"),
    ("run.dir.name=x", "run.dir"),
    (".".join(3000 * ["a"]) + "=1", "a: unknown key"),
)


# ---------------------------------------------------------------- the generator


@dataclass(frozen=True)
class Mutant:
    """A changed configuration, and what is expected of it."""

    kind: str
    content: bytes
    """Of the file."""
    overrides: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    """What the error names; nothing: the configuration is accepted."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of some keys, once it is accepted."""
    world_size: int = 0
    model: str = ""
    """Where it is the layout that was changed: how many ranks, and which of `MODELS`."""


def to_yaml(values: Mapping[str, Any], key: str = "", snippet: str = "") -> bytes:
    """A configuration as a file, with `snippet` as the YAML of one key's value."""
    values = json.loads(json.dumps(values))
    section = values
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    if key:
        section[leaf] = "@"
    return yaml.safe_dump(values, sort_keys=False).replace("'@'", snippet).encode()


def document_mutant(
    change: Callable[[str], str | bytes], expected: tuple[str, ...] | dict[str, Any]
) -> Mutant:
    """A row of `DOCUMENTS`, applied to the first base."""
    content = change(DISTILL)
    if isinstance(content, str):
        content = content.encode()
    if isinstance(expected, dict):
        return Mutant("document", content, values=expected)
    line = DISTILL.count("\n") + 1
    return Mutant(
        "document", content, named=tuple(name.replace(":N:", f":{line}:") for name in expected)
    )


class Generator:
    """Draws mutants; the same seed draws the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def place(self, kind: str, base: str, key: str, snippet: str, **expected: Any) -> Mutant:
        """Give a key a value, in the file or as an override."""
        if self.random.random() < 0.5:
            return Mutant(kind, to_yaml(BASES[base], key, snippet), **expected)
        override = f"{key}={snippet}"
        return Mutant(kind, to_yaml(BASES[base]), (override,), **expected)

    def bad_value(self) -> Mutant:
        key = self.random.choice(list(OPTIONS))
        snippet = self.random.choice(OPTIONS[key].bad)
        return self.place("bad-value", self.base(), key, snippet, named=(key,))

    def good_value(self) -> Mutant:
        key = self.random.choice([key for key in OPTIONS if OPTIONS[key].good])
        snippet, value = self.random.choice(OPTIONS[key].good)
        return self.place("good-value", self.base(), key, snippet, values={key: value})

    def last_override_wins(self) -> Mutant:
        key = self.random.choice([key for key in OPTIONS if OPTIONS[key].good])
        (first, _), (last, value) = self.random.choices(OPTIONS[key].good, k=2)
        overrides = (f"{key}={first}", f"{key}={last}")
        content = to_yaml(BASES[self.base()])
        return Mutant("last-override", content, overrides, values={key: value})

    def misspelt_key(self) -> Mutant:
        section, leaf = self.random.choice(list(OPTIONS)).rsplit(".", 1)
        num_edits = self.random.choice((1, 1, 2))
        misspelt = self.misspell(leaf, num_edits)
        if f"{section}.{misspelt}" in OPTIONS:
            return self.misspelt_key()
        key = f"{section}.{misspelt}"
        named: tuple[str, ...] = (f"{key}: unknown key",)
        if len(leaf) >= 8 and num_edits == 1:
            meant = f"{section}.{leaf}".replace(".math.", ".NAME.")
            named = (f"{key}: unknown key; did you mean {meant}?",)
        return self.place("misspelt-key", self.base(), key, "1", named=named)

    def misspelt_section(self) -> Mutant:
        section, leaf = self.random.choice([k for k in OPTIONS if "sets" not in k]).split(".")
        misspelt = self.misspell(section, self.random.choice((1, 2)))
        named = (f"{misspelt}: unknown key",)
        return self.place("misspelt-section", self.base(), f"{misspelt}.{leaf}", "1", named=named)

    def wrong_section(self) -> Mutant:
        leaf = self.random.choice([k for k in OPTIONS if "sets" not in k]).split(".")[1]
        section = self.random.choice([s for s in SECTIONS if f"{s}.{leaf}" not in OPTIONS])
        key = f"{section}.{leaf}"
        named = (f"{key}: unknown key; did you mean ", f".{leaf}?")
        return self.place("wrong-section", self.base(), key, "1", named=named)

    def section(self) -> Mutant:
        name = self.random.choice(list(SECTIONS))
        snippet = self.random.choice(("5", "true", "''", "text", "[]", "[1]", "null", "null", "{}"))
        defaults = SECTIONS[name]
        if snippet == "{}" and defaults is None:
            leaf = "dir" if name == "run" else "path"
            return self.place(
                "section", "distill", name, snippet, named=(f"{name}.{leaf}: required",)
            )
        if snippet in ("null", "{}"):
            expected = (
                {"named": (f"{name}: required",)} if defaults is None else {"values": defaults}
            )
            return self.place("section", "distill", name, snippet, **expected)
        named = (f"{name}: expected a section",)
        return self.place("section", self.base(), name, snippet, named=named)

    def document(self) -> Mutant:
        return document_mutant(*self.random.choice(DOCUMENTS))

    def broken_override(self) -> Mutant:
        override, name = self.random.choice(BROKEN_OVERRIDES)
        overrides = (self.harmless(), override)
        return Mutant("broken-override", to_yaml(BASES[self.base()]), overrides, named=(name,))

    def conflict(self) -> Mutant:
        base, overrides, named = self.random.choice(CONFLICTS)
        shuffled = self.random.sample((self.harmless(), *overrides), k=1 + len(overrides))
        return Mutant("conflict", to_yaml(BASES[base]), tuple(shuffled), named=named)

    def layout(self) -> Mutant:
        model = self.random.choice(list(MODELS))
        sizes = MODELS[model]
        tp, pp = (
            self.random.choice((1, 2, 2, 3, 4, 6, 12, 16)),
            self.random.choice((1, 2, 3, 4, 5, 6)),
        )
        world_size = tp * pp * self.random.choice((1, 2, 5)) + self.random.choice((0, 0, 0, 1))
        num_layers = sizes["num_hidden_layers"]
        named: tuple[str, ...] = ()
        undivided = [
            name
            for name in CUT_BY_TP
            if sizes.get(name, 0) % tp and not (name == GROUPS and tp % sizes[name] == 0)
        ]
        if world_size % (tp * pp):
            named = (f"{world_size} ranks", f"{TP}={tp}", f"{PP}={pp}")
        elif undivided:
            named = (f"{TP}={tp}", f"{undivided[0]}={sizes[undivided[0]]}")
        elif pp > num_layers:
            named = (f"{PP}={pp}", f"{num_layers} layers")
        return Mutant(
            "layout",
            to_yaml(BASES["distill"]),
            (f"{TP}={tp}", f"{PP}={pp}"),
            named,
            values={TP: tp, PP: pp},
            world_size=world_size,
            model=model,
        )

    def harmless(self) -> str:
        return f"training.steps={self.random.randrange(1, 99)}"

    def base(self) -> str:
        return self.random.choice(list(BASES))

    def misspell(self, word: str, num_edits: int) -> str:
        """Delete, insert, replace or swap letters."""
        changed = word
        for _ in range(num_edits):
            i = self.random.randrange(len(changed))
            letter = self.random.choice(string.ascii_lowercase)
            changed = self.random.choice(
                (
                    changed[:i] + changed[i + 1 :],
                    changed[:i] + letter + changed[i:],
                    changed[:i] + letter + changed[i + 1 :],
                    changed[:i] + changed[i : i + 2][::-1] + changed[i + 2 :],
                )
            )
        is_new = changed and changed != word and changed not in SECTIONS
        return changed if is_new else self.misspell(word, num_edits)

    def draw(self) -> Iterator[Mutant]:
        """500 different mutants."""
        shares = (
            (self.bad_value, 150),
            (self.good_value, 90),
            (self.last_override_wins, 15),
            (self.misspelt_key, 60),
            (self.misspelt_section, 20),
            (self.wrong_section, 25),
            (self.section, 20),
            (self.document, 45),
            (self.broken_override, 20),
            (self.conflict, 25),
            (self.layout, 30),
        )
        for draw, count in shares:
            seen: set[tuple[bytes, tuple[str, ...], int, str]] = set()
            while len(seen) < count:
                mutant = draw()
                identity = mutant.content, mutant.overrides, mutant.world_size, mutant.model
                if identity not in seen:
                    seen.add(identity)
                    yield mutant


TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
GROUPS = "num_key_value_heads"  # ranks may also share them
QKV_ROWS = "(num_attention_heads + 2 * num_key_value_heads) * head_dim"
# In the order in which they are checked.
CUT_BY_TP = (
    "num_attention_heads",
    GROUPS,
    QKV_ROWS,
    "intermediate_size",
    "moe_intermediate_size",
)
MODELS: dict[str, dict[str, int]] = {
    "qwen3": {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        QKV_ROWS: 320,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
    },
    "llama": {
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        QKV_ROWS: 144,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
    },
    "qwen3_moe": {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        QKV_ROWS: 768,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
    },
}
MUTANTS = list(Generator(SEED).draw())


@pytest.fixture(scope="module")
def model_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of each of `MODELS`, without weights."""
    from tests.families import FAMILIES, SIZES
    from trb_megatron.huggingface.config import read_hf_config

    folder = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        own = {k: size for k, size in sizes.items() if k in SIZES}  # the others are the family's
        FAMILIES[name](**{**SIZES, **own, "hidden_size": 48}).save_pretrained(folder / name)
    return {name: read_hf_config(folder / name) for name in MODELS}


def write(mutant: Mutant, folder: Path) -> Path:
    file = folder / FILE
    file.write_bytes(mutant.content)
    return file


def value_at(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def check_readable(message: str, named: tuple[str, ...]) -> None:
    """An error names what it is about, and is written for people."""
    for name in named:
        assert name in message
    assert len(message) < 5000
    assert not re.search(r"Traceback|pydantic|Value error|\bConfig\b", message)


def test_every_option_and_base_is_covered() -> None:
    assert set(OPTIONS) == set(list_keys(Config))
    assert set(SECTIONS) == set(Config.model_fields) - {"teacher"}
    assert len(MUTANTS) == 500
    assert {len(mutant.named) > 0 for mutant in MUTANTS} == {True, False}


def list_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        sections = [s for s in SECTION_TYPES if re.search(rf"\b{s.__name__}\b", repr(info))]
        for inner in sections:
            yield from list_keys(inner, f"{prefix}{name}.{'math.' if name == 'sets' else ''}")
        if not sections:
            yield prefix + name


def subclasses(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


SECTION_TYPES = [cls for cls in subclasses(JobConfig.__mro__[1]) if not issubclass(cls, JobConfig)]


@pytest.mark.parametrize("base", BASES)
def test_base_is_valid(base: str, tmp_path: Path) -> None:
    load_config(write(Mutant("base", to_yaml(BASES[base])), tmp_path))


@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=[f"{i}-{mutant.kind}" for i, mutant in enumerate(MUTANTS)]
)
def test_mutant_is_refused_by_name_or_has_the_stated_value(
    mutant: Mutant, tmp_path: Path, model_configs: dict[str, Any]
) -> None:
    check(mutant, tmp_path, model_configs)


@pytest.mark.parametrize("key", OPTIONS)
def test_every_value_of_the_tables(key: str, tmp_path: Path) -> None:
    content = to_yaml(BASES["distill"])
    for snippet in OPTIONS[key].bad:
        check(Mutant("bad-value", content, (f"{key}={snippet}",), named=(key,)), tmp_path)
    for snippet, value in OPTIONS[key].good:
        check(Mutant("good-value", content, (f"{key}={snippet}",), values={key: value}), tmp_path)


def test_every_section_document_override_and_conflict(tmp_path: Path) -> None:
    for name, defaults in SECTIONS.items():
        named = (f"{name}: required",) if defaults is None else ()
        content = to_yaml(BASES["distill"], name, "null")
        check(Mutant("section", content, named=named, values=defaults or {}), tmp_path)
    for change, expected in DOCUMENTS:
        check(document_mutant(change, expected), tmp_path)
    for override, name in BROKEN_OVERRIDES:
        check(Mutant("override", to_yaml(BASES["distill"]), (override,), named=(name,)), tmp_path)
    for base, overrides, named in CONFLICTS:
        check(Mutant("conflict", to_yaml(BASES[base]), overrides, named), tmp_path)


def check(mutant: Mutant, folder: Path, model_configs: Mapping[str, Any] | None = None) -> None:
    """Load a mutant as a job would, and compare with what is expected of it."""
    if mutant.named:
        with pytest.raises(ValueError) as error:
            load_for_a_job(mutant, folder, model_configs)
        assert type(error.value) is ConfigError or mutant.kind == "layout"
        check_readable(str(error.value), mutant.named)
        return
    config = load_for_a_job(mutant, folder, model_configs)
    for key, expected in mutant.values.items():
        value = value_at(config, key)
        assert (type(value), value) == (type(expected), expected)
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config


def load_for_a_job(mutant: Mutant, folder: Path, model_configs: Mapping[str, Any] | None) -> Config:
    """What is checked before any weight is read."""
    config = load_config(write(mutant, folder), list(mutant.overrides))
    if model_configs is not None and mutant.model:
        from trb_megatron.huggingface.config import check_layout

        parallel = config.parallel
        check_world_size(parallel, mutant.world_size)
        check_layout(
            [model_configs[mutant.model]],
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
        )
    return config


# ---------------------------------------------------------------- the command line

COMMAND_LINES = """
import contextlib, io, json, sys

from trb_megatron.{module} import main

for line in sys.stdin:
    said = io.StringIO()
    status = None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(json.loads(line))
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue()]))
"""


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_command_line_ends_with_status_2_and_no_traceback(module: str, tmp_path: Path) -> None:
    refused = [m for m in MUTANTS if m.named and not m.world_size]
    chosen = refused[:: len(refused) // 30]
    arguments, named = [], []
    for number, mutant in enumerate(chosen):
        (tmp_path / str(number)).mkdir()
        file = write(mutant, tmp_path / str(number))
        if module == "evaluate" and concerns_training_alone(file, mutant):
            continue
        arguments.append([str(file), *mutant.overrides])
        named.append(mutant.named if module == "train" else needed_by_an_evaluation(mutant.named))
    assert len(named) >= 25
    valid = write(Mutant("base", to_yaml(BASES["distill"])), tmp_path)
    # One process is a job of one rank.
    arguments += [[], [str(tmp_path / "nowhere.yaml")], [str(tmp_path)], [str(valid), f"{TP}=3"]]
    named += [("CONFIG.yaml",), ("nowhere.yaml",), (str(tmp_path),), ("1 ranks", TP)]
    result = subprocess.run(
        [sys.executable, "-c", COMMAND_LINES.format(module=module)],
        input="".join(json.dumps(line) + "\n" for line in arguments),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for (status, said), names in zip(answers, named, strict=True):
        assert status == 2
        assert said.startswith(("error: ", "usage: "))
        check_readable(said, names)


def needed_by_an_evaluation(named: tuple[str, ...]) -> tuple[str, ...]:
    """What an error of an evaluation names: it needs no run's folder and no training prompts."""
    return tuple(name for name in named if name not in ("run: required", "data: required"))


def concerns_training_alone(file: Path, mutant: Mutant) -> bool:
    """Whether an evaluation doesn't mind: it needs neither a run's folder nor its behavior."""
    try:
        load_job_config(file, list(mutant.overrides))
    except ConfigError:
        return False
    return True


def test_the_program_itself_ends_with_status_2(tmp_path: Path) -> None:
    file = write(Mutant("base", to_yaml(BASES["distill"])), tmp_path)
    command = [sys.executable, "-m", "trb_megatron.train", str(file), "loss.top_k=\udcff"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 2
    check_readable(result.stderr, ("error: ", "loss.top_k"))
