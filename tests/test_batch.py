"""The label shift and the cutting into microbatches."""

import torch

from trb_megatron.batch import Rollout, build_microbatch, build_microbatches

CPU = torch.device("cpu")


def make_rollout(prompt_length: int, response_length: int, number: int = 0) -> Rollout:
    first = 100 * number
    ids = tuple(range(first, first + prompt_length + response_length))
    return Rollout(number, 0, ids[:prompt_length], ids[prompt_length:], stopped=True)


def test_labels_are_the_response_shifted_by_one() -> None:
    microbatch = build_microbatch([make_rollout(3, 2), make_rollout(1, 5, number=1)], CPU)
    assert microbatch.tokens_BT.tolist() == [[0, 1, 2, 3, 0], [100, 101, 102, 103, 104]]
    assert microbatch.loss_mask_BT.tolist() == [
        [False, False, True, True, False],
        [True, True, True, True, True],
    ]
    assert microbatch.labels_N.tolist() == [3, 4, 101, 102, 103, 104, 105]
    assert microbatch.positions_BT.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_length_is_rounded_up_with_positions_that_are_masked() -> None:
    microbatch = build_microbatch([make_rollout(2, 4)], CPU, length_multiple=4)
    assert microbatch.tokens_BT.shape == (1, 8)
    assert microbatch.loss_mask_BT.sum() == 4 and not microbatch.loss_mask_BT[0, 5:].any()


def test_microbatches_hold_every_rollout_once_within_the_budget() -> None:
    rollouts = [make_rollout(2, 1 + 7 * i % 13, number=i) for i in range(20)]
    microbatches = build_microbatches(rollouts, 40, CPU)
    for microbatch in microbatches:
        assert microbatch.tokens_BT.numel() <= 40
    labels = torch.cat([m.labels_N for m in microbatches]).tolist()
    assert sorted(labels) == sorted(i for r in rollouts for i in r.response_ids)
    # Longest first, so that rows of alike lengths are padded together.
    widths = [m.tokens_BT.shape[1] for m in microbatches]
    assert widths == sorted(widths, reverse=True)


def test_rollout_longer_than_the_budget_stands_alone() -> None:
    microbatches = build_microbatches([make_rollout(30, 30), make_rollout(2, 2)], 40, CPU)
    assert [m.tokens_BT.shape for m in microbatches] == [(1, 59), (1, 3)]
