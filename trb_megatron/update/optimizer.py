"""The student's gradient buffers, its AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from trb_megatron.config.options import OptimizerConfig
from trb_megatron.models.gpt import HiddenStateGPTModel
from trb_megatron.update.state_size import GRADIENT_DTYPE, keeps_master_weights


def learning_rate_at(step: int, lr: float, warmup_steps: int) -> float:
    """Learning rate of a step counted from 0: a cosine rise over `warmup_steps`, then constant.

    The last warmup step, `warmup_steps - 1`, reaches `lr` (arXiv 2605.31159, training details).
    """
    if step >= warmup_steps:
        return lr
    return lr * 0.5 * (1.0 - math.cos(math.pi * (step + 1) / warmup_steps))


def wrap_student(model: HiddenStateGPTModel, config: OptimizerConfig) -> DistributedDataParallel:
    """Give the student fp32 gradient buffers that are reduced over the data-parallel group."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=torch.float32 == GRADIENT_DTYPE,
        # The fused loss adds to the output weight's buffer itself: an untied weight gets no
        # gradient from autograd, and with overlap its bucket would wait for one.
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
    )
    return DistributedDataParallel(model.config, ddp_config, model)


def build_optimizer(
    student: DistributedDataParallel, config: OptimizerConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron's AdamW over the wrapped student, with fp32 master weights when it is bf16."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=keeps_master_weights(dtype),
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
        ),
        [student],
        use_gloo_process_groups=False,
    )
    for inner in _distributed_optimizers_on_torch_adam(optimizer):
        _create_adam_states(inner)
        _mend_loading(inner)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter group for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load a state dict so that the next update equals that of the optimizer that saved it."""
    optimizer.load_state_dict(state)
    for inner in _distributed_optimizers_on_torch_adam(optimizer):
        # Megatron hands all parameters one `step` tensor, which torch's Adam would then increment
        # once per parameter.
        for param_state in inner.optimizer.state.values():
            param_state["step"] = param_state["step"].clone()


# Megatron's distributed optimizer expects Transformer Engine's or Apex's Adam. Over torch's Adam,
# which it falls back to, loading needs the three mends below (megatron-core 0.16 and 0.19).


def _distributed_optimizers_on_torch_adam(optimizer: MegatronOptimizer) -> list[Any]:
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return []
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [m for m in members if isinstance(m, distrib_optimizer.DistributedOptimizer)]


def _create_adam_states(inner: Any) -> None:
    """torch's Adam creates its state in the first step, but saving and loading need it at once."""
    for group in inner.optimizer.param_groups:
        for param in group["params"]:
            inner.optimizer.state[param] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }


def _mend_loading(inner: Any) -> None:
    """Copy loaded tensors without gradient, and leave `step`, which is restored elsewhere."""

    @torch.no_grad()
    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = inner.model_param_group_index_map[model_param]
        main_param = inner.optimizer.param_groups[group]["params"][order]
        main_param.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            inner.optimizer.state[main_param][name].copy_(tensors[name])

    inner._set_main_param_and_optimizer_states = set_states
