"""Checkpoint folders with changed weights, and what is said of each."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.families import SIZES
from trb_megatron.huggingface.tensors import INDEX_FILE, SINGLE_FILE

NUM_LAYERS = 2
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Folder:
    """A checkpoint folder before it is written; `shards` are files that an index lists."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    shards: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)

    def cut(self) -> None:
        """Move the tensors into two files with an index, if they are in one."""
        names = sorted(self.tensors)
        if not names:
            return
        for number, part in enumerate((names[::2], names[1::2])):
            self.shards[f"model-{number}.safetensors"] = {n: self.tensors[n] for n in part}
        self.weight_map = {n: file for file, part in self.shards.items() for n in part}
        self.tensors = {}

    def write(self, path: Path) -> Path:
        path.mkdir()
        files = {**({SINGLE_FILE: self.tensors} if self.tensors else {}), **self.shards}
        for name, tensors in files.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, path / name)
        if self.weight_map:
            index = {"metadata": {}, "weight_map": self.weight_map}
            (path / INDEX_FILE).write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(self.config))
        return path


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) / 2


def _add(name: str, *shape: int) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors[name] = _noise(*shape)

    return change


def _rename(rule: Callable[[str], str]) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors = {rule(name): tensor for name, tensor in folder.tensors.items()}

    return change


