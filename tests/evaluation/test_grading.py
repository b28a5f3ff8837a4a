r"""What counts as right: pairs of a right answer and a response, and rules one by one.

`grading_pairs.jsonl` holds our own pairs, of the kinds that users of comparable systems reported;
`../shared/cases/grading.jsonl` holds others, where it is there.
"""

import json
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from trb_megatron.evaluation.comparison import grade, is_right, normalize
from trb_megatron.evaluation.final_answer import FinalAnswer, find_answer
from trb_megatron.evaluation.rewards import RewardWorkers

OWN_PAIRS = Path(__file__).with_name("grading_pairs.jsonl")
HANDED_OUT = Path(__file__).resolve().parents[3] / "shared" / "cases" / "grading.jsonl"


def misjudged(file: Path) -> dict[tuple[str, str], bool]:
    """The pairs of a file whose verdict is not that of the file, and our verdict."""
    # Numbers reach the grader as the text of the file, as the reader of problems hands them over.
    lines = file.read_text().splitlines()
    pairs: list[Any] = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    with RewardWorkers(workers=2, timeout_s=30.0) as workers:
        grades = workers.grade([p["response"] for p in pairs], [p["gold"] for p in pairs])
        assert workers.num_timeouts == 0
    return {
        (pair["gold"], pair["response"]): grade.is_right
        for pair, grade in zip(pairs, grades, strict=True)
        if grade.is_right != pair["right"]
    }


def test_own_pairs() -> None:
    assert misjudged(OWN_PAIRS) == {}


def test_handed_out_pairs() -> None:
    if not HANDED_OUT.exists():
        pytest.skip(f"the handed-out pairs are not at {HANDED_OUT}")
    assert misjudged(HANDED_OUT) == {}


# ---------------------------------------------------------------- numbers


def spellings(value: Fraction, rng: random.Random) -> Iterator[str]:
    """Ways to write a number that ends after a few decimals."""
    plain = f"{float(value):.6f}".rstrip("0").rstrip(".")
    yield plain
    yield f"{value.numerator}/{value.denominator}"
    sign = "-" if value < 0 else ""
    yield rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    yield f"{float(value):.10e}"
    power = rng.randrange(-9, 9)
    scaled = value * Fraction(10) ** power
    yield rf"{float(scaled):.18f}".rstrip("0").rstrip(".") + rf" \times 10^{{{-power}}}"
    yield f"${plain}$."
    yield f"**{plain}**"
    yield rf"\text{{{plain}}}"
    yield rf"{float(value * 100):.4f}\%"
    yield f"{float(value):,.6f}"
    yield plain.replace("-", "\u2212").translate({ord("0") + n: ord("０") + n for n in range(10)})


def test_a_number_is_itself_however_it_is_written_and_no_other() -> None:
    rng = random.Random(1)
    for _ in range(40):
        value = Fraction(rng.randrange(-(10**7), 10**7), 10 ** rng.randrange(0, 5))
        other = value + Fraction(rng.choice((-1, 1)), 10 ** rng.randrange(0, 5))
        gold = normalize(rng.choice(list(spellings(value, rng))))
        for spelling in spellings(value, rng):
            assert is_right(gold, normalize(spelling)), (gold, spelling)
        for spelling in spellings(other, rng):
            if other not in (value, value * 100, value / 100):
                assert not is_right(gold, normalize(spelling)), (gold, spelling)


@pytest.mark.parametrize("exponent", [-300, -40, -12, -7, -6, 0, 6, 12, 40, 300])
def test_numbers_of_all_sizes_are_compared_by_ratio(exponent: int) -> None:
    for gold in (
        f"3e{exponent}",
        rf"3 \cdot 10^{{{exponent}}}",
        rf"\frac{{3}}{{10^{{{-exponent}}}}}",
    ):
        same, other = rf"3\times 10^{{{exponent}}}", rf"3.001\times 10^{{{exponent}}}"
        assert is_right(normalize(gold), normalize(same)), gold
        assert not is_right(normalize(gold), normalize(other)), gold
        assert not is_right(normalize(gold), "0"), gold


IRRATIONAL = {
    r"\frac{1}{3}": 1 / 3, r"\frac{2}{7}": 2 / 7, r"\sqrt{2}": math.sqrt(2), r"\pi": math.pi,
    r"5\pi": 5 * math.pi, "e^2": math.exp(2), r"\frac{1}{\sqrt{7}}": 1 / math.sqrt(7),
}  # fmt: skip


@pytest.mark.parametrize("exact", IRRATIONAL)
def test_a_decimal_of_six_places_may_stand_for_an_exact_value(exact: str) -> None:
    for places in range(1, 13):
        decimal = f"{IRRATIONAL[exact]:.{places}f}"
        wrong = f"{IRRATIONAL[exact] + 3 * 10**-places:.{places}f}"
        for gold, answer in ((exact, decimal), (decimal, exact)):
            assert is_right(normalize(gold), normalize(answer)) == (places >= 6), (gold, answer)
        assert not is_right(normalize(exact), wrong), wrong


