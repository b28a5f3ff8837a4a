"""The list of mutants fits the sources, the tests, and the claims of docs/testing.md."""

import re
from collections import Counter

import pytest

from tests.mutants import (
    COULD_NOT_RUN,
    KILLED,
    MUTANTS,
    ROOT,
    SURVIVED,
    Mutant,
    find_source,
    find_test,
    judge,
)

LEAST_NUMBER = 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fits(mutant: Mutant) -> None:
    file = find_source(mutant, ROOT)
    assert mutant.new != mutant.old
    assert mutant.old == mutant.old.lstrip()
    compile(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), str(file), "exec")
    assert mutant.tests
    for test in mutant.tests:
        find_test(test, ROOT)


def test_there_are_enough_and_each_has_its_name() -> None:
    assert len(MUTANTS) >= LEAST_NUMBER
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_every_claim_of_the_table_has_a_mutant() -> None:
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    section = page.partition("\n## Claims and their tests\n")[2]
    table = re.search(r"\|---\|---\|\n((?:\|.*\n)+)", section)
    assert table is not None
    rows = [row.removeprefix("| ") for row in table[1].splitlines()]
    assert len(rows) > 20
    claims = tuple(mutant.claim for mutant in MUTANTS)
    assert [row for row in rows if not row.startswith(claims)] == []


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (1, "FAILED tests/test_a.py::test_b - AssertionError", KILLED),
        (1, "ERROR tests/test_a.py::test_b - RuntimeError", KILLED),  # in a fixture
        (0, "3 passed in 0.1s", SURVIVED),
        (0, "3 skipped in 0.1s", SURVIVED),
        (1, "an output without a summary", COULD_NOT_RUN),
        (2, "ERROR tests/test_a.py - NameError", COULD_NOT_RUN),  # in an import
        (4, "ERROR: not found: tests/test_a.py::test_b", COULD_NOT_RUN),
        (5, "1 deselected in 0.1s", COULD_NOT_RUN),
        (None, "", COULD_NOT_RUN),
    ],
)
def test_verdict(status: int | None, output: str, verdict: str) -> None:
    assert judge(status, output)[0] == verdict
