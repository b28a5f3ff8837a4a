"""Counter-based uniforms: random numbers keyed by what they decide, with no generator state."""

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a uniform decides; one position needs several that are independent of each other."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    SHUFFLE = 3


# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def counter_uniforms(
    seed: int | Tensor,
    step: int | Tensor,
    prompt_index: int | Tensor,
    rollout_index: int | Tensor,
    position: int | Tensor,
    purpose: int | Tensor,
) -> Tensor:
    """Return uniforms in [0, 1), float64 with 53 random bits, that depend on the arguments alone.

    Arguments are integers or int64 tensors that broadcast together; the result has their common
    shape and device. Equal arguments give equal bits on every device, in any batch.
    Each argument is folded into the state by the finalizer of SplitMix64.
    """
    key = rollout_key(seed, step, prompt_index, rollout_index)
    return keyed_uniforms(key, position, purpose)


def rollout_key(
    seed: int | Tensor,
    step: int | Tensor,
    prompt_index: int | Tensor,
    rollout_index: int | Tensor,
) -> Tensor:
    """What `counter_uniforms` makes of the arguments that all positions of a rollout share, int64.

    Arguments broadcast together.
    """
    counters = (seed, step, prompt_index, rollout_index)
    device = next((c.device for c in counters if isinstance(c, Tensor)), None)
    return _fold(torch.zeros((), dtype=torch.int64, device=device), *counters)


def keyed_uniforms(key: Tensor, position: int | Tensor, purpose: int | Tensor) -> Tensor:
    """The uniforms of `counter_uniforms` at positions of rollouts with these keys."""
    device = position.device if isinstance(position, Tensor) else key.device
    return _shift_right(_fold(key.to(device), position, purpose), 11).double() * 2.0**-53


def _fold(state: Tensor, *counters: int | Tensor) -> Tensor:
    for counter in counters:
        state = _finalize((state ^ counter) + _INCREMENT)
    return state


def _finalize(state: Tensor) -> Tensor:
    # int64 products wrap around, as the algorithm wants.
    state = (state ^ _shift_right(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shift_right(state, 27)) * _MULTIPLIER_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Shift in zeros; `>>` alone copies the sign bit of an int64."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
