"""Model families: one table each, of Megatron parameters and the HF tensors that they are made of.

A family is a tuple of rows (Megatron name, kind, HF names); `{i}` stands for the layer, counted
over the whole model, `{e}` for the expert of a mixture-of-experts layer. Megatron names are those
of its distributed checkpoints, where a norm in front of a linear layer belongs to that layer. The
kind (`kinds`) says how the HF tensors are laid out inside the Megatron parameter and how that
parameter is cut over tensor-parallel (TP) ranks.
"""

from trb_megatron.huggingface.kinds import (
    ATTENTION_OUTPUT,
    EXPERT_GATE_UP,
    EXPERT_OUTPUT,
    GATE_UP,
    GROUPED_QKV,
    GROUPED_QKV_BIAS,
    HEAD_VECTOR,
    HIDDEN_VECTOR,
    MLP_OUTPUT,
    ROUTER,
    VOCABULARY,
    Kind,
)

Row = tuple[str, Kind, tuple[str, ...]]

BASE_MODEL = "model."
"""What transformers puts before the names of everything but the output weight."""
EMBEDDING = BASE_MODEL + "embed_tokens.weight"
OUTPUT = "lm_head.weight"
HF_LAYER = BASE_MODEL + "layers.{i}."
_HF_EXPERT = HF_LAYER + "mlp.experts.{e}."
_LAYER = "decoder.layers.{i}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{e}."

_OUTSIDE_THE_LAYERS: tuple[Row, ...] = (
    ("embedding.word_embeddings.weight", VOCABULARY, (EMBEDDING,)),
    ("decoder.final_layernorm.weight", HIDDEN_VECTOR, (BASE_MODEL + "norm.weight",)),
    ("output_layer.weight", VOCABULARY, (OUTPUT,)),
)
_ATTENTION: tuple[Row, ...] = (
    (
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        HIDDEN_VECTOR,
        (HF_LAYER + "input_layernorm.weight",),
    ),
    (
        _LAYER + "self_attention.linear_qkv.weight",
        GROUPED_QKV,
        tuple(HF_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    (
        _LAYER + "self_attention.linear_proj.weight",
        ATTENTION_OUTPUT,
        (HF_LAYER + "self_attn.o_proj.weight",),
    ),
)
_QKV_BIAS: Row = (
    _LAYER + "self_attention.linear_qkv.bias",
    GROUPED_QKV_BIAS,
    tuple(HF_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"),
)
_QK_NORMS: tuple[Row, ...] = tuple(
    (
        _LAYER + f"self_attention.{x}_layernorm.weight",
        HEAD_VECTOR,
        (HF_LAYER + f"self_attn.{x}_norm.weight",),
    )
    for x in "qk"
)
_MLP: tuple[Row, ...] = (
    (
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        HIDDEN_VECTOR,
        (HF_LAYER + "post_attention_layernorm.weight",),
    ),
    (
        _LAYER + "mlp.linear_fc1.weight",
        GATE_UP,
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
    ),
    (_LAYER + "mlp.linear_fc2.weight", MLP_OUTPUT, (HF_LAYER + "mlp.down_proj.weight",)),
)
_EXPERTS: tuple[Row, ...] = (
    (
        _LAYER + "pre_mlp_layernorm.weight",
        HIDDEN_VECTOR,
        (HF_LAYER + "post_attention_layernorm.weight",),
    ),
    (_LAYER + "mlp.router.weight", ROUTER, (HF_LAYER + "mlp.gate.weight",)),
    (
        _EXPERT + "linear_fc1.weight",
        EXPERT_GATE_UP,
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
    ),
    (_EXPERT + "linear_fc2.weight", EXPERT_OUTPUT, (_HF_EXPERT + "down_proj.weight",)),
)

LLAMA = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_MLP)
MISTRAL = LLAMA
QWEN2 = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, _QKV_BIAS, *_MLP)
QWEN3 = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_QK_NORMS, *_MLP)
QWEN3_MOE = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_QK_NORMS, *_EXPERTS)

FAMILIES: dict[str, tuple[Row, ...]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
"""The table of each `model_type` of an HF config.json."""


def has_parameter(family: str, ending: str) -> bool:
    """Whether a family's layers have a parameter whose Megatron name ends so."""
    return any(name.endswith(ending) for name, _, _ in FAMILIES[family])
