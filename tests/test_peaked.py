"""The synthetic model with a large vocabulary is as peaked as a language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.peaked import VOCAB_SIZE, make_peaked_checkpoint
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.model_tensors import expected_tensors, open_model
from trb_megatron.huggingface.tokenizer import check_tokenizer_fits, tokenizer_size

NUM_SEQUENCES, NUM_TOKENS = 8, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peaked_checkpoint(tmp_path_factory.mktemp("peaked"))


@torch.no_grad()
def draw(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [NUM_SEQUENCES * NUM_TOKENS, V] where the model draws its own tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = 5 + torch.arange(NUM_SEQUENCES)[:, None]
    rows = []
    for _ in range(NUM_TOKENS):
        rows.append(model(tokens_BT, logits_to_keep=1).logits[:, -1].log_softmax(-1))
        drawn_B1 = torch.multinomial(rows[-1].exp(), 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, drawn_B1], dim=1)
    return torch.cat(rows), tokens_BT[:, 1:]


def test_is_peaked_like_a_language_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    log_p_NV, tokens_BT = draw(model)
    assert log_p_NV.shape[1] == VOCAB_SIZE
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    top_N = log_p_NV.amax(-1).exp()
    assert 1.5 < entropy_N.mean() < 2.3
    assert entropy_N.quantile(0.1) < 0.7 and entropy_N.quantile(0.9) > 2.5
    assert 0.45 < top_N.mean() < 0.6
    assert top_N.quantile(0.1) < 0.3 and top_N.quantile(0.9) > 0.85
    assert len(set(tokens_BT.flatten().tolist())) > NUM_SEQUENCES * NUM_TOKENS / 3
    assert tokens_BT.max() > VOCAB_SIZE * 3 // 4  # any part of the vocabulary has likely ids


def test_context_matters(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        one, other = (
            model(torch.tensor([[first, 9, 9]])).logits[0, -1].softmax(-1) for first in (5, 6)
        )
    assert (one - other).abs().sum() / 2 > 0.01


def test_is_a_folder_of_ours(folder: Path) -> None:
    config = read_hf_config(folder)
    assert open_model(config)[0].names == set(expected_tensors(config))
    assert tokenizer_size(check_tokenizer_fits(folder, VOCAB_SIZE)) == VOCAB_SIZE


def test_is_always_the_same(folder: Path, tmp_path: Path) -> None:
    again = make_peaked_checkpoint(tmp_path)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
