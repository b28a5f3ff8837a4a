"""What options are made of: sections, the kinds of values, and the error for what cannot run."""

import math
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the keys and the fix."""


class Section(BaseModel):
    """A group of options: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _check_path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("expected a path; put quotes around a name that is a number or a flag")
    if value == "":
        raise ValueError("an empty path; name a file or folder")  # Path("") would be the cwd
    if re.search("[\0\ud800-\udfff]", str(value)):
        raise ValueError("no file can have this name")
    return value


def _check_grader(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise ValueError("expected module:function, such as my_rewards:grade")
    return value


def _check_date(value: Any) -> Any:
    is_text = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)
    if not (is_text or type(value) is date):  # pydantic would take seconds since 1970, too
        raise ValueError("expected a date such as 2026-11-25")
    return value


def _check_scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError("expected text, a number, true, false or null")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def refuse_duplicates(values: tuple[int, ...]) -> tuple[int, ...]:
    """Check that no number comes twice."""
    if len(set(values)) != len(values):
        raise ValueError("the same number is listed twice")
    return values


def between(least: float, most: float) -> FieldInfo:
    """A number within bounds, strictly: `steps: true` and `seed: '3'` are mistakes, no numbers."""
    info: FieldInfo = Field(strict=True, ge=least, le=most)
    return info


def zero_or_between(least: float, most: float) -> AfterValidator:
    """0, or a number within bounds."""

    def check(value: float) -> float:
        if value != 0 and not least <= value <= most:
            raise ValueError(f"expected 0 or a number from {least:g} to {most:g}")
        return value

    return AfterValidator(check)


def auto_or_between(least: int, most: int) -> BeforeValidator:
    """The word auto, or a whole number within bounds."""

    def check(value: Any) -> Any:
        if value != "auto" and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"expected auto or a whole number from {least} to {most:,}")
        return value

    return BeforeValidator(check)


# Lengths and indices have 32 bits in many places.
_MOST = 2**31 - 1

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, between(1, _MOST)]
CountFromZero = Annotated[int, between(0, _MOST)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, between(0, 1)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1)]
# Logits divided by less overflow, and what is left of them by more is noise.
Temperature = Annotated[float, between(0.01, 100)]
TemperatureOrGreedy = Annotated[float, Field(strict=True), zero_or_between(0.01, 100)]
Name = Annotated[str, Field(min_length=1)]
ConfigPath = Annotated[Path, BeforeValidator(_check_path), AfterValidator(Path.expanduser)]
Date = Annotated[date, BeforeValidator(_check_date)]
GraderName = Annotated[str, AfterValidator(_check_grader)]
TemplateOption = Annotated[bool | int | float | str | None, BeforeValidator(_check_scalar)]
# A set's name becomes part of metric names and of override keys.
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]

LossName = Literal[
    "reverse_kl_topk",
    "reverse_kl_topk_policy_gradient",
    "reverse_kl_full",
    "reverse_kl_sampled",
    "forward_kl_full",
    "jsd",
    "veto",
    "cross_entropy",
]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise"]
