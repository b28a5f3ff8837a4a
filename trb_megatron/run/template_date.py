"""The date that chat templates print as today's: one for a run, however many days it takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from trb_megatron.config.options import JobConfig
from trb_megatron.config.reading import load_job_config
from trb_megatron.job.shared_failure import from_rank_zero
from trb_megatron.prompts.rendering import prints_date
from trb_megatron.run.folder import CONFIG_FILE

_AnyConfig = TypeVar("_AnyConfig", bound=JobConfig)


def with_template_date(
    config: _AnyConfig, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]
) -> _AnyConfig:
    """The configuration with `data.template_date`, where the chat template prints a date.

    Where the option is null, that is the date in the run's folder, else today's on rank 0.
    Collective over all ranks.
    """
    data = config.data
    if not data.apply_chat_template or not prints_date(tokenizer):
        if data.template_date is not None:
            say(f"warning: data.template_date={data.template_date}: the template prints no date")
        return config
    if data.template_date is None:
        file = None if config.run.dir is None else config.run.dir / CONFIG_FILE
        today = from_rank_zero(lambda: _read_date(file) or datetime.now().date())
        data = data.model_copy(update={"template_date": today})
    say(f"the chat template prints the date {data.template_date} (data.template_date)")
    return config.model_copy(update={"data": data})


def _read_date(file: Path | None) -> date | None:
    """The date in a run's configuration, if there is one."""
    if file is None or not file.is_file():
        return None
    return load_job_config(file, []).data.template_date
