"""Weights, and passes without a cache, on a GPU that is not there."""

from pathlib import Path

import pytest
import torch

from tests.fake_cuda import fake_cuda, join_fake_world, run_alone
from tests.published import QWEN3_8B, write_model
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake tensors of a GPU need a torch that is built for CUDA"
)


def pass_of_the_teacher(folder: Path) -> tuple[list[tuple[int, ...]], list[str]]:
    """Shapes of the hidden states of two microbatches, and what read from the GPU for them."""
    from trb_megatron.batch import Rollout, build_microbatches
    from trb_megatron.huggingface.config import read_hf_config
    from trb_megatron.models.build import build_model
    from trb_megatron.models.forward import forward_hidden

    layout = join_fake_world()
    rollouts = [
        Rollout(i, 0, tuple(range(2, 18)), tuple(range(2, 34 + i)), stopped=False) for i in range(4)
    ]
    with fake_cuda({"_loss_hidden": 1.0}) as mode:  # a loss at each position
        teacher = build_model(
            read_hf_config(folder), layout, vocab_size=151_936, dtype=torch.bfloat16
        ).eval()
        microbatches = build_microbatches(rollouts, 128, layout.device)
        hidden = forward_hidden(teacher, microbatches)
    return [tuple(h.shape) for h in hidden], [read.reader for read in mode.reads]


def test_teacher_passes_read_the_loss_positions_alone(tmp_path: Path) -> None:
    shapes, readers = run_alone(pass_of_the_teacher, write_model(tmp_path / "t", QWEN3_8B))
    assert shapes == [(97, 4096)] * 2
    assert readers == ["_loss_hidden"] * 2


def load(folder: Path) -> set[tuple[str, torch.dtype]]:
    """Where the parameters of a model are after its weights were read, and of which types."""
    from trb_megatron.huggingface.config import read_hf_config
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    layout = join_fake_world()
    config = read_hf_config(folder)
    with fake_cuda({"fill_model": 1.0}):
        model = build_model(config, layout, vocab_size=128, dtype=torch.bfloat16)
        load_hf_weights(model, config, layout)
        return {(param.device.type, param.dtype) for param in model.parameters()}


def test_weights_are_read_onto_the_gpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    assert run_alone(load, tmp_path / "m") == {("cuda", torch.bfloat16)}
