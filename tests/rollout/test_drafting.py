"""The choice of the draft length: a pure function of costs and acceptance."""

import dataclasses
import json

import pytest

from trb_megatron.rollout.drafting import (
    DraftCosts,
    choose_num_positions,
    estimate_acceptance,
    expected_tokens,
    positions_to_time,
    sequences_to_time,
)


def costs(per_round: float, per_position: float, per_token: float) -> DraftCosts:
    """Of rounds that take per_round + G * (per_position + S * per_token) seconds."""
    counts = (1, 3, 9)
    rows = {
        s: [per_round + g * (per_position + s * per_token) for g in counts] for s in (1, 32, 128)
    }
    return DraftCosts.of_rows(counts, rows)


# A teacher call that costs as much as ten student steps, whatever it scores: memory-bound decoding.
MEMORY_BOUND = costs(per_round=10.0, per_position=1.0, per_token=0.0)
# Every token costs the same, drafted or not: drafts that are dropped are a loss.
COMPUTE_BOUND = costs(per_round=0.0, per_position=0.0, per_token=1.0)

# SmolLM2-135M as the teacher and 20 of its 30 layers as the student, on one core: at one sequence
# the products of a matrix with one vector wait for memory; with eight they don't.
REAL = DraftCosts.of_rows((1, 3, 9), {1: (0.095, 0.233, 0.459), 8: (0.170, 0.380, 1.070)})


def test_expected_tokens_are_those_of_the_design() -> None:
    """9 positions at the worst acceptance that budgets allow, from another implementation."""
    for budget, tokens in ((0.001, 8.24), (0.005, 7.40), (0.01, 6.83), (0.02, 6.13), (0.05, 4.98)):
        assert expected_tokens(1 - (budget / 2) ** 0.5, 9) == pytest.approx(tokens, abs=0.01)
    assert expected_tokens(1.0, 9) == 9
    assert expected_tokens(0.3, 1) == 1


def test_costs_between_measured_rounds_are_linear_in_each_piece() -> None:
    for (s, g), seconds in {
        (1, 1): 0.095,
        (8, 9): 1.070,
        (8, 2): 0.275,
        (8, 6): 0.725,
        (8, 17): 1.990,  # goes on as from 3 to 9
        (4.5, 3): 0.3065,
        (20, 3): 0.380,  # as the most sequences that were measured
    }.items():
        assert REAL.of_round(s, g) == pytest.approx(seconds)
    assert DraftCosts.of_rows((1,), {1: (0.1,)}).of_round(5, 3) == 0.1


def test_a_longer_round_is_never_cheaper() -> None:
    noisy = DraftCosts.of_rows((1, 3, 9), {1: (1.0, 3.0, 2.0), 64: (2.0, 1.0, 4.0)})
    for s in (1, 30, 64):
        seconds = [noisy.of_round(s, g) for g in range(1, 18)]
        assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize(
    ("most", "timed"),
    [(1, [1]), (3, [1, 3]), (8, [1, 8]), (16, [1, 4, 16]), (256, [1, 4, 16, 64, 256])],
)
def test_timed_are_a_step_s_sequences_and_those_of_its_tail(most: int, timed: list[int]) -> None:
    assert sequences_to_time(most) == timed


def test_no_timed_round_is_longer_than_a_round_may_be() -> None:
    assert positions_to_time(17) == [1, 3, 9]
    assert positions_to_time(5) == [1, 3, 5]
    assert positions_to_time(1) == [1]


def test_costs_survive_the_run_s_folder() -> None:
    stored = json.dumps(dataclasses.asdict(REAL))
    assert DraftCosts.from_json(json.loads(stored)) == REAL


def test_drafts_grow_where_calls_are_dear_and_acceptance_is_high() -> None:
    assert choose_num_positions(COMPUTE_BOUND, 0.95, 128, 17) == 1
    chosen = [choose_num_positions(MEMORY_BOUND, a, 4, 17) for a in (0.3, 0.7, 0.9, 0.99)]
    assert chosen == sorted(set(chosen)) and chosen[0] > 1
    assert choose_num_positions(MEMORY_BOUND, 1.0, 4, 17) == 17
    assert choose_num_positions(REAL, 0.97, 1, 17) > choose_num_positions(REAL, 0.97, 8, 17) > 1


def test_acceptance_begins_with_its_bound_and_follows_the_counts() -> None:
    assert estimate_acceptance(0.9, 0, 0) == pytest.approx(0.9)
    assert estimate_acceptance(0.9, 800, 1000) == pytest.approx(0.8, abs=0.01)
    assert estimate_acceptance(0.0, 800, 1000) == pytest.approx(0.8, abs=0.02)
