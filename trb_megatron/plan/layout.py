"""Which layers, rows and parameters each rank holds, and what it computes with in a step.

All ranks of a pipeline stage hold equally much of a model, so everything is said once per stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod

from trb_megatron.config.options import Config
from trb_megatron.config.values import ConfigError
from trb_megatron.huggingface.config import HFModelConfig, layers_of_stages
from trb_megatron.huggingface.param_mapping import MappedParam, map_params, stored_params


@dataclass(frozen=True)
class StageShare:
    """The part of a model that each rank of a pipeline stage holds.

    Attributes:
        layers: counted from 0 over the model.
        num_parameters, num_layer_parameters: of one rank, and those of them in layers.
        buffer_size: elements of Megatron's buffer for them where the optimizer is distributed: each
            parameter begins at a multiple of 64, and the end can be cut over the replicas.
    """

    layers: range
    num_parameters: int
    num_layer_parameters: int
    buffer_size: int


@dataclass(frozen=True)
class ModelPlan:
    """A model cut into pipeline stages and over tensor-parallel ranks.

    `num_parameters` are those of the checkpoint: vocabulary not padded, tied embeddings once.
    """

    config: HFModelConfig
    num_parameters: int
    stages: tuple[StageShare, ...]


@dataclass(frozen=True)
class StepPlan:
    """The most that a step computes with; a replica's share where it says so.

    Attributes:
        num_responses: of all replicas.
        max_length: tokens of a prompt and its response; None where the dataset's decide.
        num_microbatches: of a replica; None where the dataset's lengths decide.
        microbatch_tokens: of the longest microbatch.
    """

    num_responses: int
    max_length: int | None
    num_microbatches: int | None
    microbatch_tokens: int


def plan_step(config: Config, dp_size: int) -> StepPlan:
    """The sizes of a step at most, on so many replicas.

    Raises:
        ConfigError: replicas without work.
    """
    num_responses = config.training.prompts_per_step
    if config.is_distilling:
        num_responses *= config.rollout.rollouts_per_prompt
    if num_responses < dp_size:
        raise ConfigError(
            f"training.prompts_per_step: a step of {num_responses} responses leaves some of "
            f"the {dp_size} data-parallel replicas without work; raise it"
        )
    budget = config.training.max_tokens_per_microbatch
    if not config.is_distilling:
        return StepPlan(num_responses, None, None, budget)
    max_length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    share = -(-num_responses // dp_size)
    return StepPlan(
        num_responses=num_responses,
        max_length=max_length,
        num_microbatches=-(-share // max(1, budget // max_length)),
        microbatch_tokens=min(max(budget, max_length), share * max_length),
    )


def plan_model(
    model: HFModelConfig, vocab_size: int, tp_size: int, pp_size: int, dp_size: int
) -> ModelPlan:
    """Cut a model into pipeline stages and over tensor-parallel ranks."""
    shape = model.shape(vocab_size)
    params = map_params(model.family, shape)
    if model.tied_embeddings and pp_size == 1:
        del params["output_layer.weight"]
    stages = layers_of_stages(model.num_layers, pp_size)
    stage_of_layer = {layer: number for number, layers in enumerate(stages) for layer in layers}
    sizes: list[dict[str, int]] = [{} for _ in stages]
    for name, param in params.items():
        if param.stack_index:
            stage = stage_of_layer[param.stack_index[0]]
        else:
            stage = 0 if name.startswith("embedding.") else -1
        sizes[stage][name] = _size_on_rank(param, tp_size)
    stored = stored_params(model.family, shape).values()
    return ModelPlan(
        config=model,
        num_parameters=sum(prod(shape) for param in stored for shape in param.hf_shapes),
        stages=tuple(
            StageShare(
                layers=layers,
                num_parameters=sum(of_stage.values()),
                num_layer_parameters=sum(
                    size for name, size in of_stage.items() if name.startswith("decoder.layers.")
                ),
                buffer_size=sum(bucket_sizes(of_stage, model.tied_embeddings, pp_size, dp_size)),
            )
            for layers, of_stage in zip(stages, sizes, strict=True)
        ),
    )


def _size_on_rank(param: MappedParam, tp_size: int) -> int:
    size = prod(param.full_shape)
    return size if param.kind.cut_axis is None else size // tp_size


def bucket_sizes(sizes: dict[str, int], is_tied: bool, pp_size: int, dp_size: int) -> Iterator[int]:
    """Sizes of the buckets that Megatron's distributed optimizer puts parameters into.

    The two copies of a tied embedding have buckets of their own, so that both stages cut it alike
    (`_ParamAndGradBuffer` in megatron-core 0.16, `optimizer/param_layout.py` in 0.19).
    """
    shared = {"embedding.word_embeddings.weight", "output_layer.weight"}
    is_shared = {name: is_tied and pp_size > 1 and name in shared for name in sizes}
    for bucket in (False, True):
        members = [size for name, size in sizes.items() if is_shared[name] == bucket]
        yield _pad(sum(_pad(size, 64) for size in members), lcm(dp_size, 128))


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
