r"""The demo's problems: additions of two numbers, answered with every step written out.

    python launch/demo/problems.py    # writes launch/demo/data/prompts.jsonl and heldout.jsonl

The prompt "347+85" has the response

    7+5=12
    4+8+1=13
    3+1=4
    \boxed{432}

one line per digit from the right, the carry last. A hash of the prompt says which split it belongs
to, so that no problem is in two of them; nor is one listed twice.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path

DATA = Path(__file__).parent / "data"

# The first hexadecimal digit of the hash, by split: 1/16, 3/16, 4/16 and 8/16 of all problems.
SPLITS = {"heldout": "0", "prompts": "123", "student": "4567", "teacher": "89abcdef"}
NUM_DIGITS = (2, 3, 4)  # of either number, each equally often while unused problems last


def write_prompts(path: Path, split: str, count: int) -> None:
    """Write the first `count` problems of a split as JSON Lines with `prompt` and `answer`."""
    pairs = islice(generate_problems(split), count)
    _write_jsonl(path, ({"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in pairs))


def write_examples(path: Path, split: str, count: int, slip_rate: float = 0.0) -> None:
    """Write the first `count` problems of a split as JSON Lines with `prompt` and `response`."""
    rng = random.Random(f"{split} slips")
    pairs = islice(generate_problems(split), count)
    responses = ((a, b, write_response(a, b, rng, slip_rate)) for a, b in pairs)
    _write_jsonl(path, ({"prompt": f"{a}+{b}", "response": text} for a, b, text in responses))


def generate_problems(split: str) -> Iterator[tuple[int, int]]:
    """Yield the pairs of numbers of a split, always in the same order, none of them twice."""
    rng = random.Random(split)
    seen = set()
    while True:
        pair = _draw_number(rng), _draw_number(rng)
        if pair not in seen and _split_of(*pair) == split:
            seen.add(pair)
            yield pair


def write_response(a: int, b: int, rng: random.Random, slip_rate: float = 0.0) -> str:
    """Add the numbers digit by digit, one step per line, and box the result.

    With probability `slip_rate` a step is one too high or too low, and what follows builds on it.
    """
    lines = []
    result, carry, place = 0, 0, 1
    for digits in zip_longest(reversed(str(a)), reversed(str(b))):
        terms = [int(digit) for digit in digits if digit is not None] + [1] * carry
        total = sum(terms)
        if rng.random() < slip_rate:
            total = abs(total + rng.choice((-1, 1)))
        lines.append("+".join(map(str, terms)) + f"={total}")
        carry, digit = divmod(total, 10)
        result += digit * place
        place *= 10
    return "\n".join([*lines, f"\\boxed{{{result + carry * place}}}"])


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _draw_number(rng: random.Random) -> int:
    num_digits = rng.choice(NUM_DIGITS)
    return rng.randrange(10 ** (num_digits - 1), 10**num_digits)


def _split_of(a: int, b: int) -> str:
    first = hashlib.sha256(f"{a}+{b}".encode()).hexdigest()[0]
    return next(split for split, digits in SPLITS.items() if first in digits)


if __name__ == "__main__":
    write_prompts(DATA / "prompts.jsonl", "prompts", 2048)
    write_prompts(DATA / "heldout.jsonl", "heldout", 320)
