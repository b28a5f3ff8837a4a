"""The rollout engine on one rank: memory, prompts in common, recorded steps, turns of groups."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_distributed
from tests.runs import load_frozen
from tests.tiny import TOKENIZER_SIZE, make_checkpoint
from trb_megatron.config.options import MOST_DRAFT_TOKENS

NUM_PROMPTS, PER_PROMPT, PROMPT_TOKENS, LENGTH = 6, 4, 21, 16
LONG_DRAFTS = (20, MOST_DRAFT_TOKENS)
LONG = 45
"""Tokens of a response in which such drafts fit, while others in the slots are almost as long."""
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    make_checkpoint(folder / "student", num_layers=2, scale=0.05)
    make_checkpoint(folder / "teacher", seed=1, num_layers=3, scale=0.05)
    return run_distributed(_run, 1, folder, timeout_s=300)[0]


class Bench:
    """Two models on one rank, and requests to answer with them."""

    def __init__(self, folder: Path) -> None:
        from trb_megatron.behavior.policies import BlendPolicy
        from trb_megatron.behavior.stop_alignment import StopAlignment
        from trb_megatron.config.options import ParallelConfig
        from trb_megatron.distributed.layout import initialize
        from trb_megatron.rollout.sequences import Request

        self.layout = initialize(ParallelConfig())
        self.models = [load_frozen(folder / name, self.layout) for name in ("student", "teacher")]
        self.policy = BlendPolicy(
            kl_budget=0.05,
            temperature=1.0,
            num_valid=TOKENIZER_SIZE,
            alignment=StopAlignment((0,), (0,)),
            tp_group=self.layout.tp_group,
        )
        generator = torch.Generator().manual_seed(0)
        size = (NUM_PROMPTS, PROMPT_TOKENS)
        self.prompts = torch.randint(1, TOKENIZER_SIZE, size, generator=generator).tolist()
        self.requests = [
            Request(i, r, tuple(ids)) for i, ids in enumerate(self.prompts) for r in range(4)
        ]

    def engine(self, **options: Any) -> Any:
        """An engine with the options of these tests, or others."""
        from trb_megatron.config.options import RolloutConfig
        from trb_megatron.rollout.engine import RolloutEngine

        options = {"max_sequences": 8, "page_tokens": 8, "draft_tokens": 3, **options}
        return RolloutEngine(*self.models, self.layout, RolloutConfig(**options))

    def spec(self, max_response_tokens: int) -> Any:
        from trb_megatron.rollout.sequences import ResponseSpec

        return ResponseSpec(max_response_tokens=max_response_tokens, stop_ids=(0,), seed=3, step=0)

    def tokens(self, engine: Any, max_response_tokens: int = LENGTH) -> list[tuple[int, ...]]:
        """Responses to all requests."""
        rollouts = engine.generate(self.requests, self.policy, self.spec(max_response_tokens))
        return [rollout.response_ids for rollout in rollouts]


def _run(folder: Path) -> dict[str, Any]:
    bench = Bench(folder)
    engine = bench.engine()
    found: dict[str, Any] = {"plain": bench.tokens(engine)}
    found["prefilled"] = engine.counts.prefilled_tokens
    found["chunked"] = bench.tokens(bench.engine(max_prefill_tokens=7))
    engine_class = "trb_megatron.rollout.engine.RolloutEngine"
    with mock.patch(f"{engine_class}.uses_cuda_graphs", True), _recording():
        found["recorded"] = bench.tokens(bench.engine())
    with _no_readback():
        found["watched"] = bench.tokens(bench.engine())
    with _groups(2) as events:
        found["two groups"] = bench.tokens(bench.engine())
    found["events"] = events
    found["long"] = {
        drafts: bench.tokens(bench.engine(draft_tokens=drafts), LONG)
        for drafts in (3, *LONG_DRAFTS)
    }
    try:
        bench.tokens(bench.engine(cache_gb=2e-5))
    except ValueError as error:
        found["too small"] = str(error)
    for num_tokens in (10**4, 10**10):  # 6.4 MB, and more than any host has free
        try:
            engine.check_cache(num_tokens, with_teacher=True, what="a test")
        except ValueError as error:
            found["too large", num_tokens] = str(error)
    found["timed"] = _timed_rounds(bench)
    found["peak memory"] = _peaks_of_ten_thousand(bench)
    checking = mock.patch("trb_megatron.behavior.policies.sample_softmax", _checking)
    with _no_readback(), checking:
        try:
            bench.tokens(bench.engine())
        except _ReadbackError as error:
            found["readback"] = str(error)
    return found


def _timed_rounds(bench: Bench) -> dict[str, Any]:
    """What `measure_draft_costs` runs: sequences and positions of the teacher's passes."""
    from trb_megatron.models.forward import CachedModel

    forward, passes = CachedModel.forward, []

    def noted(self: Any, batch: Any, tokens_N: torch.Tensor) -> Any:
        if self.model is bench.models[1]:
            passes.append((len(batch.query_lengths_S), batch.max_query_length))
        return forward(self, batch, tokens_N)

    options: dict[str, Any] = {"max_sequences": 256, "draft_tokens": "auto"}
    engine, small = bench.engine(**options), bench.engine(**options, cache_gb=6e-5)
    with mock.patch.object(CachedModel, "forward", noted):
        costs = engine.measure_draft_costs(bench.policy, bench.spec(6), num_sequences=8)
    of_small = small.measure_draft_costs(bench.policy, bench.spec(6), num_sequences=8)
    engine.draft_costs = costs
    return {
        "costs": costs,
        "passes": passes,
        "tokens": bench.tokens(engine),
        "fitting": of_small.num_sequences,
    }


