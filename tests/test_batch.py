"""The label shift, packing, and the balancing of tokens over microbatches."""

import pytest
import torch

from trb_megatron.batch import Rollout, balance, build_microbatch, build_microbatches, split_evenly
from trb_megatron.update.exchange import plan_moves

CPU = torch.device("cpu")


def make_rollout(prompt_length: int, response_length: int, number: int = 0) -> Rollout:
    first = 100 * number
    ids = tuple(range(first, first + prompt_length + response_length))
    return Rollout(number, 0, ids[:prompt_length], ids[prompt_length:], stopped=True)


def test_labels_are_the_response_shifted_by_one() -> None:
    microbatch = build_microbatch([make_rollout(3, 2), make_rollout(1, 5, number=1)], CPU)
    assert microbatch.tokens_T.tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 104]
    assert microbatch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert microbatch.loss_mask_T.tolist() == [False, False] + [True] * 7
    assert microbatch.labels_N.tolist() == [3, 4, 101, 102, 103, 104, 105]
    assert microbatch.cu_lengths == (0, 4, 9)
    assert microbatch.max_length == 5


def test_row_is_filled_up_with_a_sequence_that_is_masked() -> None:
    microbatch = build_microbatch([make_rollout(2, 4), make_rollout(1, 1)], CPU, length_multiple=4)
    assert len(microbatch.tokens_T) == 8
    assert microbatch.cu_lengths == (0, 5, 6, 8)
    assert microbatch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    assert microbatch.loss_mask_T.sum() == 5 and not microbatch.loss_mask_T[6:].any()
    assert build_microbatch([make_rollout(2, 3)], CPU, length_multiple=4).cu_lengths == (0, 4)


def test_teacher_states_follow_the_rollouts() -> None:
    rollouts = [make_rollout(2, 3), make_rollout(1, 2, number=1)]
    states = [torch.randn(len(r.response_ids), 4) for r in rollouts]
    known = [
        Rollout(r.prompt_index, 0, r.prompt_ids, r.response_ids, True, teacher_hidden=h)
        for r, h in zip(rollouts, states, strict=True)
    ]
    hidden_NH = build_microbatch(known, CPU).teacher_hidden_NH
    assert hidden_NH is not None and torch.equal(hidden_NH, torch.cat(states))
    assert build_microbatch([known[0], rollouts[1]], CPU).teacher_hidden_NH is None


def test_microbatches_hold_every_rollout_once_within_the_budget() -> None:
    rollouts = [make_rollout(2, 1 + 7 * i % 13, number=i) for i in range(20)]
    microbatches = build_microbatches(rollouts, 40, CPU)
    totals = [len(microbatch.tokens_T) for microbatch in microbatches]
    assert max(totals) <= 40 and max(totals) - min(totals) <= 2
    assert len(totals) == -(-sum(len(r) - 1 for r in rollouts) // 40)
    labels = torch.cat([m.labels_N for m in microbatches]).tolist()
    assert sorted(labels) == sorted(i for r in rollouts for i in r.response_ids)


def test_rollout_longer_than_the_budget_stands_alone() -> None:
    rollouts = [make_rollout(2, 2), make_rollout(30, 30), make_rollout(2, 3)]
    microbatches = build_microbatches(rollouts, 40, CPU)
    assert sorted(m.cu_lengths for m in microbatches) == [(0, 3, 7), (0, 59)]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 8])
def test_split_is_even(num_groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.rand(50, generator=generator).square() * 900).long().add(1).tolist()
    groups = split_evenly(lengths, num_groups)
    assert sorted(i for group in groups for i in group) == list(range(50))
    totals = [sum(lengths[i] for i in group) for group in groups]
    # A bound of LPT: the shortest group took the last item that made another the longest.
    assert max(totals) - min(totals) <= 0.02 * max(totals)
    assert split_evenly([5, 5], 3) == [[0], [1]]


def test_moves_even_out_the_owners() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = [
        torch.randint(1, 100 * (owner + 1), (30,), generator=generator).tolist()
        for owner in range(4)
    ]
    moves = plan_moves(lengths)
    assert len({(giver, item) for giver, item, _ in moves}) == len(moves) < 40
    totals = [sum(own) for own in lengths]
    for giver, item, taker in moves:
        totals[giver] -= lengths[giver][item]
        totals[taker] += lengths[giver][item]
    assert max(totals) - min(totals) <= 0.01 * max(totals)
    assert plan_moves([[5, 5], [4, 6]]) == []
    assert plan_moves([[9, 1], []]) == [(0, 1, 1)]


def test_balance_takes_one_more_group_where_they_do_not_fit() -> None:
    assert balance([6, 6, 6], 9) == [[0], [1], [2]]
