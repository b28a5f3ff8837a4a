"""The choice of the draft length: a pure function of costs and acceptance."""

import pytest

from trb_megatron.rollout.drafting import (
    DraftCosts,
    choose_num_positions,
    estimate_acceptance,
    expected_tokens,
    timed_positions,
    timed_sequences,
)

SIZES = tuple((s, g) for s in (1, 11, 128) for g in (1, 9, 17))
# A teacher call that costs as much as ten student steps, whatever it scores: memory-bound decoding.
MEMORY_BOUND = DraftCosts.of_rounds({(s, g): 10.0 + g for s, g in SIZES})
# Every token costs the same, drafted or not: drafts that are dropped are a loss.
COMPUTE_BOUND = DraftCosts.of_rounds({(s, g): float(s * g) for s, g in SIZES})


def test_expected_tokens_are_those_of_the_design() -> None:
    """9 positions at the worst acceptance that budgets allow, from another implementation."""
    for budget, tokens in ((0.001, 8.24), (0.005, 7.40), (0.01, 6.83), (0.02, 6.13), (0.05, 4.98)):
        assert expected_tokens(1 - (budget / 2) ** 0.5, 9) == pytest.approx(tokens, abs=0.01)
    assert expected_tokens(1.0, 9) == 9
    assert expected_tokens(0.3, 1) == 1


def test_costs_are_those_that_were_measured_and_linear_between() -> None:
    costs = DraftCosts.of_rounds({(1, 1): 1.0, (1, 9): 5.0, (64, 1): 4.0, (64, 9): 40.0})
    assert [costs.predict(*size) for size in ((1, 1), (1, 9), (64, 1), (64, 9))] == [1, 5, 4, 40]
    assert costs.predict(1, 5) == pytest.approx(3.0)
    assert costs.predict(22, 1) == pytest.approx(2.0)
    assert costs.predict(22, 5) == pytest.approx((2 * 3 + 22) / 3)


def test_no_larger_round_is_predicted_to_be_faster() -> None:
    costs = DraftCosts.of_rounds({(1, 1): 1.0, (1, 9): 0.5, (64, 1): 2.0, (64, 9): 1.5})
    seconds = [[costs.predict(s, g) for g in (1, 5, 9)] for s in (1, 30, 64)]
    assert all(row == sorted(row) for row in (*seconds, *map(list, zip(*seconds, strict=True))))


def test_the_choice_follows_the_tail_of_a_step() -> None:
    """Rounds of many sequences cost as they have tokens, those of a few hardly more than one."""
    costs = DraftCosts.of_rounds({(s, g): max(8.0, s * g / 16) for s, g in SIZES})
    chosen = [choose_num_positions(costs, 0.9, s, 17) for s in (128, 32, 1)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


@pytest.mark.parametrize(
    ("num_sequences", "expected"), [(1, (1,)), (2, (1, 2)), (8, (1, 3, 8)), (256, (1, 16, 256))]
)
def test_rounds_are_timed_as_a_step_has_them(num_sequences: int, expected: tuple[int, ...]) -> None:
    assert timed_sequences(num_sequences) == expected
    assert timed_positions(17) == (1, 9, 17)
    assert timed_positions(1) == (1,)


def test_drafts_grow_where_calls_are_dear_and_acceptance_is_high() -> None:
    assert choose_num_positions(COMPUTE_BOUND, 0.95, 128, 17) == 1
    chosen = [choose_num_positions(MEMORY_BOUND, a, 4, 17) for a in (0.3, 0.7, 0.9, 0.99)]
    assert chosen == sorted(set(chosen)) and chosen[0] > 1
    assert choose_num_positions(MEMORY_BOUND, 1.0, 4, 17) == 17


def test_acceptance_begins_with_its_bound_and_follows_the_counts() -> None:
    assert estimate_acceptance(0.9, 0, 0) == pytest.approx(0.9)
    assert estimate_acceptance(0.9, 800, 1000) == pytest.approx(0.8, abs=0.01)
    assert estimate_acceptance(0.0, 800, 1000) == pytest.approx(0.8, abs=0.02)
