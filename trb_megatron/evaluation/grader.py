"""A grading process: is the final answer of a response right?

    python -m trb_megatron.evaluation.grader SECONDS [module:function]

`rewards` starts it. It reads one JSON line `[response, answers]` at a time from standard input and
writes one line of JSON: `{}` once when it is ready, then `{"reward": ..., "extracted": ...}` for
each line, where `extracted` is the answer as it was read, or null. `{"error": ...}` in place of
either says what is wrong with a grader of the user's own.

It starts in a second: it imports math-verify, but not torch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

_WORKER_MEMORY_BYTES = 4 * 2**30  # of address space: 9^{9^{9^9}} is refused, not computed

Reply = dict[str, Any]
GradeLine = Callable[[str, list[str]], Reply]


class GraderError(ValueError):
    """A grader of the user's own that cannot be used; the message says why."""


def serve(prepare: Callable[[], GradeLine], timeout_s: float) -> None:
    """Grade what arrives on standard input until it closes; the body of a worker process.

    The kernel ends the process when grading one line takes longer than `timeout_s`: SIGALRM keeps
    its default action, so no code, in whatever language, can miss it, and a worker whose parent is
    gone does not outlive its line. SIGTERM, which SLURM sends to every process of a preempted job,
    is for the ranks, which still grade the step that they are in.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))
    logging.disable()  # math-verify reports every expression it cannot compare
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply

    def reply(values: Reply) -> None:
        replies.write(json.dumps(values).encode() + b"\n")

    try:
        grade = prepare()
    except GraderError as error:
        reply({"error": str(error)})
        return
    reply({})
    for line in sys.stdin.buffer:
        response, answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        values = grade(response, answers)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(values)


def math_verify_grader() -> GradeLine:
    """The grader of this package."""
    from trb_megatron.evaluation.comparison import grade

    def grade_line(response: str, answers: list[str]) -> Reply:
        is_right, extracted = grade(response, answers)
        return {"reward": float(is_right), "extracted": extracted}

    return grade_line


def user_grader(name: str) -> GradeLine:
    """A grader `module:function` of the user's own, which takes a response and the right answers.

    Its result is a bool, or a reward from 0 to 1. What it raises is an error of the reply, but for
    memory and recursion: these are limits that a response broke, and end the process.

    Raises:
        GraderError: it cannot be imported, or not be called with two arguments.
    """
    function = _import_function(name)

    def grade_line(response: str, answers: list[str]) -> Reply:
        try:
            result = function(response, answers)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno}"
            return {"error": f"raises {type(error).__name__}: {error} ({where})"}
        is_number = isinstance(result, bool | int | float) and math.isfinite(result)
        if not is_number or not 0 <= result <= 1:
            return {"error": f"returns {result!r}; expected True, False or a number from 0 to 1"}
        return {"reward": float(result), "extracted": None}

    return grade_line


def _import_function(name: str) -> Callable[[str, list[str]], Any]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise GraderError(
            f"cannot import {module_name}: {type(error).__name__}: {error}; it is looked for in "
            "the current folder and in PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise GraderError(f"{module.__file__} has no function {function_name}")
    try:
        inspect.signature(function).bind("response", ["answer"])
    except TypeError as error:
        raise GraderError(
            f"{function_name}{inspect.signature(function)} cannot be called as "
            f"{function_name}(response, answers): {error}"
        ) from None
    return function


if __name__ == "__main__":
    _timeout_s, *_user = sys.argv[1:]
    serve((lambda: user_grader(_user[0])) if _user else math_verify_grader, float(_timeout_s))
