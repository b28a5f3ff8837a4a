"""How many tokens the student should draft before the teacher is asked.

A round of S sequences and G positions (G - 1 drafts and one more; G = 1 is token by token) takes

    seconds(S, G) = per_round + G * per_position + S * G * per_token

and yields, at acceptance a per position, (1 - a^G) / (1 - a) tokens per sequence (Leviathan et al.,
arXiv 2211.17192, equation 1). The best G is a pure function of these costs, which are measured once
per run, and of the acceptance seen so far in a step. It changes the speed, never the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PRIOR_POSITIONS = 16
"""Positions that the policy's bound on acceptance counts for, beside those that a step has seen."""


@dataclass(frozen=True)
class DraftCosts:
    """Seconds of a round, in three parts; see the module docstring."""

    per_round: float
    per_position: float
    per_token: float

    @classmethod
    def fit(cls, seconds: Mapping[tuple[int, int], float]) -> DraftCosts:
        """Least squares over measured rounds, (S, G) -> seconds; negative parts become 0."""
        design = np.array([(1.0, g, s * g) for s, g in seconds])
        parts, *_ = np.linalg.lstsq(design, np.array(list(seconds.values())), rcond=None)
        return cls(*(max(0.0, float(part)) for part in parts))

    def seconds(self, num_sequences: int, num_positions: int) -> float:
        """Predicted seconds of a round."""
        per_position = self.per_position + num_sequences * self.per_token
        return self.per_round + num_positions * per_position


def expected_tokens(acceptance: float, num_positions: int) -> float:
    """Mean tokens that a round of `num_positions` commits for one sequence."""
    return sum(acceptance**i for i in range(num_positions))


def estimate_acceptance(least_acceptance: float, num_accepted: int, num_scanned: int) -> float:
    """Acceptance of a step: its counts, begun with the policy's bound from below."""
    num_positions = PRIOR_POSITIONS + num_scanned
    return (PRIOR_POSITIONS * least_acceptance + num_accepted) / num_positions


def choose_num_positions(
    costs: DraftCosts, acceptance: float, num_sequences: int, max_positions: int
) -> int:
    """The G, from 1 to `max_positions`, with the most expected tokens per second."""
    return max(
        range(1, max_positions + 1),
        key=lambda g: expected_tokens(acceptance, g) / costs.seconds(num_sequences, g),
    )
