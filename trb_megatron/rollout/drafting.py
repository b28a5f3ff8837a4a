"""How many tokens the student should draft before the teacher is asked.

A round of S sequences and G positions (G - 1 drafts and one more; G = 1 is token by token) takes
seconds(S, G), and yields, at acceptance a per position, (1 - a^G) / (1 - a) tokens per sequence
(Leviathan et al., arXiv 2211.17192, equation 1). The best G is a pure function of these seconds and
of the acceptance seen so far in a step. It changes the speed, never the tokens.

The seconds are measured once per run (`timing`) at some S and G, and interpolated between them: at
a fixed S they are nearly affine in G, but no plane over S and S * G fits both the products of a
matrix with one vector and those with many.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

PRIOR_POSITIONS = 16
"""Positions that the policy's bound on acceptance counts for, beside those that a step has seen."""

_TIMED_POSITIONS = (1, 3, 9)
"""Without drafts, and with few and many. Those beyond would double the time of the measurement."""
_SEQUENCES_RATIO = 4
"""Of neighbouring numbers of sequences that are timed."""


def sequences_to_time(num_sequences: int) -> list[int]:
    """Numbers of sequences to measure for a step of so many, as its slots empty: ascending."""
    counts = {1, num_sequences}
    while num_sequences >= _SEQUENCES_RATIO:
        counts.add(num_sequences)
        num_sequences //= _SEQUENCES_RATIO
    return sorted(counts)


def positions_to_time(max_positions: int) -> list[int]:
    """Numbers of positions to measure where a round has at most so many: ascending."""
    return sorted({min(count, max_positions) for count in _TIMED_POSITIONS})


@dataclass(frozen=True)
class DraftCosts:
    """Measured seconds of a round.

    Attributes:
        num_sequences, num_positions: where they were measured, ascending.
        seconds: [S, G], a row for each number of sequences; ascending in each row.
    """

    num_sequences: tuple[int, ...]
    num_positions: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @classmethod
    def of_rows(
        cls, num_positions: Sequence[int], rows: Mapping[int, Sequence[float]]
    ) -> DraftCosts:
        """From the measured seconds of each number of sequences.

        More positions never take less time: where a measurement says so, it is noise.
        """
        counts = sorted(rows)
        seconds = tuple(tuple(accumulate(rows[count], max)) for count in counts)
        return cls(tuple(counts), tuple(num_positions), seconds)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DraftCosts:
        """From what JSON made of `dataclasses.asdict`."""
        return cls(
            tuple(fields["num_sequences"]),
            tuple(fields["num_positions"]),
            tuple(map(tuple, fields["seconds"])),
        )

    def __str__(self) -> str:
        times = [
            f"{seconds:.3g} s with {count - 1}"
            for seconds, count in zip(self.seconds[-1], self.num_positions, strict=True)
        ]
        return f"a round of {self.num_sequences[-1]:,} takes {', '.join(times)} drafts"

    def of_round(self, num_sequences: int, num_positions: int) -> float:
        """Expected seconds of a round.

        Linear between measured points, and on from the last ones for more positions; numbers of
        sequences beyond the measured ones count as the nearest.
        """
        lowest, highest = self.num_sequences[0], self.num_sequences[-1]
        num_sequences = min(max(num_sequences, lowest), highest)
        of_positions = [
            _interpolate(self.num_sequences, column, num_sequences)
            for column in zip(*self.seconds, strict=True)
        ]
        return _interpolate(self.num_positions, of_positions, num_positions)


def _interpolate(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Piecewise linear through (points, values), and beyond them as in the nearest piece."""
    if len(points) == 1:
        return values[0]
    left = min(max(bisect_right(points, at) - 1, 0), len(points) - 2)
    share = (at - points[left]) / (points[left + 1] - points[left])
    return values[left] + share * (values[left + 1] - values[left])


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
        key=lambda g: expected_tokens(acceptance, g) / costs.of_round(num_sequences, g),
    )
