"""The exchange of rollouts between replicas, so that each trains on about as many tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from trb_megatron.batch import Rollout
from trb_megatron.distributed.layout import ParallelLayout


def exchange_rollouts(
    rollouts: Sequence[Rollout], layout: ParallelLayout, *, hidden_on_host: bool
) -> list[Rollout]:
    """Move rollouts between replicas until each trains on about as many tokens.

    Each rank talks to its peers in the data-parallel group: an all-gather of the lengths, then a
    send of every rollout that moves, with what it knows of the teacher. `hidden_on_host` says where
    the teacher's hidden states wait for the loss.
    """
    lengths: list[list[int]] = [[] for _ in range(layout.dp_size)]
    own_lengths = [len(rollout) - 1 for rollout in rollouts]
    dist.all_gather_object(lengths, own_lengths, group=layout.dp_group)
    moves = plan_moves(lengths)
    ranks = dist.get_process_group_ranks(layout.dp_group)
    given = {item for giver, item, _ in moves if giver == layout.dp_rank}
    kept = [rollout for item, rollout in enumerate(rollouts) if item not in given]
    for giver, item, taker in moves:
        if layout.dp_rank == giver:
            # What was recorded of its tokens is reported by the replica that drew them.
            moving = dataclasses.replace(rollouts[item], record=None).to("cpu")
            dist.send_object_list([moving], ranks[taker], layout.dp_group)
        elif layout.dp_rank == taker:
            received: list[Any] = [None]
            dist.recv_object_list(received, ranks[giver], layout.dp_group)
            kept.append(received[0].to("cpu" if hidden_on_host else layout.device))
    return kept


def plan_moves(lengths: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """How to even out the total lengths of several owners with few moves.

    Args:
        lengths: those that each owner has.

    Returns:
        (from, which of its items, to), at most one move for each item. The longest total gives the
        shortest what brings both closest together, until no item would.
    """
    totals = [sum(own) for own in lengths]
    left = [dict(enumerate(own)) for own in lengths]
    moves: list[tuple[int, int, int]] = []
    while True:
        giver, taker = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[giver] - totals[taker]
        useful = [(abs(gap - 2 * n), n, item) for item, n in left[giver].items() if 0 < n < gap]
        if not useful:
            return moves
        _, length, item = min(useful)
        del left[giver][item]
        totals[giver] -= length
        totals[taker] += length
        moves.append((giver, item, taker))
