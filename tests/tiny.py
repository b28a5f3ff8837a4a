"""Tiny HF checkpoints with real tokenizers, written by transformers, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, IM_END = 0, 2
CHARACTERS = "0123456789+-*/=()., \n{}\\abcdefghijklmnopqrstuvwxyz?"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)


def make_tokenizer(characters: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """Three special tokens, then one token for each of `characters`."""
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=SPECIAL_TOKENS,
        eos_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 32,
    num_groups: int = 2,
    vocab_size: int = 64,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    eos_token_id: int | list[int] = END_OF_TEXT,
    max_positions: int = 128,
    scale: float = 0.25,
) -> Path:
    """Write a randomly initialised Qwen3 checkpoint with tokenizer and generation config."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_groups,
        head_dim=8,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        eos_token_id=eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale)
        else:
            parameter.data.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = eos_token_id
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_prompts(path: Path, count: int = 12) -> Path:
    """Write simple sums as jsonl with prompt, response and answer."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "prompt": f"{i}+{2 * i}=?",
                "response": f"{3 * i} \\boxed{{{3 * i}}}",
                "answer": str(3 * i),
            }
            file.write(json.dumps(row) + "\n")
    return path
