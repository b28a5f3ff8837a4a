"""NaN and infinity: name the tensor, step, rank and prompt; stop the run, or skip the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from trb_megatron.batch import Microbatch, Rollout
from trb_megatron.job.supervision import RunError


class NonFiniteError(RunError):
    """A tensor that holds a NaN or an infinity; raised on all ranks alike."""


class NonFiniteGuard:
    """Ends a run at the first step with a NaN or infinity, or skips a limited number of them.

    Args:
        max_skipped: steps of the whole run whose update may be skipped.

    Attributes:
        num_skipped: steps skipped so far; part of a checkpoint.
    """

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped = max_skipped
        self.num_skipped = 0

    def check(self, problem: str | None, step: int) -> None:
        """Raise on all ranks when one of them has a problem. An all-gather over the world.

        Raises:
            NonFiniteError: names the step and, of the first rank with a problem, what it is.
        """
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise NonFiniteError(f"step {step}: {found}, on rank {rank}; nothing was updated")

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Go on behind the `with` block after a NonFiniteError in it, as often as is allowed."""
        try:
            yield
        except NonFiniteError as error:
            if self.num_skipped == self._max_skipped:
                if self._max_skipped == 0:
                    raise
                raise NonFiniteError(
                    f"{error} (training.max_nonfinite_steps={self._max_skipped} steps were "
                    "skipped before)"
                ) from None
            self.num_skipped += 1
            if dist.get_rank() == 0:
                print(f"skipped {self.num_skipped} of {self._max_skipped}: {error}", flush=True)


def find_in_rollouts(rollouts: Sequence[Rollout]) -> str | None:
    """The problem of the first response whose logits could not be used, None if there is none."""
    for rollout in rollouts:
        if rollout.problem is not None:
            return (
                f"{rollout.problem} of rollout {rollout.rollout_index} of prompt "
                f"{rollout.prompt_index}"
            )
    return None


def find_in_gradients(model: nn.Module, microbatches: Sequence[Microbatch]) -> str | None:
    """The first parameter whose gradient buffer is not finite, and the prompts behind it."""
    for name, param in model.named_parameters():
        gradient: Tensor = param.main_grad  # type: ignore[attr-defined]  # Megatron's buffer
        if not bool(gradient.isfinite().all()):
            prompts = sorted({index for m in microbatches for index, _ in m.sources})
            shown = ", ".join(map(str, prompts[:8])) + (", ..." if len(prompts) > 8 else "")
            return f"the gradient of {name} is not finite (prompts {shown})"
    return None
