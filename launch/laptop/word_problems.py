"""Word problems of one or two steps, in the manner of GSM8K, with their answers."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

FILES = {"heldout.jsonl": 40, "prompts.jsonl": 400}
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "cards", "eggs", "marbles", "pencils", "shells", "stamps")

# Each with its answer from three numbers, of which the first is the largest.
TEMPLATES: tuple[tuple[str, Callable[[int, int, int], int]], ...] = (
    (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",
        lambda a, b, c: a + b,
    ),
    (
        "{name} has {a} {thing} and gives away {b} of them. How many {thing} are left?",
        lambda a, b, c: a - b,
    ),
    (
        "{name} fills {b} boxes with {a} {thing} each. How many {thing} are in the boxes?",
        lambda a, b, c: a * b,
    ),
    (
        "{name} has {a} {thing}, loses {b} of them and then buys {c}. How many {thing} does "
        "{name} have now?",
        lambda a, b, c: a - b + c,
    ),
    (
        "{name} has {a} {thing} and buys {b} bags with {c} {thing} each. How many {thing} does "
        "{name} have in all?",
        lambda a, b, c: a + b * c,
    ),
)


def write_problems(folder: Path) -> None:
    """Write both files as JSON Lines with `prompt` and `answer`; no problem is in both."""
    problems = generate_problems()
    for name, count in FILES.items():
        rows = [json.dumps(problem) + "\n" for problem in islice(problems, count)]
        (folder / name).write_text("".join(rows), encoding="utf-8")


def generate_problems() -> Iterator[dict[str, str]]:
    """Yield problems, always the same in the same order, none of them twice."""
    rng = random.Random(0)
    seen = set()
    while True:
        text, solve = rng.choice(TEMPLATES)
        c, b, a = sorted(rng.sample(range(2, 30), 3))
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        prompt = text.format(name=name, thing=thing, a=a, b=b, c=c)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": str(solve(a, b, c))}
