"""The size of the key/value caches of rollouts: pages, sequences, bytes.

The engine asks here for its pool, and the plan for the sizes that it announces.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from trb_megatron.config.options import AUTO_CACHE_SHARE, AUTO_PAGE_TOKENS, RolloutConfig
from trb_megatron.config.values import ConfigError
from trb_megatron.distributed.layout import ParallelLayout

if TYPE_CHECKING:  # the plan is made without Megatron
    from trb_megatron.models.gpt import HiddenStateGPTModel

_FLASH_2_PAGE = 256


def page_tokens(config: RolloutConfig, flash_attention: int | None) -> int:
    """Tokens of a page, for the version of flash-attention that reads them, if any.

    Raises:
        ConfigError: flash-attention 2 cannot read pages of the configured size.
    """
    is_flash_2 = flash_attention == 2
    if config.page_tokens == "auto":
        return _FLASH_2_PAGE if is_flash_2 else AUTO_PAGE_TOKENS
    if is_flash_2 and config.page_tokens % _FLASH_2_PAGE != 0:
        raise ConfigError(
            f"rollout.page_tokens={config.page_tokens}: flash-attention 2 reads pages of "
            f"{_FLASH_2_PAGE} tokens or a multiple; set it so, or to auto"
        )
    return config.page_tokens


def pages_of_sequence(num_tokens: int, config: RolloutConfig, page_tokens: int) -> int:
    """Pages that a prompt and its response, `num_tokens` together, take with a round's drafts."""
    return -(-(num_tokens + config.max_positions) // page_tokens)


def cache_limit(config: RolloutConfig, free_bytes: int | None, other_bytes: int) -> float | None:
    """The most bytes that the caches of a rank may take; None: as many as all slots need.

    Args:
        free_bytes: free memory of a GPU, or a rank's share of a host's; None where it is unknown.
        other_bytes: of these, what the rest of the rollouts needs.
    """
    if config.cache_gb is not None:
        return config.cache_gb * 1e9
    if free_bytes is None:
        return None
    return min(AUTO_CACHE_SHARE * free_bytes, free_bytes - other_bytes)


@dataclass(frozen=True)
class CacheSize:
    """The pages of a model replica's caches.

    Attributes:
        page_tokens: tokens of a page.
        other_bytes: memory of a GPU that a cache without a configured size leaves to the rest of
            the rollouts.
    """

    config: RolloutConfig
    layout: ParallelLayout
    page_tokens: int
    other_bytes: int

    def num_pages(
        self, models: Sequence[HiddenStateGPTModel], num_tokens: int, num_slots: int, what: str
    ) -> int:
        """Pages for so many slots of `num_tokens` tokens each, or as many as fit.

        The same on all ranks of the replica: an all-reduce over the tensor-parallel and one over
        the pipeline group. `what` names the origin of the length in the error.

        Raises:
            ConfigError: one sequence does not fit; says how large the cache must be.
        """
        per_sequence = pages_of_sequence(num_tokens, self.config, self.page_tokens)
        page_bytes = self.page_tokens * sum(model.kv_bytes_per_token for model in models)
        fitting = num_slots * per_sequence
        limit = cache_limit(self.config, self._free_bytes(models), self.other_bytes)
        if limit is not None:
            fitting = min(fitting, int(limit / page_bytes) - 1)
        worst = torch.tensor([fitting, -page_bytes], device=self.layout.device)
        for group in (self.layout.tp_group, self.layout.pp_group):
            dist.all_reduce(worst, op=dist.ReduceOp.MIN, group=group)
        num_pages, needed_gb = int(worst[0]), -int(worst[1]) * (per_sequence + 1) / 1e9
        if num_pages < per_sequence:
            raise ConfigError(
                f"rollout.cache_gb: the key/value cache holds {max(0, num_pages)} pages of "
                f"{self.page_tokens} tokens on each rank, but one sequence needs "
                f"{per_sequence} ({num_tokens} tokens, {what}, and {self.config.max_positions} for "
                f"drafts); give it at least {needed_gb:.3g} GB, or shorten the sequences"
            )
        return num_pages

    def _free_bytes(self, models: Sequence[HiddenStateGPTModel]) -> int:
        """Memory that this process can still allocate: on its GPU, or its share of the host's."""
        device = self.layout.device
        if device.type != "cuda":
            num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            return psutil.virtual_memory().available // num_ranks
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # The first passes make the copies, when the cache is there already.
        return free - sum(model.fp8_copy_bytes for model in models)
