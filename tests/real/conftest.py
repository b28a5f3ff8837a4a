"""The models of `make laptop-model`, and transformers' reading of them."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trb_megatron.huggingface.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def laptop_model() -> Path:
    """The folder that `make laptop-model` filled; skips where it didn't."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get("LAPTOP_MODEL") or caches / "trb_megatron" / "laptop-model"
    folder = Path(named)
    if not (folder / "prompts.jsonl").is_file():
        pytest.skip(f"no models in {folder}: run `make laptop-model`, which needs the network")
    return folder


@cache
def load_reference(folder: Path) -> Any:
    """transformers' model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def texts(laptop_model: Path) -> list[list[int]]:
    """Token ids of what a chat with the teacher looks like, of three lengths."""
    tokenizer = load_tokenizer(laptop_model / "teacher")
    chats = [
        [("user", "Hello!"), ("assistant", "Hello! How can I help you today?")],
        [("user", "What is 12 + 30?"), ("assistant", "12 + 30 = 42.\n\n1. Add the tens: 40.")],
        [("system", "Be brief."), ("user", "Write a function that doubles its argument.")],
    ]
    rendered = (
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in chat], tokenize=False
        )
        for chat in chats
    )
    return [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
