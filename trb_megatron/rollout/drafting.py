"""How many tokens the student should draft before the teacher is asked.

A round of S sequences and G positions (G - 1 drafts and one more; G = 1 is token by token) takes
seconds(S, G) and yields, at acceptance a per position, (1 - a^G) / (1 - a) tokens per sequence
(Leviathan et al., arXiv 2211.17192, equation 1). The best G is a pure function of these costs,
which are measured once per run, and of the acceptance seen so far in a step. It changes the speed,
never the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PRIOR_POSITIONS = 16
"""Positions that the policy's bound on acceptance counts for, beside those that a step has seen."""


def timed_sequences(num_sequences: int) -> tuple[int, ...]:
    """The numbers of sequences whose rounds are timed: all of a step, few and one as it ends."""
    return tuple(sorted({1, round(num_sequences**0.5), num_sequences}))


def timed_positions(max_positions: int) -> tuple[int, ...]:
    """The numbers of positions whose rounds are timed: without drafts, half of the most, all."""
    return tuple(sorted({1, (max_positions + 1) // 2, max_positions}))


@dataclass(frozen=True)
class DraftCosts:
    """Seconds of rounds: as measured, and linear between the sizes that were measured.

    Not a plane through all of them: on a CPU small rounds cost far less a token than a plane has it
    that fits the large ones, and the small ones are those that end a step.

    Attributes:
        num_sequences, num_positions: sizes of the rounds, ascending.
        seconds: of each number of sequences the seconds at each number of positions.
    """

    num_sequences: tuple[int, ...]
    num_positions: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @classmethod
    def of_rounds(cls, seconds: Mapping[tuple[int, int], float]) -> DraftCosts:
        """The costs from rounds of all sizes, (S, G) -> seconds.

        A larger round that was faster than a smaller one, by noise, counts as slow as that.
        """
        sequences, positions = (tuple(sorted(set(sizes))) for sizes in zip(*seconds, strict=True))
        measured = np.array([[seconds[s, g] for g in positions] for s in sequences])
        rising = np.maximum.accumulate(np.maximum.accumulate(measured, axis=0), axis=1)
        return cls(sequences, positions, tuple(map(tuple, rising.tolist())))

    def predict(self, num_sequences: int, num_positions: int) -> float:
        """Seconds of a round; outside of what was measured those of the nearest size."""
        at_sizes = [np.interp(num_positions, self.num_positions, row) for row in self.seconds]
        return float(np.interp(num_sequences, self.num_sequences, at_sizes))


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
        key=lambda g: expected_tokens(acceptance, g) / costs.predict(num_sequences, g),
    )
