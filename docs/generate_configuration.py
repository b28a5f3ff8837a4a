"""Write docs/configuration.md from the configuration's own definitions.

    python docs/generate_configuration.py            (from the root of the repository)
    python docs/generate_configuration.py --check    (exit status 1 if the page is not current)

Names, types, defaults and descriptions come from the pydantic models of
`trb_megatron.config.options`; a description is the docstring below a field.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed will do

from trb_megatron.config.options import Config  # noqa: E402

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

With this page you can look up every option: its type, its default, and what it does.

<!-- Written by docs/generate_configuration.py from the docstrings in trb_megatron/config. -->

A configuration is one YAML file, such as
[`launch/configs/qwen3_1.7b_from_8b.yaml`](../launch/configs/qwen3_1.7b_from_8b.yaml), plus
`section.key=value` overrides on the command line. Overrides are applied in order, and their
values have YAML syntax: `data.system_prompt=null`, `evaluation.pass_at=[1,4]`. What YAML would
leave out of an override is refused: ` #` and what follows, an anchor, a line break. Put such text
in quotes inside those of the shell: `"data.system_prompt='End with #### and the answer.'"`. Only
`run.dir`, `student.path`, `data.path` and, for distillation, `teacher.path` have no default. An
[evaluation](evaluation.md#of-a-checkpoint) needs `student.path` and `evaluation.sets` alone.

- YAML is plain YAML 1.2 without tags: `yes`, dates and `0x1F` are text, `010` is ten.
- An unknown key, a wrong value or an impossible combination is refused at the start, with the key
  and the fix. A number in quotes is text and is refused where a number is expected, and so is
  `true`.
- Paths are relative to the current directory, and `~` is your home folder.
- The resolved configuration is written to `RUN/config.yaml`. [Operations](operations.md#resume)
  lists what a resume may change.
"""

COMBINATIONS = """\
## Impossible combinations

These are refused at the start:

- **Task.** `training.task=distill` needs `teacher.path` and a loss that uses it, so not
  `cross_entropy`. `training.task=supervised` needs `loss.name=cross_entropy` and
  `data.response_column`.
- **Behavior.** `behavior.kl_budget=0` with a policy other than `trb`, which has no budget. A
  policy that asks the teacher (`skd`, `teacher`, or `trb` with a budget) with
  `behavior.warmup_steps=0` or `rollout.temperature=0`. `behavior.skd_top_k` or
  `behavior.skd_temperature` with another policy than `skd`.
- **Loss.** `loss.veto_coef` above 0 with a loss other than `veto`. `loss.top_k` or
  `behavior.skd_top_k` beyond the number of token ids.
- **Optimizer.** `optimizer.lr` × `optimizer.weight_decay` of 1 or more.
- **Precision.** `training.fp8_recipe` without `training.precision=fp8`. FP8 on a machine that
  [lacks what it needs](gpus.md#fp8).
- **Layout.** `parallel.sequence_parallel=true` with a tensor parallel size of 1. A number of
  ranks that is no multiple of tensor × pipeline parallel size. A step with fewer responses than
  data-parallel replicas.
- **Data.** `data.system_prompt`, `data.chat_template_kwargs` or `data.template_date` with
  `data.apply_chat_template=false`.
- **Lengths.** `data.max_prompt_tokens` + `max_response_tokens` (of `rollout` or `evaluation`)
  beyond the positions of a model.
- **Memory.** A `rollout.cache_gb` that holds less than one sequence. A run that does not fit the
  GPUs.
- **Evaluation.** A k in `evaluation.pass_at` above `evaluation.samples`. More than one sample
  with `evaluation.temperature=0`.

The same student and teacher folder is allowed, with a warning: the loss starts at zero.
"""


def main() -> int:
    """Write the page, or compare it with what would be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE}: not current; run python docs/generate_configuration.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    sections = {name: _models_in(f.annotation)[0] for name, f in Config.model_fields.items()}
    for name, section in sections.items():
        field = Config.model_fields[name]
        is_shared = list(sections.values()).count(section) > 1
        what = f"{field.description} {section.__doc__}" if is_shared else section.__doc__
        if isinstance(field.default, BaseModel):
            what = f"{what} This section may be left out."
        parts.append(f"## `{name}`\n\n{what}\n\n{_table(section)}")
        for key, inner in section.model_fields.items():
            for model in _models_in(inner.annotation):
                title = f"### `{name}.{key}.NAME`\n\n{model.__doc__}"
                parts.append(f"{title}\n\n{_table(model)}")
    return "\n".join([*parts, COMBINATIONS])


def _table(section: type[BaseModel]) -> str:
    lines = ["| key | value | default | what it does |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        description = " ".join((field.description or "").split())
        cells = (
            f"`{key}`",
            _describe(field.annotation, field.metadata),
            _default(field),
            description,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    default = field.default
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{_number(default) if isinstance(default, float) else default}`"


# ---------------------------------------------------------------- types in words


def _describe(annotation: Any, metadata: list[Any]) -> str:
    """A type with its constraints, in words."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _describe(inner, [*more, *metadata])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        element = _describe(get_args(annotation)[0], [])
        return f"list of different {element.replace('number', 'numbers', 1)}"
    if get_origin(annotation) is dict:
        if not _models_in(annotation):
            return "mapping of names to text, numbers, `true`, `false` or `null`"
        return "sections by name (letters, digits, `_`, `-`)"
    alternatives = [part for part in get_args(annotation) if part is not NoneType]
    if alternatives:
        words = [_describe(part, metadata) for part in alternatives]
        if NoneType in get_args(annotation):
            words.append("`null`")
        return " or ".join(words)
    return _describe_plain(annotation, metadata)


def _describe_plain(annotation: type, metadata: list[Any]) -> str:
    if annotation is bool:
        return "`true`, `false`"
    if annotation is str:
        return "text"
    if annotation is Path:
        return "path"
    if annotation is date:
        return "date, as `2026-11-25`"
    kind = "whole number" if annotation is int else "number"
    for constraint in _validators(metadata):
        bounds = inspect.getclosurevars(constraint).nonlocals
        if {"least", "most"} <= set(bounds):
            zero = "0, or " if "zero_or" in constraint.__qualname__ else ""
            return f"{zero}{kind} {_range(bounds['least'], bounds['most'])}"
    least = most = None
    below = False
    for constraint in _flat(metadata):
        least = getattr(constraint, "ge", least)
        most = getattr(constraint, "le", most)
        if getattr(constraint, "lt", None) is not None:
            most, below = constraint.lt, True
    if least is None:
        return kind
    if below:
        return f"{kind} from {_number(least)} to below {_number(most)}"
    return f"{kind} {_range(least, most)}"


def _range(least: float, most: float | None) -> str:
    # Bounds that are there only because numbers have 32 or 64 bits say nothing to a reader.
    if most is None or most >= 2**31 - 1:
        return f"from {_number(least)}"
    return f"from {_number(least)} to {_number(most)}"


def _number(value: float) -> str:
    if isinstance(value, float) and value != 0 and not 1e-3 <= abs(value) < 1e6:
        return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{value:g}")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _flat(metadata: list[Any]) -> Iterator[Any]:
    """Constraints, also those inside a `Field(...)`."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _validators(metadata: list[Any]) -> Iterator[Any]:
    for item in _flat(metadata):
        if isinstance(item, AfterValidator | BeforeValidator):
            yield item.func


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    candidates = (annotation, *get_args(annotation))
    return [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]


if __name__ == "__main__":
    sys.exit(main())
