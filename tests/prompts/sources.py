"""Prompt sources of tests: writing and loading them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trb_megatron.prompts.records import Columns
from trb_megatron.prompts.source import PromptSet, PromptSource, load_prompts

COLUMN_NAMES = {"prompt": "prompt", "answer": "answer", "response": None}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON Lines, into folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PromptSet:
    """Load with the columns and limits of these tests; `options` name others."""
    columns = Columns(
        *(options.pop(f"{name}_column", default) for name, default in COLUMN_NAMES.items())
    )
    settings = {
        "format": "auto",
        "system_prompt": None,
        "apply_chat_template": True,
        "max_prompt_tokens": 500,
        **options,
    }
    return load_prompts(PromptSource(path=path, columns=columns, **settings), tokenizer)
