"""Weights between an HF checkpoint folder and a Megatron model that is spread over ranks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.atomic_folder import PARTIAL_SUFFIX, finish_folder, start_folder
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.kinds import TensorSlice
from trb_megatron.huggingface.model_tensors import open_model
from trb_megatron.huggingface.param_mapping import MappedParam, map_params
from trb_megatron.huggingface.tensors import (
    CheckpointError,
    ShardWriter,
    TensorInfo,
    copy_side_files,
    shard_name,
    write_index,
)
from trb_megatron.job.shared_failure import SharedFailure
from trb_megatron.models.gpt import HiddenStateGPTModel

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


class TensorSource(Protocol):
    """Where HF tensors are read from, by name: an HF checkpoint, or a Megatron one."""

    def slice(self, name: str) -> TensorSlice: ...

    def locate(self, name: str) -> Path: ...


def load_hf_weights(
    model: HiddenStateGPTModel, config: HFModelConfig, layout: ParallelLayout
) -> list[str]:
    """Fill a model from safetensors. Not collective.

    Returns:
        Warnings, which name the tensors that the model has no use for.

    Raises:
        CheckpointError: a folder that the model cannot be read from (see `open_model`).
    """
    tensors, warnings = open_model(config)
    fill_model(model, config, layout, tensors)
    return warnings


@torch.no_grad()
def fill_model(
    model: HiddenStateGPTModel, config: HFModelConfig, layout: ParallelLayout, tensors: TensorSource
) -> None:
    """Copy the slices that this rank owns into its part of a model. Not collective.

    Raises:
        CheckpointError: names a tensor that holds NaN or infinite values.
    """
    for _, param, mapped in mapped_parameters(model, config):
        hf = [tensors.slice(name) for name in mapped.hf_names]
        param.copy_(mapped.read_shard(hf, layout.tp_rank, layout.tp_size))
        # One NaN makes both NaN; it takes half the time of a copy.
        if not torch.stack(param.aminmax()).isfinite().all():
            raise CheckpointError(_describe_nonfinite(tensors, mapped.hf_names, param.dtype))


def _describe_nonfinite(tensors: TensorSource, names: Sequence[str], dtype: torch.dtype) -> str:
    """Which of these tensors has values that no model can compute with, and where the first is."""
    for name in names:
        tensor = tensors.slice(name)[:].to(dtype)
        places = (~tensor.isfinite()).nonzero().tolist()
        if places:
            value = tensor[tuple(places[0])].item()
            return (
                f"{tensors.locate(name)}: tensor {name} holds {value} at {places[0]} "
                f"({len(places):,} of its {tensor.numel():,} values are NaN or infinite in "
                f"{str(dtype).removeprefix('torch.')}); download the file once more, or take "
                "weights from before training broke them"
            )
    raise AssertionError(f"the values of {', '.join(names)} are finite in the file, not as read")


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
    pipeline stage, each tensor in the type that the source checkpoint has it in and with its
    `hf_vocab_size` rows; configuration, tokenizer, chat template and generation config are copied.
    The folder is written as `<target>.partial` and renamed when complete, replacing an older
    export.

    Raises:
        OSError: a rank could not write; on all ranks, and what was written is removed.
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    failure = SharedFailure(target.parent)
    is_rank_zero = dist.get_rank() == 0
    try:
        with failure.kept():
            if is_rank_zero:
                start_folder(target)
        failure.raise_together(OSError)
        tensors = _stage_tensors(model, config)
        if layout.dp_rank == 0:
            _save_stage(model, config, layout, tensors, partial, failure)
        stages = _gather_stages(tensors, layout)
        failure.raise_together(OSError)
        with failure.kept():
            if is_rank_zero:
                write_index(partial, stages)
                copy_side_files(config.path, partial)
                finish_folder(partial, target)
        failure.raise_together(OSError)
    except OSError:
        if is_rank_zero:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _exported_parameters(
    model: HiddenStateGPTModel, config: HFModelConfig
) -> Iterator[tuple[torch.nn.Parameter, MappedParam]]:
    """This rank's parameters without the second use of a tied embedding."""
    for name, param, mapped in mapped_parameters(model, config):
        if not (name == "output_layer.weight" and config.tied_embeddings):
            yield param, mapped


def _stage_tensors(model: HiddenStateGPTModel, config: HFModelConfig) -> list[TensorInfo]:
    """The HF tensors of this pipeline stage, in the order of its parameters."""
    shapes = {
        name: shape
        for _, mapped in _exported_parameters(model, config)
        for name, shape in zip(mapped.hf_names, mapped.hf_shapes, strict=True)
    }
    tensors, _ = open_model(config)
    dtypes = tensors.dtypes(shapes)
    return [TensorInfo(name, dtypes[name], shape) for name, shape in shapes.items()]


def _save_stage(
    model: HiddenStateGPTModel,
    config: HFModelConfig,
    layout: ParallelLayout,
    tensors: list[TensorInfo],
    folder: Path,
    failure: SharedFailure,
) -> None:
    """Write this stage's file parameter by parameter. Gathers over the tensor-parallel group.

    A write that fails is kept in `failure`, and the gathers go on.
    """
    with failure.kept(), ExitStack() as stack:
        if layout.tp_rank == 0:
            with failure.kept():
                path = folder / shard_name(layout.pp_rank, layout.pp_size)
                writer = ShardWriter(stack.enter_context(path.open("wb")), tensors)
        for param, mapped in _exported_parameters(model, config):
            shards = _gather_shards(param.data, layout)
            if layout.tp_rank == 0 and failure.error is None:
                with failure.kept():
                    for name, tensor in mapped.join_shards(shards).items():
                        writer.write(name, tensor)


def _gather_stages(tensors: list[TensorInfo], layout: ParallelLayout) -> list[list[TensorInfo]]:
    """The tensors of each pipeline stage, first stage first. An all-gather over the world."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (layout.pp_rank, tensors))
    by_stage = dict(gathered)
    return [by_stage[stage] for stage in range(layout.pp_size)]
