"""Counter-based uniforms: pinned values, uniformity, independence, invariance."""

import math

import numpy as np
import pytest
import torch

from trb_megatron.uniforms import (
    Level,
    Purpose,
    acceptance_uniforms,
    counter_uniforms,
    exponential_noise,
    fold,
    position_keys,
    rollout_key,
)

MASK = 2**64 - 1


def reference_state(*counters: int) -> int:
    """The same hash in Python integers."""
    state = 0
    for counter in counters:
        state = ((state ^ (counter & MASK)) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def reference_uniform(*counters: int) -> float:
    return (reference_state(*counters) >> 11) * 2.0**-53


def test_values_are_pinned() -> None:
    uniforms = counter_uniforms(1, 2, 3, 4, torch.arange(3), Purpose.DRAFT)
    assert uniforms.tolist() == [0.7198514895116321, 0.05737001781575457, 0.9068664499472846]
    assert [int(purpose) for purpose in Purpose] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", [0, -5, 2**62, 123456789])
def test_agrees_with_python_integers(seed: int) -> None:
    positions = torch.tensor([0, 1, 5000, 2**40])
    uniforms = counter_uniforms(seed, 7, 1, 2, positions, Purpose.RESIDUAL)
    expected = [reference_uniform(seed, 7, 1, 2, p, 2) for p in positions.tolist()]
    assert uniforms.dtype == torch.float64
    assert uniforms.tolist() == expected


def test_a_value_does_not_depend_on_its_batch() -> None:
    prompts, positions = torch.arange(20)[:, None], torch.arange(30)
    batch = counter_uniforms(0, 1, prompts, 3, positions, Purpose.ACCEPT)
    assert batch.shape == (20, 30)
    assert batch[11, 17] == counter_uniforms(0, 1, 11, 3, 17, Purpose.ACCEPT)


def test_every_argument_matters() -> None:
    base = [1, 2, 3, 1, 2, 1]
    variants = [base] + [[*base[:i], base[i] + 1, *base[i + 1 :]] for i in range(6)]
    swapped = [[2, 1, 3, 1, 2, 1], [1, 3, 2, 1, 2, 1], [1, 2, 3, 2, 1, 1]]
    values = {float(counter_uniforms(*counters)) for counters in variants + swapped}
    assert len(values) == 10


def test_uniform_and_uncorrelated() -> None:
    prompts, positions = torch.arange(400)[:, None, None], torch.arange(500)[:, None]
    uniforms = counter_uniforms(0, 0, prompts, 0, positions, torch.arange(3))
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    counts = torch.histc(uniforms.flatten(), bins=100, min=0, max=1)
    chi_square = float(((counts - 6000) ** 2 / 6000).sum())
    p_value = torch.special.gammaincc(torch.tensor(99 / 2), torch.tensor(chi_square / 2))
    assert p_value > 1e-3
    centered = (uniforms - 0.5) * 12**0.5
    for axis in range(3):
        length = uniforms.shape[axis] - 1
        neighbors = centered.narrow(axis, 0, length) * centered.narrow(axis, 1, length)
        # Four standard deviations of the mean of independent products.
        assert abs(float(neighbors.mean())) < 4 / neighbors.numel() ** 0.5


def test_keys_lead_to_the_same_uniforms() -> None:
    prompts, positions = torch.arange(5)[:, None], torch.arange(7)
    keys = position_keys(rollout_key(-3, 2, prompts, 1), positions)
    expected = counter_uniforms(-3, 2, prompts, 1, positions, Purpose.ACCEPT)
    assert torch.equal(acceptance_uniforms(keys), expected)


def test_tensors_and_arrays_get_the_same_bits() -> None:
    """Tensors are what a GPU has."""
    states = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=(50, 1))
    counters = np.arange(-20, 400)
    folded = fold(states, counters)
    assert np.array_equal(folded, fold(torch.from_numpy(states), torch.from_numpy(counters)))
    assert np.unique(folded).size == folded.size


def test_noise_is_minus_the_logarithm_of_a_uniform() -> None:
    key = position_keys(rollout_key(1, 2, 3, 4), torch.tensor([5, 6]))
    numbers = torch.tensor([[0, 1, 593]])
    for purpose in (Purpose.DRAFT, Purpose.RESIDUAL):
        for level in Level:
            noise_NK = exponential_noise(key, purpose, level, numbers)
            decision = purpose + 4 * (1 + level)
            for row, position in enumerate((5, 6)):
                for column, number in enumerate(numbers[0].tolist()):
                    state = reference_state(1, 2, 3, 4, position, decision, number)
                    uniform = ((state >> 12) + 0.5) * 2.0**-52
                    assert noise_NK[row, column].item() == pytest.approx(
                        -math.log(uniform), rel=1e-12
                    )


def test_noise_is_exponential_and_independent() -> None:
    """Of purposes, levels, positions and numbers alike."""
    keys_N = position_keys(rollout_key(0, 0, 0, 0), torch.arange(500))
    numbers = torch.arange(300)[None]
    noise = torch.stack(
        [
            exponential_noise(keys_N, purpose, level, numbers)
            for purpose in (Purpose.DRAFT, Purpose.RESIDUAL)
            for level in Level
        ]
    )
    assert ((noise > 0) & noise.isfinite()).all()
    centered = noise - 1
    error = noise.numel() ** -0.5
    assert abs(float(centered.mean())) < 4 * error
    assert abs(float(centered.square().mean()) - 1) < 4 * 8**0.5 * error
    for axis in range(3):
        length = noise.shape[axis] - 1
        neighbors = centered.narrow(axis, 0, length) * centered.narrow(axis, 1, length)
        assert abs(float(neighbors.mean())) < 4 / neighbors.numel() ** 0.5