def _remove(ending: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors = {n: t for n, t in folder.tensors.items() if not n.endswith(ending)}

    return change


def _cast(dtype: torch.dtype, ending: str = "") -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for name, tensor in folder.tensors.items():
            if name.endswith(ending):
                folder.tensors[name] = tensor.to(dtype)

    return change


def _break(name: str, value: float, *place: int) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors[name] = folder.tensors[name].clone()
        folder.tensors[name][place] = value

    return change


def _configure(**values: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config.update(values)


def _copy_layer(folder: Folder) -> None:
    layer = {n: t for n, t in folder.tensors.items() if ".layers.1." in n}
    folder.tensors |= {n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in layer.items()}


def _copy_embedding(folder: Folder) -> None:
    folder.tensors[OUTPUT] = folder.tensors[EMBEDDING].clone()


def _move_embedding(folder: Folder) -> None:
    folder.tensors[OUTPUT] = folder.tensors.pop(EMBEDDING)


def _cut_rows(folder: Folder) -> None:
    folder.tensors[EMBEDDING] = folder.tensors[EMBEDDING][:-1]


def _cut(folder: Folder) -> None:
    folder.cut()


def _index_beside_single(folder: Folder) -> None:
    single = folder.tensors
    folder.cut()
    for part in folder.shards.values():
        part.update({name: torch.zeros_like(tensor) for name, tensor in part.items()})
    folder.tensors = single


def _index_with_wrong_file(folder: Folder) -> None:
    folder.cut()
    names = sorted(folder.weight_map)
    files = [folder.weight_map[name] for name in names[:2]]
    folder.weight_map |= dict(zip(names[:2], reversed(files), strict=True))


def _index_lists_too_little(folder: Folder) -> None:
    folder.cut()
    del folder.weight_map[max(folder.weight_map)]


def _index_lists_too_much(folder: Folder) -> None:
    folder.cut()
    folder.weight_map["model.layers.0.other.weight"] = next(iter(folder.shards))


def _index_without_tensor(folder: Folder) -> None:
    folder.cut()
    for part in folder.shards.values():
        part.pop(QUERY, None)


def _duplicate(factor: float) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.cut()
        name = max(folder.weight_map)
        tensor = folder.shards[folder.weight_map[name]][name]
        for part in folder.shards.values():
            part.setdefault(name, factor * tensor.float())

    return change


def _quantise(folder: Folder) -> None:
    folder.tensors[QUERY] = folder.tensors[QUERY].to(torch.float8_e4m3fn)
    folder.tensors[QUERY + "_scale_inv"] = torch.tensor([[0.5]])


def _fuse_experts(folder: Folder) -> None:
    experts = [n for n in folder.tensors if ".mlp.experts." in n and n.endswith("down_proj.weight")]
    for layer in range(NUM_LAYERS):
        own = sorted(n for n in experts if f".layers.{layer}." in n)
        if own:
            fused = torch.stack([folder.tensors.pop(n) for n in own])
            folder.tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = fused


def _without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def _nothing(folder: Folder) -> None:
    pass


Changes = dict[str, tuple[Callable[[Folder], None], str | None]]

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
# By name: what changes, and what the refusal or the warning says; None where it is read in silence.
CHANGES: Changes = {
    "nothing": (_nothing, None),
    "several files": (_cut, None),
    "an index beside a single file": (_index_beside_single, None),
    "an index with a wrong file": (_index_with_wrong_file, None),
    "a file that the index lists in part": (_index_lists_too_little, None),
    "one tensor in two files": (_duplicate(1.0), None),
    "an index that lists too much": (_index_lists_too_much, None),
    "frequencies of each layer": (_add(FREQUENCIES, 4), None),
    "frequencies": (_add("model.rotary_emb.inv_freq", 4), None),
    "no prefix": (_rename(_without_prefix), None),
    "a prefix twice": (_rename(lambda name: "model." + name), None),
    "some without prefix": (
        _rename(lambda name: _without_prefix(name) if "q_proj" in name else name),
        None,
    ),
    "fp16": (_cast(torch.float16), None),
    "bf16": (_cast(torch.bfloat16), None),
    "norms in fp32": (_cast(torch.bfloat16, "proj.weight"), None),
    "older configuration": (_configure(torch_dtype="float32", pretraining_tp=1), None),
    "swish": (_configure(hidden_act="swish"), None),
    "a base as an integer": (_configure(rope_theta=10_000, rope_parameters=None), None),
    "linear scaling of old": (
        _configure(rope_parameters=None, rope_scaling={"type": "linear", "factor": 4}),
        None,
    ),
    "an index without a tensor": (_index_without_tensor, "promises model.layers.1"),
    "a layer too many": (_copy_layer, "num_hidden_layers=2, but the weights have a layer 2"),
    "a layer too few": (_configure(num_hidden_layers=3), "tensors are missing: model.layers.2"),
    "fewer layers wanted": (_configure(num_hidden_layers=1), "num_hidden_layers=1, but"),
    "bias of the output": (_add("model.layers.0.self_attn.o_proj.bias", 32), "o_proj.bias"),
    "bias of the MLP": (_add("model.layers.1.mlp.down_proj.bias", 32), "down_proj.bias"),
    "bias of the head": (_add("lm_head.bias", SIZES["vocab_size"]), "lm_head.bias"),
    "norm of another family": (
        _add("model.layers.0.self_attn.q_layernorm.weight", 8),
        "q_layernorm.weight",
    ),
    "an adapter": (
        _add("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 32),
        "belong to an adapter that is not merged",
    ),
    "an adapter's base": (
        _rename(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")),
        "belong to an adapter that is not merged",
    ),
    "a wrapped model": (
        _rename(lambda name: "base_model.model." + name),
        "the file has base_model.model.",
    ),
    "another prefix": (
        _rename(lambda name: name.replace("model.", "transformer.")),
        "the file has transformer.",
    ),
    "compiled": (_rename(lambda name: "_orig_mod." + name), "the file has _orig_mod."),
    "no norm": (_remove("model.norm.weight"), "tensors are missing: model.norm.weight"),
    "no queries": (_remove("q_proj.weight"), "tensors are missing"),
    "no embedding": (_remove("embed_tokens.weight"), "missing: model.embed_tokens.weight"),
    "fewer rows": (_cut_rows, "has shape [60, 32], config.json asks for [61, 32]"),
    "fp8 with scales": (_quantise, "belong to quantised weights"),
    "a classifier": (_add("score.weight", 2, 32), "score.weight"),
    "a value head": (_add("v_head.summary.weight", 1, 32), "v_head.summary.weight"),
    "an old mask": (_add("model.layers.0.self_attn.masked_bias", 1), None),
    "anything": (_add("model.surprise", 3), "model.surprise"),
}
# transformers loads these in silence, and computes NaN with most.
NOT_FINITE: Changes = {
    "a NaN": (_break(QUERY, math.nan, 3, 5), f"tensor {QUERY} holds nan at [3, 5] (1 of its "),
    "an infinity": (
        _break("model.norm.weight", -math.inf, 7),
        "model.safetensors: tensor model.norm.weight holds -inf at [7] (1 of its 32 values are",
    ),
    "NaN in a row of the vocabulary": (
        _break(EMBEDDING, math.nan, SIZES["vocab_size"] - 1),
        f"tensor {EMBEDDING} holds nan at [60, 0] (32 of its 1,952 values",
    ),
}
ONLY_TIED: Changes = {
    "the embedding as output": (_copy_embedding, None),
    "the output alone": (_move_embedding, None),
    "another output": (_add(OUTPUT, SIZES["vocab_size"], 32), "lm_head.weight differs from"),
    "an output of other size": (_add(OUTPUT, 4, 32), "lm_head.weight differs from"),
    "untied": (_configure(tie_word_embeddings=False), "set tie_word_embeddings to true"),
}
ONLY_UNTIED: Changes = {
    "no output": (_remove(OUTPUT), "set tie_word_embeddings to true"),
    "tied": (_configure(tie_word_embeddings=True), "lm_head.weight differs from"),
}
ONLY_IN: dict[str, Changes] = {
    "llama": {
        "biases": (_configure(attention_bias=True), "attention_bias is not supported"),
        # Whatever the family: transformers guesses in silence, and its guess may be wrong.
        "one tensor with two values": (_duplicate(2.0), "has other values in another file"),
        "a tensor twice": (_add("layers.0.input_layernorm.weight", 32), "are one tensor"),
        "fp8": (_cast(torch.float8_e4m3fn, "q_proj.weight"), "has type F8_E4M3"),
        "integers": (_cast(torch.int32, "q_proj.weight"), "has type I32"),
    },
    "mistral": {"biases": (_configure(attention_bias=True), None)},  # its class has no such key
    "qwen2": {"no biases": (_remove("k_proj.bias"), "tensors are missing")},
    "qwen3": {"no norms": (_remove("q_norm.weight"), "tensors are missing")},
    "qwen3_moe": {
        "an expert too many": (
            _configure(num_local_experts=3),
            "have no place in a qwen3_moe model",
        ),
        "an expert too few": (_configure(num_local_experts=5), "tensors are missing"),
        "fused experts": (_fuse_experts, "tensors are missing"),
    },
}
