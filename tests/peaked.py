"""A tiny checkpoint with a large vocabulary and logits as peaked as those of a language model.

Random weights give nearly uniform distributions, for which a vocabulary of 150,000 ids is no
harder than one of 50. Here a few ids are likely everywhere (Zipf's law), and each position prefers
others, some strongly and some weakly. Measured over 512 tokens that the model draws itself, beside
SmolLM2-135M-Instruct over 259 of its own, with the 10th and 90th percentiles:

                                  here                 SmolLM2-135M-Instruct
    entropy in nats               1.9 (0.4 to 3.1)     2.0 (0.3 to 4.1)
    mass of the likeliest id      0.53 (0.22 to 0.93)  0.54 (0.18 to 0.94)
"""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny import CHARACTERS, END_OF_TEXT, SPECIAL_TOKENS, make_tokenizer

VOCAB_SIZE = 151_936  # Qwen3's rows
ZIPF, SHARPNESS, SPREAD, LAYER_SCALE = 1.0, 1.15, 0.8, 0.2


def make_peaked_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 32,
    num_layers: int = 2,
) -> Path:
    """Write a Qwen3 checkpoint whose tokenizer has as many ids as the model.

    The first hidden unit is the same at every position, and the output layer's weight on it falls
    with the logarithm of an id's rank: that is Zipf's law. The other units depend on the token and
    its context; how large they are in comparison, and so how peaked the distribution is, differs
    from token to token.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=END_OF_TEXT,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, LAYER_SCALE, generator=generator)
    embedding_VH = model.model.embed_tokens.weight.data.normal_(generator=generator)
    embedding_VH *= torch.empty(vocab_size, 1).log_normal_(0, SPREAD, generator=generator)
    embedding_VH[:, 0] = 4.0
    head_VH = model.lm_head.weight.data.normal_(0, SHARPNESS, generator=generator)
    rank_V = 1 + torch.randperm(vocab_size, generator=generator)
    head_VH[:, 0] = -ZIPF * rank_V.log()
    model.generation_config.eos_token_id = END_OF_TEXT
    model.save_pretrained(path)
    num_words = vocab_size - len(SPECIAL_TOKENS) - len(CHARACTERS)
    make_tokenizer([*CHARACTERS, *(f"<{i}>" for i in range(num_words))]).save_pretrained(path)
    return path
