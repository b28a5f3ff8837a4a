"""The scheduler alone, with made-up response lengths: order, pages, preemption, occupancy."""

import random
from collections.abc import Callable

import pytest
import torch

from trb_megatron.models.kv_cache import PageTable
from trb_megatron.rollout.scheduler import Scheduler
from trb_megatron.rollout.sequences import Request, SequenceState

CPU = torch.device("cpu")
PAGE_TOKENS = 16

Lengths = Callable[[Request], int]


class Simulation:
    """Runs a scheduler to the end as the engine does, one or a few tokens a round."""

    def __init__(
        self,
        requests: list[Request],
        length: Lengths,
        *,
        num_slots: int,
        num_pages: int,
        max_tokens: int,
        num_new: int = 1,
        num_groups: int = 1,
    ) -> None:
        self.table = PageTable(num_slots, num_pages, max_tokens + num_new, PAGE_TOKENS, CPU)
        self.scheduler = Scheduler(requests, range(len(requests)), self.table, num_groups)
        self.length, self.num_new = length, num_new
        self.num_rounds = self.num_prefilled = 0
        self.occupancy_while_waiting: list[float] = []
        self.contents: dict[int, list[object]] = {}
        while not all(map(self.scheduler.is_done, self.scheduler.groups)):
            for group in self.scheduler.groups:
                self.round(group)

    def round(self, group) -> None:
        admission = self.scheduler.admit(group, self.num_new)
        for sequence in admission.first:
            self.fill(sequence)
        for source, target in admission.copies:
            self.contents[target] = list(self.contents[source])
        for sequence in admission.others:
            self.fill(sequence)
        num_preemptions = self.scheduler.num_preemptions
        self.scheduler.make_room(group, self.num_new)
        if admission.first or admission.others:  # what enters does not push anybody out
            assert self.scheduler.num_preemptions == num_preemptions
        if self.scheduler.has_waiting:
            self.occupancy_while_waiting.append(self.scheduler.num_active / self.table.num_slots)
        for sequence in group.sequences:
            self.write(sequence, sequence.num_cached, sequence.num_cached + self.num_new)
            left = self.length(sequence.request) - len(sequence.response_ids)
            drawn = [1] * min(left, self.num_new)
            if left <= self.num_new:
                drawn[-1] = 0  # the stop id
            rejected = random.Random(left).randrange(2 * self.num_new)
            drafted = [2 if i == rejected else id for i, id in enumerate(drawn[:-1])]
            count = sequence.commit(drawn, drafted, (0,), 10**9)
            assert count == min(rejected + 1, len(drawn))
        self.scheduler.retire(group)
        self.num_rounds += bool(group.sequences)
        self.check()

    def fill(self, sequence: SequenceState) -> None:
        self.num_prefilled += len(sequence) - 1 - sequence.num_cached
        self.write(sequence, sequence.num_cached, len(sequence) - 1)
        sequence.num_cached = len(sequence) - 1

    def write(self, sequence: SequenceState, start: int, stop: int) -> None:
        """Note in the pages whose tokens they hold: prompts by content, responses by request."""
        pages = self.table.pages(sequence.slot, stop)
        for position in range(start, stop):
            is_prompt = position < len(sequence.request.prompt_ids)
            owner = sequence.request.prompt_ids if is_prompt else sequence.number
            page = self.contents.setdefault(pages[position // PAGE_TOKENS], [None] * PAGE_TOKENS)
            page[position % PAGE_TOKENS] = (owner, position)

    def check(self) -> None:
        """Every sequence finds its own tokens, and no more than a page each is in excess."""
        sequences = [s for group in self.scheduler.groups for s in group.sequences]
        needed = set()
        for sequence in sequences:
            pages = self.table.pages(sequence.slot, sequence.num_cached)
            needed.update(pages)
            for position in range(sequence.num_cached):
                is_prompt = position < len(sequence.request.prompt_ids)
                owner = sequence.request.prompt_ids if is_prompt else sequence.number
                found = self.contents[pages[position // PAGE_TOKENS]][position % PAGE_TOKENS]
                assert found == (owner, position)
        for prompt in self.scheduler.begun_prompts:
            needed.update(prompt.pages)
        in_use = self.table.num_pages - self.table.num_free
        assert in_use <= len(needed) + len(sequences)


def make_requests(num_prompts: int, per_prompt: int, prompt_tokens: int = 24) -> list[Request]:
    return [
        Request(i, r, (i, *range(prompt_tokens - 1)))
        for i in range(num_prompts)
        for r in range(per_prompt)
    ]


def spread_lengths(shortest: int, longest: int) -> Lengths:
    """Log-uniform lengths that depend on the request alone."""

    def length(request: Request) -> int:
        draw = random.Random(1000 * request.prompt_index + request.rollout_index).random()
        return round(shortest * (longest / shortest) ** draw)

    return length


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_new", [1, 40])
@pytest.mark.parametrize("num_pages", [18, 26, 60, 1000])
def test_every_sequence_finishes_however_few_the_pages(
    num_pages: int, num_new: int, num_groups: int
) -> None:
    length = spread_lengths(4, 200)
    run = Simulation(
        make_requests(12, 3),
        length,
        num_slots=8,
        num_pages=num_pages,
        max_tokens=230,
        num_new=num_new,
        num_groups=num_groups,
    )
    for sequence in run.scheduler.sequences:
        assert sequence.stopped and len(sequence.response_ids) == length(sequence.request)
    assert run.table.num_free == num_pages
    if num_pages != 60:
        assert (run.scheduler.num_preemptions > 0) == (num_pages < 60)


def test_a_prompt_is_computed_once() -> None:
    run = Simulation(make_requests(5, 8), lambda _: 30, num_slots=6, num_pages=200, max_tokens=60)
    assert run.num_prefilled == 5 * 23


def test_slots_are_busy_until_the_queue_is_empty() -> None:
    """Lengths from 8 to 2,048 in one batch."""
    run = Simulation(
        make_requests(64, 4),
        spread_lengths(8, 2048),
        num_slots=32,
        num_pages=32 * 130,
        max_tokens=24 + 2048,
    )
    occupancy = run.occupancy_while_waiting
    assert sum(occupancy) / len(occupancy) >= 0.85


def test_long_responses_begin_early() -> None:
    """Fewer rounds than in the given order where the lengths of a prompt's responses are alike."""

    def length(request: Request) -> int:
        return 300 if request.prompt_index == 15 else 20 + request.prompt_index

    def num_rounds(requests: list[Request]) -> int:
        options = {"num_slots": 8, "num_pages": 1000, "max_tokens": 400}
        return Simulation(requests, length, **options).num_rounds

    requests = make_requests(16, 4)
    # Without prompts in common there is nothing to learn from: the given order.
    in_order = [
        Request(r.prompt_index, r.rollout_index, (i, *r.prompt_ids)) for i, r in enumerate(requests)
    ]
    assert num_rounds(requests) < 0.8 * num_rounds(in_order)


def test_what_is_shared_needs_no_room() -> None:
    table = PageTable(2, 6, 96, PAGE_TOKENS, CPU)
    scheduler = Scheduler(make_requests(1, 2, prompt_tokens=49), (0, 0), table, 1)
    (group,) = scheduler.groups
    admission = scheduler.admit(group, 10)  # three pages in common, and one more for each
    assert len(admission.first) == len(admission.others) == 1
    assert table.num_free == 3
    scheduler.make_room(group, 10)
    assert table.num_free == 1


def test_the_latest_gives_way_and_comes_back_first() -> None:
    table = PageTable(3, 6, 64, PAGE_TOKENS, CPU)
    scheduler = Scheduler(make_requests(3, 1, prompt_tokens=17), (0, 0, 0), table, 1)
    (group,) = scheduler.groups
    admitted = scheduler.admit(group, 1).first
    for sequence in admitted:
        sequence.num_cached = 16
    assert [s.request.prompt_index for s in admitted] == [0, 1, 2]
    scheduler.make_room(group, 48)  # four pages each, and there are six
    assert [s.request.prompt_index for s in group.sequences] == [0]
    assert scheduler.num_preemptions == 2 and scheduler.has_waiting
    group.sequences[0].finished = True
    scheduler.retire(group)
    back = scheduler.admit(group, 1).first
    assert back == admitted[1:] and all(s.num_cached == 0 for s in back)
