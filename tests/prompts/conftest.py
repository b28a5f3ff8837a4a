"""Fixtures of the tests of prompts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from trb_megatron.huggingface.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(
    write_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
