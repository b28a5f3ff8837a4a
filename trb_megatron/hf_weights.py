"""Weights between an HF checkpoint folder and a Megatron model that is spread over ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from trb_megatron.distributed import ParallelLayout
from trb_megatron.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HFTensors
from trb_megatron.models import HFModelConfig, HiddenStateGPTModel
from trb_megatron.param_mapping import MappedParam, map_params

# Transformer Engine fuses a norm into the linear layer behind it, and checkpoints name it so.
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def mapped_parameters(
    model: HiddenStateGPTModel, config: HFModelConfig
) -> Iterator[tuple[str, torch.nn.Parameter, MappedParam]]:
    """Each parameter of this rank, its canonical name (layers counted globally), its HF tensors."""
    mapping = map_params(config.family, config.shape(model.vocab_size))
    first_layer = model.decoder.layers[0].layer_number - 1
    for local_name, param in model.named_parameters():
        name = re.sub(
            r"^decoder\.layers\.(\d+)\.",
            lambda match: f"decoder.layers.{int(match[1]) + first_layer}.",
            local_name,
        )
        # Transformer Engine's grouped experts number the weights instead of the modules.
        name = re.sub(r"experts\.(\w+)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)
        if name not in mapping:
            for separate, fused in _FUSED_NORMS.items():
                name = name.replace(separate, fused)
        yield name, param, mapping[name]


@torch.no_grad()
def load_hf_weights(
    model: HiddenStateGPTModel, config: HFModelConfig, layout: ParallelLayout
) -> None:
    """Fill a model from safetensors; each rank reads only the slices that it owns. Not collective.

    Raises:
        CheckpointError: missing or misshapen tensors, truncated files.
    """
    tensors = HFTensors(config.path)
    tensors.dtype()
    mapping = map_params(config.family, config.shape(model.vocab_size))
    tensors.check(
        {
            name: shape
            for param in mapping.values()
            for name, shape in zip(param.hf_names, param.hf_shapes, strict=True)
        }
    )
    for _, param, mapped in mapped_parameters(model, config):
        hf = [tensors.slice(name) for name in mapped.hf_names]
        param.copy_(mapped.read_shard(hf, layout.tp_rank, layout.tp_size))


def _gather_shards(param: Tensor, layout: ParallelLayout) -> list[Tensor]:
    """The parameter's shards of all tensor-parallel ranks, on tensor-parallel rank 0 only.

    A gather over the tensor-parallel group; other ranks get an empty list.
    """
    if layout.tp_size == 1:
        return [param]
    is_destination = layout.tp_rank == 0
    shards = [torch.empty_like(param) for _ in range(layout.tp_size)] if is_destination else []
    dist.gather(param.contiguous(), shards or None, group=layout.tp_group, group_dst=0)
    return shards


@torch.no_grad()
def save_hf_checkpoint(
    model: HiddenStateGPTModel, config: HFModelConfig, layout: ParallelLayout, target: Path
) -> None:
    """Export a model as an HF checkpoint folder beside the files of the folder it came from.

    Collective over all ranks. The first data-parallel replica writes one safetensors file per
    pipeline stage, in the type of the source checkpoint and with its `hf_vocab_size` rows;
    configuration, tokenizer, chat template and generation config are copied. The folder is written
    as `<target>.partial` and renamed when complete, replacing an older export.
    """
    partial = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    if layout.dp_rank == 0:
        _save_stage(model, config, layout, partial)
    dist.barrier()
    if dist.get_rank() == 0:
        _finish_export(config, layout.pp_size, partial)
        _replace_folder(partial, target)
    dist.barrier()


def _stage_file(stage: int, pp_size: int) -> str:
    if pp_size == 1:
        return SINGLE_FILE
    return f"model-{stage + 1:05d}-of-{pp_size:05d}.safetensors"


def _save_stage(
    model: HiddenStateGPTModel, config: HFModelConfig, layout: ParallelLayout, folder: Path
) -> None:
    dtype = getattr(torch, HFTensors(config.path).dtype())
    tensors: dict[str, Tensor] = {}
    for name, param, mapped in mapped_parameters(model, config):
        shards = _gather_shards(param.data, layout)
        if layout.tp_rank == 0 and not (name == "output_layer.weight" and config.tied_embeddings):
            for hf_name, tensor in mapped.join_shards(shards).items():
                tensors[hf_name] = tensor.to(device="cpu", dtype=dtype).contiguous()
    if layout.tp_rank == 0:
        file = folder / _stage_file(layout.pp_rank, layout.pp_size)
        save_file(tensors, file, metadata={"format": "pt"})
        _fsync(file)


def _finish_export(config: HFModelConfig, pp_size: int, folder: Path) -> None:
    for file in sorted(config.path.iterdir()):
        if file.is_file() and not file.name.startswith("model") and file.suffix != ".bin":
            shutil.copyfile(file, folder / file.name)
    if pp_size > 1:
        tensors = {
            name: _stage_file(stage, pp_size)
            for stage in range(pp_size)
            for name in _tensor_names(folder / _stage_file(stage, pp_size))
        }
        total = sum((folder / _stage_file(s, pp_size)).stat().st_size for s in range(pp_size))
        index = {"metadata": {"total_size": total}, "weight_map": tensors}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        _fsync(file)


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return sorted(handle.keys())


def _replace_folder(partial: Path, target: Path) -> None:
    """Put a complete folder in the place of an older one; there is no moment without either."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
