"""Which sequence runs when: slots, pages of the cache, prompts in common, preemption.

Nothing here touches a model, so that every decision is the same on all ranks of a replica.

Sequences wait, enter a slot (`admit`), generate, and leave it when they are finished. The cache may
be smaller than all slots at full length. Whenever pages run out, prompts that are only kept for
rollouts to come go first; then the sequence that started last gives its pages back and waits at the
front (preemption), to be computed again from what it has sampled so far. Random numbers belong to
positions, so that nothing of the result depends on it.

Order: first one rollout of each prompt. The others follow by the longest response that their prompt
has had so far, longest first, since a long response that begins late leaves slots idle at the end
(Graham, SIAM J. Appl. Math. 17, 1969: longest processing time first).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trb_megatron.models.kv_cache import PageTable
from trb_megatron.rollout.sequences import Request, SequenceState


@dataclass(eq=False)
class SlotGroup:
    """Sequences that go through a round together."""

    capacity: int
    sequences: list[SequenceState] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(eq=False)
class _Prompt:
    """A prompt, shared by all requests for it."""

    waiting: deque[SequenceState] = field(default_factory=deque)
    longest_response: int = 0
    pages: tuple[int, ...] = ()
    """Pages of the prompt without its last token, kept while some of its requests wait."""


@dataclass
class Admission:
    """Work for the models after sequences have entered slots, in this order."""

    first: list[SequenceState] = field(default_factory=list)
    """Sequences whose prompt is in no cache."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) of pages to copy: the ends of prompts in common."""
    others: list[SequenceState] = field(default_factory=list)
    """Sequences that share their prompt's pages; preempted ones lack their response."""