def _peaks_of_ten_thousand(bench: Bench) -> list[int]:
    """Peak memory after each thousand of short rollouts."""
    from trb_megatron.rollout.sequences import Request

    engine, peaks = bench.engine(max_sequences=250), []
    for part in range(10):
        batch = [
            Request(1000 * part + i, 0, bench.requests[i % 24].prompt_ids) for i in range(1000)
        ]
        engine.generate(batch, bench.policy, bench.spec(2))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return peaks


def _checking(*args: Any, **kwargs: Any) -> Any:
    from trb_megatron.behavior.sampling import sample_softmax

    sample = sample_softmax(*args, **kwargs)
    assert sample.logprobs.isfinite().all()
    return sample


def _recording() -> Any:
    """CUDA graphs that need no GPU: the step runs again and its result goes where it was."""
    from trb_megatron.models import decode_graphs

    def record(
        step: Callable[[], tuple[torch.Tensor, ...]],
    ) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
        results = step()

        def replay() -> None:
            for result, value in zip(results, step(), strict=True):
                result.copy_(value)

        return replay, results

    return mock.patch.object(decode_graphs, "record_cuda_graph", record)


class _ReadbackError(RuntimeError):
    """Something inside a draft made the host wait for the device."""


class _NoReadback(TorchDispatchMode):
    """Refuses what a GPU could only do after the host has waited for it."""

    _refused = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        has_mask = func._schema.name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if has_mask or func._schema.name.removeprefix("aten::") in self._refused:
            raise _ReadbackError(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_readback() -> Iterator[None]:
    """Watch all of a round from the first draft to the teacher's scores."""
    from trb_megatron.rollout.generation import Generation

    draft, score = Generation.draft, Generation.score

    def watched_draft(run: Any, view: Any) -> Any:
        with _NoReadback():
            return (yield from draft(run, view))

    def watched_score(run: Any, view: Any, drafted_SG: Any) -> Any:
        with _NoReadback():
            return score(run, view, drafted_SG)

    with (
        mock.patch.object(Generation, "draft", watched_draft),
        mock.patch.object(Generation, "score", watched_score),
    ):
        yield


class _groups:
    """Serve with so many groups of slots, and note when tokens are announced and waited for."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups

    def __enter__(self) -> list[str]:
        from trb_megatron.distributed.pipeline import Announcement
        from trb_megatron.rollout import generation
        from trb_megatron.rollout.scheduler import Scheduler

        events: list[str] = []

        class Noted(Announcement):
            def __init__(self, *args: Any) -> None:
                events.append("announce")
                super().__init__(*args)

            def wait(self) -> torch.Tensor:
                events.append("wait")
                return super().wait()

        def make_scheduler(requests: Any, keys: Any, table: Any, num_groups: int) -> Scheduler:
            return Scheduler(requests, keys, table, self._num_groups)

        self._patches = [
            mock.patch.object(generation, "Announcement", Noted),
            mock.patch.object(generation, "Scheduler", make_scheduler),
        ]
        for patch in self._patches:
            patch.start()
        return events

    def __exit__(self, *error: Any) -> None:
        for patch in self._patches:
            patch.stop()


@pytest.mark.parametrize("variant", ["chunked", "recorded", "watched", "two groups"])
def test_same_tokens(results: dict[str, Any], variant: str) -> None:
    assert len(set(results["plain"])) == NUM_PROMPTS * PER_PROMPT
    assert results[variant] == results["plain"]


@pytest.mark.parametrize("drafts", LONG_DRAFTS)
def test_long_drafts_have_room_and_draw_the_same_tokens(
    results: dict[str, Any], drafts: int
) -> None:
    expected = results["long"][3]
    lengths = [len(response) for response in expected]
    assert max(lengths) == LONG and min(lengths) < LONG - 20  # they end at different times
    assert results["long"][drafts] == expected


def test_a_host_that_waits_inside_a_draft_is_noticed(results: dict[str, Any]) -> None:
    assert "_local_scalar_dense" in results["readback"] or "is_nonzero" in results["readback"]


def test_a_prompt_is_prefilled_once(results: dict[str, Any]) -> None:
    assert results["prefilled"] == NUM_PROMPTS * (PROMPT_TOKENS - 1)


def test_groups_take_turns(results: dict[str, Any]) -> None:
    """Both groups have told their tokens to the other stages before the first one waits for its."""
    assert results["events"][:6] == ["announce", "announce", "wait", "announce", "wait", "announce"]


def test_a_cache_too_small_for_one_sequence_is_refused(results: dict[str, Any]) -> None:
    message = results["too small"]
    assert message.startswith("rollout.cache_gb")
    # 21 + 16 tokens and 4 of drafts, in pages of 8: 6, and one for padding. A token takes 2 + 3
    # layers x 2 x 2 heads x 8 x 4 bytes = 640 bytes.
    assert "one sequence needs 6 " in message and "at least 3.58e-05 GB" in message


def test_rounds_are_timed_at_the_sequences_and_lengths_of_a_step(results: dict[str, Any]) -> None:
    """Of 256 slots a step has 8, and its responses 6 tokens."""
    costs, passes = results["timed"]["costs"], results["timed"]["passes"]
    assert costs.num_sequences == (1, 8) and costs.num_positions == (1, 3, 6)
    rounds = [(s, g) for s, g in passes if g > 1 or s > 1]
    assert {g for _, g in rounds if g > 1} == {3, 6} and max(s for s, _ in rounds) == 8
    assert all(seconds > 0 for row in costs.seconds for seconds in row)
    assert results["timed"]["tokens"] == results["plain"]
    assert 1 < results["timed"]["fitting"][-1] < 8  # a cache without room for eight


def test_a_cache_too_large_for_the_host_is_refused(results: dict[str, Any]) -> None:
    assert ("too large", 10**4) not in results
    assert "(10000000000 tokens, a test, and 4 for drafts)" in results["too large", 10**10]


def test_ten_thousand_rollouts_do_not_grow(results: dict[str, Any]) -> None:
    peaks = results["peak memory"]
    assert peaks[-1] - peaks[1] < 8 * MEGABYTE


def _turns(name: str, log: list[str], count: int) -> Iterator[None]:
    for i in range(count):
        log.append(f"{name}{i}")
        yield


def test_tasks_of_different_lengths_take_turns() -> None:
    from trb_megatron.distributed.pipeline import take_turns

    log: list[str] = []
    take_turns([_turns("a", log, 3), _turns("b", log, 1), _turns("c", log, 2)])
    assert log == ["a0", "b0", "c0", "a1", "c1", "a2"]
