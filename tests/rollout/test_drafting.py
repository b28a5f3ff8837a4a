"""The choice of the draft length: a pure function of costs and acceptance."""

import pytest

from trb_megatron.rollout.drafting import (
    DraftCosts,
    choose_num_positions,
    estimate_acceptance,
    expected_tokens,
)

# A teacher call that costs as much as ten student steps, whatever it scores: memory-bound decoding.
MEMORY_BOUND = DraftCosts(per_round=10.0, per_position=1.0, per_token=0.0)
# Every token costs the same, drafted or not: drafts that are dropped are a loss.
COMPUTE_BOUND = DraftCosts(per_round=0.0, per_position=0.0, per_token=1.0)


def test_expected_tokens_are_those_of_the_design() -> None:
    """9 positions at the worst acceptance that budgets allow, from another implementation."""
    for budget, tokens in ((0.001, 8.24), (0.005, 7.40), (0.01, 6.83), (0.02, 6.13), (0.05, 4.98)):
        assert expected_tokens(1 - (budget / 2) ** 0.5, 9) == pytest.approx(tokens, abs=0.01)
    assert expected_tokens(1.0, 9) == 9
    assert expected_tokens(0.3, 1) == 1


def test_costs_are_fitted_exactly_where_they_are_affine() -> None:
    truth = DraftCosts(per_round=0.5, per_position=0.02, per_token=0.001)
    measured = {(s, g): truth.seconds(s, g) for s in (1, 64) for g in (1, 9)}
    fitted = DraftCosts.fit(measured)
    for part in ("per_round", "per_position", "per_token"):
        assert getattr(fitted, part) == pytest.approx(getattr(truth, part))


def test_no_cost_is_negative() -> None:
    fitted = DraftCosts.fit({(1, 1): 1.0, (1, 9): 0.5, (64, 1): 2.0, (64, 9): 1.0})
    assert min(fitted.per_round, fitted.per_position, fitted.per_token) >= 0


def test_drafts_grow_where_calls_are_dear_and_acceptance_is_high() -> None:
    assert choose_num_positions(COMPUTE_BOUND, 0.95, 128, 17) == 1
    chosen = [choose_num_positions(MEMORY_BOUND, a, 4, 17) for a in (0.3, 0.7, 0.9, 0.99)]
    assert chosen == sorted(set(chosen)) and chosen[0] > 1
    assert choose_num_positions(MEMORY_BOUND, 1.0, 4, 17) == 17


def test_acceptance_begins_with_its_bound_and_follows_the_counts() -> None:
    assert estimate_acceptance(0.9, 0, 0) == pytest.approx(0.9)
    assert estimate_acceptance(0.9, 800, 1000) == pytest.approx(0.8, abs=0.01)
    assert estimate_acceptance(0.0, 800, 1000) == pytest.approx(0.8, abs=0.02)
