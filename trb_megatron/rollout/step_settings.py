"""The settings of a step's rollouts: the policy, the requests, and when a response ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trb_megatron.behavior.policies import Policy
from trb_megatron.behavior.schedule import policy_of_step
from trb_megatron.config.options import Config
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.models.sources import ModelSources
from trb_megatron.prompts.source import Prompt
from trb_megatron.rollout.sequences import Request, ResponseSpec


def policy_at(step: int, config: Config, sources: ModelSources, layout: ParallelLayout) -> Policy:
    """The policy that samples the rollouts of a step."""
    return policy_of_step(
        step,
        config,
        num_valid=sources.tokenizer_size,
        alignment=sources.alignment,
        tp_group=layout.tp_group,
    )


def responses_at(step: int, config: Config, sources: ModelSources) -> ResponseSpec:
    """The limits of a step's responses, and the key of their random numbers."""
    return ResponseSpec(
        max_response_tokens=config.rollout.max_response_tokens,
        stop_ids=sources.stop_ids,
        seed=config.run.seed,
        step=step,
    )


def requests_of(prompts: Sequence[Prompt], rollouts_per_prompt: int) -> list[Request]:
    """So many requests of each prompt; one that comes twice in a step gets other responses."""
    num_seen: Counter[int] = Counter()
    requests = []
    for prompt in prompts:
        first = rollouts_per_prompt * num_seen[prompt.index]
        num_seen[prompt.index] += 1
        requests += [
            Request(prompt.index, first + number, prompt.token_ids)
            for number in range(rollouts_per_prompt)
        ]
    return requests
