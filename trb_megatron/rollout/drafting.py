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

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

PRIOR_POSITIONS = 16
"""Positions that the policy's bound on acceptance counts for, beside those that a step has seen."""

_TIMED_POSITIONS = (1, 3, 9)
"""Beside the most that a round may have: without drafts, and with few and many."""
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
    return sorted({min(count, max_positions) for count in (*_TIMED_POSITIONS, max_positions)})


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

        Linear between measured points; beyond them as at the nearest.
        """
        of_positions = [
            _interpolate(self.num_sequences, column, num_sequences)
            for column in zip(*self.seconds, strict=True)
        ]
        return _interpolate(self.num_positions, of_positions, num_positions)


def _interpolate(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Piecewise linear through (points, values), and constant beyond them."""
    right = bisect_left(points, at)
    if right == len(points):
        return values[-1]
    if right == 0:
        return values[0]
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def expected_tokens(acceptance: float, num_positions: int) -> float:
    """Mean tokens that a round of `num_positions` commits for one sequence."""
    return sum(acceptance**i for i in range(num_positions))


def estimate_acceptance(least_acceptance: float, num_accepted: int, num_scanned: int) -> float:
    """Acceptance of a step: its counts, begun with the policy's bound from below."""
    num_positions = PRIOR_POSITIONS + num_scanned
    return (PRIOR_POSITIONS * least_acceptance + num_accepted) / num_positions


def choose_num_positions(
    costs: DraftCosts,
    acceptance: float,
    num_sequences: int,
    remaining: Iterable[int],
    max_positions: int,
) -> int:
    """The G with the most expected tokens per second, from 1 to `max_positions`.

    Args:
        num_sequences: that go through rounds together.
        remaining: tokens that each response may still get, at least 1. No sequence gets more from a
            round, so that the last rounds of long responses don't draft for those that end.
    """
    room = Counter(min(count, max_positions) for count in remaining)

    def tokens_per_second(num_positions: int) -> float:
        tokens = sum(
            num_such * expected_tokens(acceptance, min(num_positions, count))
            for count, num_such in room.items()
        )
        return tokens / costs.of_round(num_sequences, num_positions)

    return max(range(1, max(room) + 1), key=tokens_per_second)
