"""Random numbers keyed by what they decide, with no generator state.

A counter-based hash folds counters into 64 bits: the seed, the step, the indices of prompt and
rollout, the position, the purpose, and for noise the level and the number of the chunk or id. Equal
counters give equal bits in any batch and on any device, since all of it is integer arithmetic. On a
CPU numpy does it: a tensor library takes several times as long for a few numbers.
"""

from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Purpose(IntEnum):
    """The decision that a random number makes; one position needs several independent ones."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    SHUFFLE = 3


class Level(IntEnum):
    """The choice that noise is for (`behavior.sampling`): a chunk of ids, or an id of a chunk."""

    CHUNK = 0
    ID = 1


Integers: TypeAlias = Any
"""Arrays of numpy or tensors of any device, int64."""

# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def fold(state: Integers, counter: Integers | int) -> Integers:
    """Fold a counter into a state by the finalizer of SplitMix64; they broadcast together.

    The same bits for arrays of numpy and for tensors of any device.
    """
    state = state ^ counter
    state += _INCREMENT
    state ^= _shift(state, 30)
    state *= _MULTIPLIER_1
    state ^= _shift(state, 27)
    state *= _MULTIPLIER_2
    state ^= _shift(state, 31)
    return state


def _shift(state: Integers, count: int) -> Integers:
    """Shift right and fill with zeros: an arithmetic shift, whose copies of the sign are cut."""
    shifted = state >> count
    shifted &= (1 << (64 - count)) - 1
    return shifted


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
    result.
    """
    key = rollout_key(seed, step, prompt_index, rollout_index)
    return _uniforms(_fold_all(_native(key), position, purpose))


def rollout_key(
    seed: int | Tensor,
    step: int | Tensor,
    prompt_index: int | Tensor,
    rollout_index: int | Tensor,
) -> Tensor:
    """The bits that all positions of a rollout share, int64 on the CPU.

    Arguments broadcast together.
    """
    state = _fold_all(np.zeros((), dtype=np.int64), seed, step, prompt_index, rollout_index)
    return torch.from_numpy(state)


def position_keys(rollout_keys: Tensor, position: Tensor) -> Tensor:
    """The bits that key the random numbers of positions, int64 on the CPU.

    Arguments broadcast together.
    """
    return torch.from_numpy(_fold_all(_native(rollout_keys), position))


def acceptance_uniforms(key_N: Tensor) -> Tensor:
    """Uniforms in [0, 1) that decide whether proposals are accepted, [N] float64.

    Args:
        key_N: from `position_keys`, on any device.
    """
    return _uniforms(fold(_native(key_N), int(Purpose.ACCEPT)))


def exponential_noise(key_N: Tensor, purpose: Purpose, level: Level, index_NK: Tensor) -> Tensor:
    """Noise of the standard exponential distribution, [N, K] float64, above 0 and finite.

    Minus its logarithm is Gumbel noise. No two draws of a position share noise: it depends on the
    purpose and on the level, besides the chunk or id.

    Args:
        key_N: from `position_keys`, on any device.
        index_NK: [N, K] or [1, K], numbers of chunks or ids.
    """
    decision = purpose + len(Purpose) * (1 + level)  # none of those that are made without a level
    state_N = fold(_native(key_N), decision)
    state_NK = fold(state_N[:, None], _native(index_NK))
    # 52 bits and a half: neither 0, whose logarithm is infinite, nor 1, whose logarithm is 0.
    bits_NK = _shift(state_NK, 12)
    if isinstance(bits_NK, Tensor):
        return bits_NK.double().add_(0.5).mul_(2.0**-52).log_().neg_()
    uniforms_NK = bits_NK + 0.5
    uniforms_NK *= 2.0**-52
    return torch.from_numpy(np.log(uniforms_NK, out=uniforms_NK)).neg_()


def _native(integers: Tensor) -> Integers:
    """The same memory as numpy sees it, on a CPU; see the module docstring."""
    return integers.numpy() if integers.device.type == "cpu" else integers


@np.errstate(over="ignore")  # numpy warns where sums and products of single numbers wrap around
def _fold_all(state: Integers, *counters: int | Tensor) -> NDArray[np.int64]:
    for counter in counters:
        state = np.asarray(fold(state, np.asarray(counter, dtype=np.int64)))
    return state


def _uniforms(state: Integers) -> Tensor:
    return torch.as_tensor(_shift(state, 11)).double() * 2.0**-53