class Scheduler:
    """Admits, preempts and retires the sequences of one call of `RolloutEngine.generate`.

    Args:
        requests: at least one; each must fit into the pages when it is alone.
        keys: of their random numbers (`uniforms.rollout_key`).
        num_groups: groups of slots that take turns, so that pipeline stages overlap.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        keys: Sequence[int],
        page_table: PageTable,
        num_groups: int,
    ) -> None:
        self.sequences = [
            SequenceState(request, number, key)
            for number, (request, key) in enumerate(zip(requests, keys, strict=True))
        ]
        self.page_table = page_table
        self.groups = [SlotGroup(-(-page_table.num_slots // num_groups)) for _ in range(num_groups)]
        self.num_preemptions = 0
        self.num_finished = 0
        self._free_slots = list(range(page_table.num_slots))
        self._num_started = 0
        self._preempted: deque[SequenceState] = deque()
        self._prompts: dict[tuple[int, ...], _Prompt] = {}
        for sequence in self.sequences:
            prompt = self._prompts.setdefault(sequence.request.prompt_ids, _Prompt())
            prompt.waiting.append(sequence)
        self._new_prompts = deque(self._prompts.values())
        self.begun_prompts: list[_Prompt] = []
        """Those that have had a rollout and have more waiting."""

    @property
    def num_active(self) -> int:
        """Sequences in slots."""
        return sum(map(len, self.groups))

    @property
    def has_waiting(self) -> bool:
        return bool(self._preempted or self._new_prompts or self.begun_prompts)

    def is_done(self, group: SlotGroup) -> bool:
        """Whether a group has no more work, neither in its slots nor waiting."""
        return not group.sequences and not self.has_waiting

    def admit(self, group: SlotGroup, num_new: int) -> Admission:
        """Move waiting sequences into free slots, while all in flight can add `num_new` tokens.

        The models must do what the result says before anything else is asked of the scheduler.
        """
        admission = Admission()
        in_flight = [s for group in self.groups for s in group.sequences]
        num_reserved = self._num_missing(in_flight, num_new)
        while self.has_waiting and self._free_slots and len(group) < group.capacity:
            sequence = self._next()
            if not self._make_room_for(sequence, num_new, num_reserved):
                assert self.num_active > 0, "one sequence does not fit into the cache"
                break
            self._enter(sequence, admission)
            group.sequences.append(sequence)
            num_reserved += self._num_missing([sequence], num_new)
        self.page_table.release(source for source, _ in admission.copies)
        return admission

    def make_room(self, group: SlotGroup, num_new: int) -> None:
        """Hand out the pages for `num_new` more tokens of each sequence, preempting if need be.

        The group comes out empty where the other groups hold the pages.
        """
        while self._num_missing(group.sequences, num_new) > self.page_table.num_free:
            if not self._forget_a_prompt():
                self._preempt(group)
        for sequence in group.sequences:
            self.page_table.grow(sequence.slot, len(sequence) - 1 + num_new)

    def retire(self, group: SlotGroup) -> None:
        """After a round: release the pages of dropped drafts, and the slots of the finished."""
        for sequence in group.sequences:
            prompt = self._prompts[sequence.request.prompt_ids]
            prompt.longest_response = max(prompt.longest_response, len(sequence.response_ids))
            if sequence.finished:
                self.num_finished += 1
                self._leave(sequence)
            else:
                self.page_table.truncate(sequence.slot, sequence.num_cached)
        group.sequences = [s for s in group.sequences if not s.finished]

    def _next(self) -> SequenceState:
        """The sequence to admit next; see the module docstring for the order."""
        if self._preempted:
            return self._preempted[0]
        if self._new_prompts:
            return self._new_prompts[0].waiting[0]
        return max(self.begun_prompts, key=lambda prompt: prompt.longest_response).waiting[0]

    def _make_room_for(self, sequence: SequenceState, num_new: int, num_reserved: int) -> bool:
        """Whether it can enter, if need be after forgetting prompts that are merely kept.

        `num_reserved` free pages are for those in flight.
        """
        own = self._prompts[sequence.request.prompt_ids]
        table = self.page_table
        num_shared = (len(sequence.request.prompt_ids) - 1) // table.page_tokens
        needed = table.pages_for(len(sequence) - 1 + num_new) + num_reserved
        while True:
            if needed - (num_shared if own.pages else 0) <= table.num_free:
                return True
            is_alone = self.num_active == 0
            if not (self._forget_a_prompt(but=own) or (is_alone and self._forget_a_prompt())):
                return False

    def _num_missing(self, sequences: Sequence[SequenceState], num_new: int) -> int:
        return sum(self.page_table.num_missing(s.slot, len(s) - 1 + num_new) for s in sequences)

    def _enter(self, sequence: SequenceState, admission: Admission) -> None:
        """Take a slot, and the pages of all tokens but the last."""
        prompt = self._prompts[sequence.request.prompt_ids]
        self._stop_waiting(sequence, prompt)
        sequence.slot = self._free_slots.pop()
        num_shared = len(sequence.request.prompt_ids) - 1
        if prompt.pages:
            copy = self.page_table.share(sequence.slot, prompt.pages, num_shared)
            admission.copies += [copy] if copy else []
            admission.others.append(sequence)
            sequence.num_cached = num_shared
        else:
            admission.first.append(sequence)
        self.page_table.grow(sequence.slot, len(sequence) - 1)
        if not prompt.waiting:
            self._forget(prompt)
        elif not prompt.pages:
            prompt.pages = self.page_table.pages(sequence.slot, num_shared)
            self.page_table.retain(prompt.pages)

    def _stop_waiting(self, sequence: SequenceState, prompt: _Prompt) -> None:
        if self._preempted and self._preempted[0] is sequence:
            self._preempted.popleft()
            return
        sequence.start = self._num_started
        self._num_started += 1
        prompt.waiting.popleft()
        if self._new_prompts and self._new_prompts[0] is prompt:
            self._new_prompts.popleft()
            self.begun_prompts.append(prompt)
        if not prompt.waiting:
            self.begun_prompts = [p for p in self.begun_prompts if p is not prompt]

    def _leave(self, sequence: SequenceState) -> None:
        self.page_table.truncate(sequence.slot, 0)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.num_cached = -1, 0

    def _preempt(self, group: SlotGroup) -> None:
        """Send the sequence of a group that started last back to the front of those waiting."""
        sequence = max(group.sequences, key=lambda s: s.start)
        assert self.num_active > 1, "one sequence does not fit into the cache"
        group.sequences.remove(sequence)
        self._leave(sequence)
        self._preempted.appendleft(sequence)
        self.num_preemptions += 1

    def _forget_a_prompt(self, but: _Prompt | None = None) -> bool:
        """Let go of the pages of the kept prompt whose rollouts come last; False if none is."""
        kept = [p for p in self.begun_prompts if p.pages and p is not but]
        if not kept:
            return False
        self._forget(min(kept, key=lambda prompt: prompt.longest_response))
        return True

    def _forget(self, prompt: _Prompt) -> None:
        self.page_table.release(prompt.pages)
        prompt.pages = ()
