"""Measuring what rounds cost, for the choice of the draft length (`drafting`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trb_megatron.behavior.policies import Policy
from trb_megatron.distributed.pipeline import take_turns
from trb_megatron.rollout.drafting import DraftCosts, positions_to_time, sequences_to_time
from trb_megatron.rollout.generation import Generation
from trb_megatron.rollout.sequences import Request, ResponseSpec

if TYPE_CHECKING:
    from trb_megatron.rollout.engine import RolloutEngine

_PASSES = range(2, 6)
"""Times that each round is run: the first one also records and allocates."""
_ENOUGH_SECONDS = 2.0
"""At one number of sequences; no pass over its rounds begins later, except the least."""
_PROMPT_IDS = (0, 0)


def time_rounds(
    engine: RolloutEngine, policy: Policy, spec: ResponseSpec, num_sequences: int
) -> DraftCosts:
    """Time rounds of 1 to `num_sequences` sequences, with and without drafts, on made-up prompts.

    Takes no more memory than the plan has for the step's own rollouts: neither the sequences nor
    the positions are more than theirs. Collective over all ranks of the job; rank 0's clock counts
    everywhere.
    """
    positions = positions_to_time(min(engine.config.max_positions, spec.max_response_tokens))
    # A response that reaches its longest length would leave its slot.
    endless = replace(spec, stop_ids=(), max_response_tokens=positions[-1] + 1)
    rows = {}
    for count in sequences_to_time(num_sequences):
        requests = [Request(i, 0, _PROMPT_IDS) for i in range(count)]
        generation = Generation(engine, requests, policy, endless)
        for group in generation.scheduler.groups:
            generation.admit(group)
        rows[generation.scheduler.num_active] = _fastest(generation, positions)
    return DraftCosts.of_rows(positions, rows)


def _fastest(generation: Generation, positions: Sequence[int]) -> list[float]:
    """Seconds of the fastest round of each number of positions, of passes over all of them.

    A pass goes through all numbers, so that they meet the same disturbances.
    """
    passes: list[list[float]] = []
    while len(passes) < _PASSES.start or (
        len(passes) < _PASSES.stop - 1 and sum(map(sum, passes)) < _ENOUGH_SECONDS
    ):
        shared = [[_time_round(generation, count) for count in positions]]
        dist.broadcast_object_list(shared, src=0)
        passes += shared
    return [min(times) for times in zip(*passes, strict=True)]


def _time_round(generation: Generation, num_positions: int) -> float:
    """Seconds in which all groups go through a round; its tokens are forgotten."""
    started = time.perf_counter()
    groups = generation.scheduler.groups
    take_turns([generation.round(group, num_positions) for group in groups])
    if generation.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for group in groups:
        for sequence in group.sequences:
            sequence.forget_response()
    return seconds
