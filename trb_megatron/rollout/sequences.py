"""Requests for responses, and the sequences that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(frozen=True)
class Request:
    """A prompt to answer; the indices key the random numbers (see `uniforms`)."""

    prompt_index: int
    rollout_index: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ResponseSpec:
    """When a response ends, and what keys its random numbers.

    Attributes:
        max_response_tokens: a response that reaches it is cut.
        stop_ids: a response ends with the first of these; the token is part of it.
        seed, step: key the random numbers together with a request and a position.
    """

    max_response_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    step: int


@dataclass(eq=False)
class SequenceState:
    """A request, its response so far, and how many of its first tokens the cache holds.

    In a slot the cache holds all but the last token, which the next round runs.
    """

    request: Request
    number: int
    key: int
    """Of its random numbers."""
    slot: int = -1
    num_cached: int = 0
    response_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    finished: bool = False
    start: int = -1
    """Place among all sequences by the time of their first admission."""
    num_teacher_calls: int = 0
    problem: str | None = None
    """Of the first token whose logits could not be used."""

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.response_ids]

    @property
    def last_id(self) -> int:
        return self.response_ids[-1] if self.response_ids else self.request.prompt_ids[-1]

    def __len__(self) -> int:
        return len(self.request.prompt_ids) + len(self.response_ids)

    def forget_response(self) -> None:
        """Start over behind the prompt, whose tokens stay in the cache."""
        self.response_ids.clear()
        self.num_cached = len(self) - 1

    def commit(
        self,
        drawn_ids: Sequence[int],
        drafted_ids: Sequence[int],
        stop_ids: tuple[int, ...],
        max_response_tokens: int,
    ) -> int:
        """Append drawn tokens up to the first that was not drafted or that ends the response.

        What the cache holds beyond is forgotten: the next round writes over it. Returns how many
        tokens were appended.
        """
        num_before = len(self.response_ids)
        for drawn_id, drafted_id in zip_longest(drawn_ids, drafted_ids):
            self.response_ids.append(drawn_id)
            self.stopped = drawn_id in stop_ids
            self.finished = self.stopped or len(self.response_ids) == max_response_tokens
            if self.finished or drawn_id != drafted_id:
                break
        self.num_cached = len(self) - 1
        return len(self.response_ids) - num_before
