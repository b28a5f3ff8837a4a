"""The learning-rate schedule; the optimizer itself is tested by resuming and by layouts."""

import math

import pytest

from trb_megatron.update.optimizer import learning_rate_at


def test_learning_rate_rises_as_a_cosine_and_stays() -> None:
    rates = [learning_rate_at(step, 1e-5, 15) for step in range(20)]
    assert rates[0] == pytest.approx(1e-5 * 0.5 * (1 - math.cos(math.pi / 15)))
    assert rates[7] == pytest.approx(1e-5 * 0.5 * (1 - math.cos(math.pi * 8 / 15)))
    assert rates[:15] == sorted(set(rates[:15]))
    assert rates[14:] == [1e-5] * 6


def test_without_warmup_the_rate_is_constant() -> None:
    assert learning_rate_at(0, 2e-4, 0) == 2e-4
