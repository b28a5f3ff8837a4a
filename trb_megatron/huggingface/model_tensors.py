"""Which tensors of a checkpoint folder a model takes: the rule of transformers, for all commands.

What transformers loads without a word is loaded: names without the prefix of the base model or with
it twice, a tied output weight instead of the embedding, constants that old versions stored. Of what
it would warn of, the heads of other tasks are left out with a warning, since a language model
computes the same without them. The rest is refused: the model would have other numbers than its
owner means.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.families import BASE_MODEL, EMBEDDING, OUTPUT
from trb_megatron.huggingface.kinds import Shape
from trb_megatron.huggingface.param_mapping import stored_params
from trb_megatron.huggingface.tensors import INDEX_FILE, CheckpointError, HFTensors

_CONSTANTS = re.compile(r"rotary_emb\.inv_freq|(^|\.)(position_ids|masked_bias)$")
_OTHER_HEADS = re.compile(r"^(score|classifier|qa_outputs|v_head|value_head|reward_head|mtp)\.")
_ADAPTER = re.compile(r"(^|\.)(lora_|base_layer\.|modules_to_save\.|adapter)")
_QUANTISED = re.compile(
    r"[._](scales?|scale_inv|zero_points?|qweight|qzeros|g_idx|absmax|quant_map|quant_state)\b"
)
_LAYER = re.compile(rf"({re.escape(BASE_MODEL)})?layers\.(\d+)\.")


def expected_tensors(config: HFModelConfig) -> dict[str, Shape]:
    """Name and shape of every HF tensor that a model is made of."""
    params = stored_params(config.family, config.shape(config.vocab_size))
    return {
        name: shape
        for param in params.values()
        for name, shape in zip(param.hf_names, param.hf_shapes, strict=True)
    }


def open_model(config: HFModelConfig) -> tuple[HFTensors, list[str]]:
    """The tensors of a model's folder, under the names of its family, and what to warn of.

    The warnings name the tensors that are left out.

    Raises:
        CheckpointError: broken files (see `HFTensors`); tensors that are missing, have another
            shape or a type that no weights have, or that the model would compute without.
    """
    tensors = HFTensors(config.path)
    expected = expected_tensors(config)
    _rename(tensors, expected)
    _tie(tensors, config)
    unknown = {
        name
        for name in tensors.names - set(expected)
        if not _CONSTANTS.search(name) and not (config.tied_embeddings and name == OUTPUT)
    }
    heads = sorted(name for name in unknown if _OTHER_HEADS.match(name))
    unknown -= set(heads)
    _refuse_other_models(config, unknown)
    _refuse_missing(tensors, expected)
    _refuse_unknown(config, unknown)
    for name, shape in sorted(expected.items()):
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{config.path}: tensor {name} has shape {list(tensors.shape(name))}, "
                f"config.json asks for {list(shape)}"
            )
    tensors.dtypes(expected)
    if not heads:
        return tensors, []
    return tensors, [
        f"{config.path}: {_count(heads)} belong to another head than the language model's and are "
        "left out"
    ]


def is_left_out(name: str) -> bool:
    """Whether a tensor that transformers calls unexpected changes no logits."""
    return bool(_CONSTANTS.search(name) or _OTHER_HEADS.match(name))


def _rename(tensors: HFTensors, expected: Collection[str]) -> None:
    """Add the prefix of the base model where it is missing, take it away where it is too much."""
    for stored in sorted(tensors.names - set(expected)):
        for name in (BASE_MODEL + stored, stored.removeprefix(BASE_MODEL)):
            if name == stored or name not in {*expected, OUTPUT}:
                continue
            if name in tensors.names:
                raise CheckpointError(
                    f"{tensors.path}: tensors {stored} and {name} are one tensor of the model; "
                    "keep one of them"
                )
            tensors.rename(stored, name)
            break


def _tie(tensors: HFTensors, config: HFModelConfig) -> None:
    """Take a tied output weight for the embedding where that is missing, and compare both."""
    if not config.tied_embeddings or OUTPUT not in tensors.names:
        return
    if EMBEDDING not in tensors.names:
        tensors.rename(OUTPUT, EMBEDDING)
    elif not tensors.are_equal(OUTPUT, EMBEDDING):
        raise CheckpointError(
            f"{config.path}: config.json has tie_word_embeddings=true, but {OUTPUT} differs from "
            f"{EMBEDDING}; set it to false to use both, or remove {OUTPUT} from the file"
        )


def _refuse_other_models(config: HFModelConfig, unknown: Collection[str]) -> None:
    """Refuse tensors that show a model of another kind, whatever else is there or missing."""
    layers = {int(match[2]): name for name in sorted(unknown) if (match := _LAYER.match(name))}
    if layers and max(layers) >= config.num_layers:
        raise CheckpointError(
            f"{config.path}: config.json has num_hidden_layers={config.num_layers}, but the "
            f"weights have a layer {max(layers)} ({layers[max(layers)]}); correct config.json; "
            "then trb-drop-layers makes a model of fewer layers"
        )
    if adapter := [name for name in unknown if _ADAPTER.search(name)]:
        raise CheckpointError(
            f"{config.path}: {_count(adapter)} belong to an adapter that is not merged; "
            "merge it by merge_and_unload() of peft and save the model again"
        )
    if quantised := [name for name in unknown if _QUANTISED.search(name)]:
        raise CheckpointError(
            f"{config.path}: {_count(quantised)} belong to quantised weights, which cannot be "
            "trained or converted; use the checkpoint that they were made from, or dequantise them"
        )


def _refuse_missing(tensors: HFTensors, expected: Collection[str]) -> None:
    missing = sorted(set(expected) - tensors.names)
    if not missing:
        return
    advice = "correct config.json, or take the complete weights"
    if missing == [OUTPUT]:
        advice = (
            "set tie_word_embeddings to true in config.json if the output weight is the embedding"
        )
    if missing[0] in tensors.absent:
        advice = (
            f"{INDEX_FILE} promises {missing[0]} in {tensors.absent[missing[0]]}, which lacks it: "
            "download the folder once more"
        )
    tails = tuple("." + name.removeprefix(BASE_MODEL) for name in missing)
    others = sorted(name for name in tensors.names - set(expected) if name.endswith(tails))
    if others:
        advice = f"the file has {others[0]}: save the model itself, under its own names"
    raise CheckpointError(
        f"{tensors.path}: {len(missing)} of the model's {len(expected)} tensors are missing: "
        f"{_shorten(missing)}; {advice}"
    )


def _refuse_unknown(config: HFModelConfig, unknown: Collection[str]) -> None:
    if not unknown:
        return
    biases = [name for name in unknown if name.endswith(".bias")]
    raise CheckpointError(
        f"{config.path}: {_count(biases or unknown)} have no place in a {config.family} model with "
        "this config.json, which would compute without; correct config.json, or save the weights "
        "without them if you mean that"
    )


def _count(names: Collection[str]) -> str:
    """How many tensors, and the first of their names."""
    return f"{len(names)} of the tensors ({_shorten(sorted(names))})"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
