"""Rollouts, and the padded microbatches that training reads.

Shapes: B sequences, T positions. The label shift is done once, here: `loss_mask_BT[b, t]` is set
where the model at position t predicts a sampled token, which `labels_BT[b, t]` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRecord:
    """What was known when each response token was drawn; one entry per response token.

    Attributes:
        student_logprobs, teacher_logprobs, behavior_logprobs: of the drawn token, under the
            aligned, temperature-scaled distributions; the teacher's are NaN where it was not asked.
        blend_coef: beta of the behavior policy, 0 for the student, 1 for the teacher, NaN for a
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
    """

    prompt_index: int
    rollout_index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    stopped: bool
    teacher_calls: int = 0
    record: TokenRecord | None = None
    teacher_hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Microbatch:
    """Some rollouts as padded rows; see the module docstring for the label shift.

    `teacher_hidden_NH` holds the teacher's final hidden states at the loss positions, where known.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    labels_BT: Tensor
    loss_mask_BT: Tensor
    teacher_hidden_NH: Tensor | None = None

    @property
    def labels_N(self) -> Tensor:
        """Sampled ids at the loss positions, in the order of the hidden states there."""
        return self.labels_BT[self.loss_mask_BT]


def build_microbatch(
    rollouts: Sequence[Rollout], device: torch.device, length_multiple: int = 1
) -> Microbatch:
    """Pad rollouts to their longest, rounded up to `length_multiple` (sequence parallelism cuts T).

    The last token of a response is predicted but never read, so T is the longest length minus one.
    """
    longest = max(len(rollout) for rollout in rollouts) - 1
    num_positions = -(-longest // length_multiple) * length_multiple
    shape = (len(rollouts), num_positions)
    tokens_BT, labels_BT = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
    )
    loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        sequence = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        tokens_BT[row, : len(rollout) - 1] = sequence[:-1]
        labels_BT[row, : len(rollout) - 1] = sequence[1:]
        loss_mask_BT[row, len(rollout.prompt_ids) - 1 : len(rollout) - 1] = True
    hidden = [r.teacher_hidden for r in rollouts if r.teacher_hidden is not None]
    return Microbatch(
        tokens_BT=tokens_BT.to(device),
        positions_BT=torch.arange(num_positions, device=device).expand(shape),
        labels_BT=labels_BT.to(device),
        loss_mask_BT=loss_mask_BT.to(device),
        teacher_hidden_NH=torch.cat(hidden) if len(hidden) == len(rollouts) else None,
    )


def build_microbatches(
    rollouts: Sequence[Rollout],
    max_tokens: int,
    device: torch.device,
    length_multiple: int = 1,
) -> list[Microbatch]:
    """Cut rollouts into microbatches of at most `max_tokens` padded tokens, alike lengths together.

    A rollout that is longer than the budget gets a microbatch of its own. The budget counts lengths
    before they are rounded up to `length_multiple`.
    """
    by_length = sorted(rollouts, key=len, reverse=True)
    groups: list[list[Rollout]] = []
    for rollout in by_length:
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= max_tokens:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return [build_microbatch(group, device, length_multiple) for group in groups]
