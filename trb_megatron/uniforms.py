"""Counter-based uniforms: random numbers keyed by what they decide, with no generator state.

They are computed on the host, by numpy: a few numbers through dozens of integer operations take a
tensor library several times as long, and a GPU a launch for each.
"""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Purpose(IntEnum):
    """The decision that a uniform makes; one position needs several independent ones."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    SHUFFLE = 3


_DRAWING = np.array([Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL])

# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.array([30, 27, 31, 11], dtype=np.uint64)


def counter_uniforms(
    seed: int | Tensor,
    step: int | Tensor,
    prompt_index: int | Tensor,
    rollout_index: int | Tensor,
    position: int | Tensor,
    purpose: int | Tensor,
) -> Tensor:
    """Return uniforms in [0, 1), float64 with 53 random bits, that depend on the arguments alone.

    Arguments are integers or int64 tensors on the CPU that broadcast together to the shape of the
    result. Equal arguments give equal bits in any batch. Each argument is folded into the state by
    the finalizer of SplitMix64.
    """
    counters = (seed, step, prompt_index, rollout_index, position, purpose)
    return _as_uniforms(_fold(np.uint64(0), *counters))


def rollout_key(
    seed: int | Tensor,
    step: int | Tensor,
    prompt_index: int | Tensor,
    rollout_index: int | Tensor,
) -> Tensor:
    """The state of `counter_uniforms` after the arguments that a rollout's positions share, int64.

    Arguments broadcast together.
    """
    state = _fold(np.uint64(0), seed, step, prompt_index, rollout_index)
    return torch.from_numpy(np.asarray(state).view(np.int64))


def drawing_uniforms(key: Tensor, position: Tensor) -> Tensor:
    """The uniforms of `counter_uniforms` that draw a token, [3, ...] by `Purpose`.

    At positions of rollouts with these keys, which broadcast together to [...].
    """
    state = _fold(_unsigned(key), position)
    return _as_uniforms(_fold(state, _DRAWING.reshape(-1, *[1] * state.ndim)))


def _as_uniforms(state: NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy(np.asarray((state >> _11) * 2.0**-53))


@np.errstate(over="ignore")  # sums and products wrap around, as the algorithm wants
def _fold(
    state: NDArray[np.uint64] | np.uint64, *counters: int | Tensor | NDArray[np.int64]
) -> NDArray[np.uint64]:
    for counter in counters:
        state = (state ^ _unsigned(counter)) + _INCREMENT
        state = (state ^ (state >> _30)) * _MULTIPLIER_1
        state = (state ^ (state >> _27)) * _MULTIPLIER_2
        state = state ^ (state >> _31)
    return np.asarray(state)


def _unsigned(counter: int | Tensor | NDArray[np.int64]) -> NDArray[np.uint64]:
    return np.asarray(counter, dtype=np.int64).view(np.uint64)