@pytest.mark.parametrize("exact", [2**53 + 1, 2**64, 3**43, -(7**30)])
def test_integers_have_all_their_digits_and_floats_fifteen(exact: int) -> None:
    for other in (exact - 1, exact + 1):
        assert not is_right(normalize(str(exact)), normalize(str(other)))
    for decimal in (repr(float(exact)), f"{float(exact):.16e}", f"{float(exact):.1f}"):
        assert is_right(normalize(str(exact)), normalize(decimal)), decimal
        assert is_right(normalize(decimal), normalize(str(exact))), decimal


@pytest.mark.parametrize("term", ["2^{100}", "2^{2024}", "2025!", r"\binom{200}{100}", r"\pi^{60}"])
def test_constants_are_compared_to_the_last_digit_of_their_terms(term: str) -> None:
    for gold, same, *others in (
        (f"{term}-1", f"-1+{term}", term, f"{term}+1", f"{term}-2"),
        (
            rf"1-\frac{{1}}{{{term}}}",
            rf"\frac{{{term}-1}}{{{term}}}",
            "1",
            rf"1+\frac{{1}}{{{term}}}",
        ),
    ):
        assert is_right(normalize(gold), normalize(same))
        for other in others:
            assert not is_right(normalize(gold), normalize(other)), other
            assert not is_right(normalize(other), normalize(gold)), other


# ---------------------------------------------------------------- lists


def test_order_counts_in_brackets_and_not_in_sets() -> None:
    tuples, sets, bare = "({})", r"\{{{}\}}", "{}"
    for parts in (("1", "2"), ("1", "2", "3"), (r"\sqrt{2}", "x"), ("(1,2)", "(3,4)")):
        given, turned = ",".join(parts), ", ".join(reversed(parts))
        for gold, answer, in_order, in_reverse in (
            (tuples, tuples, True, False),
            (tuples, bare, True, False),
            (bare, tuples, True, False),
            (sets, sets, True, True),
            (sets, bare, True, True),
            (bare, sets, True, True),
            (bare, bare, True, True),
            (tuples, sets, False, False),
            (sets, tuples, False, False),
        ):
            right = normalize(gold.format(given))
            verdicts = [is_right(right, normalize(answer.format(p))) for p in (given, turned)]
            assert verdicts == [in_order, in_reverse], (right, answer)
            assert not is_right(right, normalize(answer.format(f"{given}, 9")))


# ---------------------------------------------------------------- where the answer stands


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{1}, \boxed{2}", "1,2"),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} and $\boxed{2}$, so \boxed{3} or \boxed{4}", "3,4"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\frac{1}{2}} \boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{1} \boxed{}", None),
        (r"\boxed{1} \boxed{\text{ }}", None),
        (r"\boxed{1} \boxed{\frac{1}{2}", None),
        (r"\boxed{1} \boxed", None),
        ("<think>1", None),
        (r"<think>\boxed{1}", None),
        ("<think>1</think>", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", None),
        ("1 + 1\n#### 2", "2"),
        ("#### 2\n3", None),
        ("", None),
    ],
)
def test_final_answer_is_the_last_box_or_mark(response: str, answer: str | None) -> None:
    found = find_answer(response)
    assert (found.text if found is not None and found.is_marked else None) == answer


def test_response_without_box_is_the_answer_as_a_whole() -> None:
    assert find_answer("It is 2.") == FinalAnswer("It is 2.", is_marked=False)
    assert find_answer("<think>1</think>It is 2.") == FinalAnswer("It is 2.", is_marked=False)
    assert grade("It is 2.", ["2"]) == (True, "2")
    assert grade("The answer is (B).", ["A", "B"]) == (True, "(B)")


def test_any_of_several_answers_is_right() -> None:
    assert grade(r"\boxed{yes}", ["no", "Yes"])[0]
    assert not grade(r"\boxed{yes}", [])[0]
    assert not grade(r"\boxed{yes}", ["no", "maybe"])[0]


LONG = (
    "a",
    "(",
    "{",
    "1,234",
    "$",
    "x=",
    r"\frac",
    "**a",
    "and ",
    "_",
    "1 234 ",
    r"\text{",
    "a:",
    "9" * 9,
    r"{\choose ",
    r"\binom{",
    r"\pm ",
    "2(3)",
    "1 to ",
    r"\text{m}\cdot ",
    "m^2/(s ",
)


@pytest.mark.timeout(60)  # a pattern that goes back and forth would take hours
@pytest.mark.parametrize("piece", LONG)
def test_rules_come_to_an_end_on_long_answers(piece: str) -> None:
    long = f"5 {piece * 3000}!"
    found = find_answer(rf"\boxed{{1}} {long} \boxed{{{long}}}")
    assert found is None or found.is_marked
    assert normalize(long) == " ".join(long.split())  # for math-verify, as it stands
    for length in (200, 2000):  # up to which rules look at all
        assert "\n" not in normalize(f"{long[: length - 1]}!")
