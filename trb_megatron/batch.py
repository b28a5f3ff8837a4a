"""Rollouts, and the packed microbatches that training reads.

Shapes: T positions of all sequences of a microbatch, N those with a loss, H hidden size. The label
shift is done once, here: `loss_mask_T[t]` is set where the model at position t predicts a sampled
token, which `labels_T[t]` holds.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRecord:
    """The draw of each response token; one entry per token.

    Attributes:
        student_logprobs, teacher_logprobs, behavior_logprobs: of the drawn token, under the
            aligned, temperature-scaled distributions; the teacher's are NaN where it was not asked.
        blend_coef: β of the behavior policy, 0 for the student, 1 for the teacher, NaN for a
            policy that is not on the path between them.
        kl_student: KL(behavior || student) at this prefix, in nats.
        accepted: whether the student's proposal was accepted.
    """

    student_logprobs: Tensor
    teacher_logprobs: Tensor
    behavior_logprobs: Tensor
    blend_coef: Tensor
    kl_student: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt_index: row of the prompt in its source.
        rollout_index: which of the prompt's responses this is.
        prompt_ids: token ids of the prompt.
        response_ids: sampled token ids; the last one is a stop id when `stopped`.
        stopped: whether a stop id ended it (else the length limit did).
        teacher_calls: teacher forward passes that this response took part in.
        record: per-token quantities; only on the last pipeline stage, and only for sampled tokens.
        teacher_hidden: the teacher's final hidden states [len(response_ids), H] at the prefixes of
            the response, where the policy asked the teacher; on the last stage only.
        problem: what was wrong with the logits of the first token that could not be drawn from
            them (it and what follows are meaningless); on the last stage only.
    """

    prompt_index: int
    rollout_index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    stopped: bool
    teacher_calls: int = 0
    record: TokenRecord | None = None
    teacher_hidden: Tensor | None = None
    problem: str | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def to(self, device: torch.device | str) -> Rollout:
        """This rollout with the teacher's hidden states, if it has them, on `device`."""
        if self.teacher_hidden is None:
            return self
        return dataclasses.replace(self, teacher_hidden=self.teacher_hidden.to(device))


@dataclass(frozen=True)
class Microbatch:
    """Some rollouts packed into one row, none of which sees another.

    Each tensor but the last is [T]; sequence i is at `cu_lengths[i]` to `cu_lengths[i + 1]`, and
    its positions start at 0. See the module docstring for the label shift.
    """

    tokens_T: Tensor
    positions_T: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor
    cu_lengths: tuple[int, ...]
    sources: tuple[tuple[int, int], ...]
    """(prompt index, rollout index) of each sequence."""
    teacher_hidden_NH: Tensor | None = None
    """The teacher's final hidden states at the loss positions, where known."""

    @property
    def labels_N(self) -> Tensor:
        """Sampled ids at the loss positions, in the order of the hidden states there."""
        return self.labels_T[self.loss_mask_T]

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(stop - start for start, stop in pairwise(self.cu_lengths))

    def describe(self, number: int) -> str:
        """The loss position of a number, in words for a person."""
        position = int(self.loss_mask_T.nonzero()[number, 0])
        sequence = bisect_right(self.cu_lengths, position) - 1
        start = self.cu_lengths[sequence]
        num_before = int(self.loss_mask_T[start:position].sum())
        prompt_index, rollout_index = self.sources[sequence]
        return f"token {num_before} of rollout {rollout_index} of prompt {prompt_index}"


def build_microbatch(
    rollouts: Sequence[Rollout], device: torch.device, length_multiple: int = 1
) -> Microbatch:
    """Pack rollouts, in their order, and fill up to `length_multiple` (a model's `token_multiple`).

    The last token of a response is predicted but never read: a rollout takes its length minus one.
    What fills up is a sequence of its own without loss.
    """
    lengths = [len(rollout) - 1 for rollout in rollouts]
    num_filled = -sum(lengths) % length_multiple
    lengths += [num_filled] if num_filled else []
    tokens: list[int] = []
    labels: list[int] = []
    loss_mask: list[bool] = []
    for rollout in rollouts:
        sequence = rollout.prompt_ids + rollout.response_ids
        tokens += sequence[:-1]
        labels += sequence[1:]
        num_prompt = len(rollout.prompt_ids) - 1
        loss_mask += [False] * num_prompt + [True] * len(rollout.response_ids)
    hidden = [r.teacher_hidden for r in rollouts if r.teacher_hidden is not None]
    filling = [0] * num_filled
    return Microbatch(
        tokens_T=torch.tensor(tokens + filling, device=device),
        positions_T=torch.cat([torch.arange(length, device=device) for length in lengths]),
        labels_T=torch.tensor(labels + filling, device=device),
        loss_mask_T=torch.tensor(loss_mask + [False] * num_filled, device=device),
        cu_lengths=(0, *accumulate(lengths)),
        sources=tuple((rollout.prompt_index, rollout.rollout_index) for rollout in rollouts),
        teacher_hidden_NH=torch.cat(hidden) if len(hidden) == len(rollouts) else None,
    )


def build_microbatches(
    rollouts: Sequence[Rollout],
    max_tokens: int,
    device: torch.device,
    length_multiple: int = 1,
) -> list[Microbatch]:
    """Cut rollouts into as few microbatches of at most `max_tokens` as balancing allows.

    A rollout that is longer gets a microbatch of its own. The budget counts tokens before they are
    filled up to `length_multiple`.
    """
    return [
        build_microbatch([rollouts[i] for i in group], device, length_multiple)
        for group in balance([len(rollout) - 1 for rollout in rollouts], max_tokens)
    ]


def balance(lengths: Sequence[int], max_total: int) -> list[list[int]]:
    """Partition indices into groups of about equal total length, each at most `max_total`.

    A length beyond that stands alone. The longest go first, each into the group that is shortest by
    then (Graham's LPT rule), with one more group until all fit.
    """
    num_groups = max(1, -(-sum(lengths) // max_total))
    while True:
        groups = split_evenly(lengths, num_groups)
        if all(len(g) == 1 or sum(lengths[i] for i in g) <= max_total for g in groups):
            return groups
        num_groups += 1


def split_evenly(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Partition indices into at most `num_groups` groups of about equal total length, in order."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    totals = [0] * num_groups
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        shortest = totals.index(min(totals))
        groups[shortest].append(index)
        totals[shortest] += lengths[index]
    return [sorted(group) for group in groups if group]
