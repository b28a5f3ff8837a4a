"""The order in which prompts are visited."""

from functools import lru_cache

import torch

from trb_megatron.uniforms import Purpose, counter_uniforms


class PromptOrder:
    """The endless order in which prompts are visited: a fresh permutation in each epoch.

    Nothing is remembered: which prompts come next depends on the seed and on how many were taken
    before, so that a resumed run continues where it stopped.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool) -> None:
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle

    def indices(self, position: int, count: int) -> list[int]:
        """Return which prompts, counted from 0, the `count` places from `position` on visit."""
        visited = []
        for place in range(position, position + count):
            epoch, row = divmod(place, self._num_prompts)
            visited.append(self._epoch_order(epoch)[row])
        return visited

    def _epoch_order(self, epoch: int) -> tuple[int, ...] | range:
        if not self._shuffle:
            return range(self._num_prompts)
        return _permutation(self._num_prompts, self._seed, epoch)


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _permutation(num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    uniforms = counter_uniforms(
        seed=seed,
        step=epoch,
        prompt_index=torch.arange(num_prompts),
        rollout_index=0,
        position=0,
        purpose=Purpose.SHUFFLE,
    )
    return tuple(torch.argsort(uniforms, stable=True).tolist())
