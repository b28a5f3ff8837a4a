"""The values that the JSON files of a model folder may have, checked before transformers sees them.

transformers takes a negative size, `true` for a number and rope parameters of any kind, and fails
later, without the key. Keys that are not listed here have no effect on the model, or transformers
checks their type and names them; `is_causal` has one in every family, though no class lists it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trb_megatron.huggingface.tensors import CheckpointError, read_json


class _Expected(NamedTuple):
    """What a value has to be, in words and as a condition."""

    words: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int) -> _Expected:
    words = f"an integer from {low:,} to {high:,}"
    return _Expected(words, lambda value: _is_integer(value) and low <= value <= high)


def _number(words: str, holds: Callable[[float], bool]) -> _Expected:
    return _Expected(
        words,
        lambda value: (_is_integer(value) or isinstance(value, float)) and holds(value),
    )


def _or_null(expected: _Expected) -> _Expected:
    return _Expected(
        f"{expected.words}, or null", lambda value: value is None or expected.holds(value)
    )


def _list_of(item: _Expected) -> _Expected:
    return _Expected(
        f"a list, each item {item.words}",
        lambda value: isinstance(value, list) and all(map(item.holds, value)),
    )


_TEXT = _Expected("text", lambda value: isinstance(value, str))
_BOOLEAN = _Expected("true or false", lambda value: isinstance(value, bool))
_MAPPING = _Expected("a mapping", lambda value: isinstance(value, dict))
_CAUSAL = _Expected(
    "true, or no such key: a model whose tokens see later ones is not supported",
    lambda value: value is True,
)
_WIDTH = _integer(1, 2**22)
_POSITIONS = _integer(1, 2**40)
_POSITIVE = _number("a number above 0", lambda value: 0 < value <= 1e15)

_CONFIG = {
    "vocab_size": _integer(1, 2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "num_hidden_layers": _integer(1, 10_000),
    "num_attention_heads": _integer(1, 2**16),
    "num_key_value_heads": _or_null(_integer(1, 2**16)),
    "head_dim": _or_null(_integer(1, 2**16)),
    "max_position_embeddings": _POSITIONS,
    "original_max_position_embeddings": _POSITIONS,
    "num_experts": _integer(1, 2**16),
    "num_local_experts": _integer(1, 2**16),
    "num_experts_per_tok": _integer(1, 2**16),
    "decoder_sparse_step": _integer(1, 10_000),
    "mlp_only_layers": _or_null(_list_of(_integer(0, 10_000))),
    "max_window_layers": _integer(0, 2**31),
    "sliding_window": _or_null(_integer(1, 2**40)),
    "num_labels": _integer(0, 10**6),  # transformers makes a list of so many names
    "rms_norm_eps": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _or_null(_POSITIVE),
    "rope_scaling": _or_null(_MAPPING),
    "rope_parameters": _or_null(_MAPPING),
    "layer_types": _or_null(_list_of(_TEXT)),
    "hidden_act": _TEXT,
    "is_causal": _CAUSAL,
    "tie_word_embeddings": _BOOLEAN,
    "attention_bias": _BOOLEAN,
    "mlp_bias": _BOOLEAN,
    "use_sliding_window": _BOOLEAN,
    "norm_topk_prob": _BOOLEAN,
}
_ROPE = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _or_null(_POSITIVE),
    "factor": _number("a number of at least 1", lambda value: 1 <= value <= 1e15),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _POSITIONS,
}
# What another model would be for, by the key that asks for it.
_OTHER_MODELS = {
    "text_config": "a model inside another one, such as a multimodal one",
    "text_encoder": "a model inside another one",
    "decoder": "a model inside another one",
    "generator": "a model inside another one",
    "per_layer_config": "layers of different sizes",
    "transformers_weights": "weights in another file than the folder's safetensors",
    "compression_config": "quantised weights",
}
_TOKEN = _Expected(
    "text, a token with its content, or null",
    lambda value: (
        value is None
        or isinstance(value, str)
        or (isinstance(value, dict) and isinstance(value.get("content"), str))
    ),
)
_SPECIAL_TOKENS = dict.fromkeys(
    (f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _TOKEN
)
_TEMPLATE = _Expected(
    "a template with name and template",
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("name", "template"))
    ),
)
_ID = _integer(0, 2**31)
_SIDE_FILES: dict[str, dict[str, _Expected]] = {
    "generation_config.json": {
        "eos_token_id": _Expected(
            "a token id, a list of token ids, or null",
            lambda value: value is None or _ID.holds(value) or _list_of(_ID).holds(value),
        ),
    },
    "tokenizer_config.json": {
        **_SPECIAL_TOKENS,
        "tokenizer_class": _or_null(_TEXT),
        "added_tokens_decoder": _or_null(_MAPPING),
        "model_max_length": _or_null(_number("a number above 0", lambda value: value > 0)),
        "chat_template": _Expected(
            "text, a list of templates with name and template, or null",
            lambda value: (
                value is None or isinstance(value, str) or _list_of(_TEMPLATE).holds(value)
            ),
        ),
    },
    "special_tokens_map.json": _SPECIAL_TOKENS,
}


def check_values(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse values of a `config.json` that no model of a supported family has.

    Raises:
        CheckpointError: names file, key and value, and says what is expected; quantised weights, a
            model inside another one, layers of different sizes.
    """
    for key, meaning in _OTHER_MODELS.items():
        if raw.get(key) is not None:
            raise CheckpointError(
                f"{file}: {key} is {_show(raw[key])}: {meaning}, which is not supported"
            )
    _refuse_quantised(raw, file)
    _check(raw, _CONFIG, file)
    for where in ("rope_parameters", "rope_scaling"):
        rope = raw.get(where) or {}
        for key, value in rope.items():
            if isinstance(value, dict):
                raise CheckpointError(
                    f"{file}: {where} has parameters for {key} of their own; rotary embeddings "
                    "that differ between layers are not supported"
                )
        _check(rope, _ROPE, file, f"{where}.")


def check_side_files(path: Path) -> None:
    """Refuse broken files beside `config.json`, where they exist.

    Raises:
        CheckpointError: names file, key and value, and says what is expected.
    """
    for name, expected in _SIDE_FILES.items():
        if (path / name).is_file():
            _check(read_json(path / name), expected, path / name)


def _refuse_quantised(raw: Mapping[str, Any], file: Path) -> None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    method = _show(quantization)
    if isinstance(quantization, dict):
        method = f"method {quantization.get('quant_method', 'unknown')!r}"
    raise CheckpointError(
        f"{file}: quantised weights (quantization_config, {method}) cannot be trained "
        "or converted; use the checkpoint that they were made from, or dequantise them"
    )


def _check(
    values: Mapping[str, Any], expected: Mapping[str, _Expected], file: Path, prefix: str = ""
) -> None:
    for key, (words, holds) in expected.items():
        if key in values and not holds(values[key]):
            raise CheckpointError(
                f"{file}: {prefix}{key} is {_show(values[key])}; expected {words}"
            )


def _show(value: Any) -> str:
    """A value as JSON has it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
