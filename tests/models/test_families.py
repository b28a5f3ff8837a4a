"""Every model family against transformers: logits at every layout, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_tools import hf_to_megatron
from tests.families import FAMILIES, ORIGINAL_CONTEXT, SIZES, make_family_checkpoint
from tests.ranks import run_distributed
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.tensors import CheckpointError

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
NUM_TOKENS = 4 * ORIGINAL_CONTEXT  # beyond the context that rope scaling starts from
IS_TIED = {"llama-linear": True, "qwen2": True, "qwen3_moe": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        source = make_family_checkpoint(folder / family, family, tied=IS_TIED.get(family, False))
        target = folder / "megatron" / family
        hf_to_megatron.main([str(source), str(target), "--tensor-parallel", "2"])
    return folder


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (1, NUM_TOKENS), generator=generator)


def _logits(folder: Path, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """Megatron's logits of every family, on the leader; nothing elsewhere."""
    from trb_megatron.config.options import ParallelConfig
    from trb_megatron.distributed.layout import initialize

    layout = initialize(
        ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    )
    from checkpoints_tools.verify_conversion import forward_logits
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    logits = {}
    for family in FAMILIES:
        config = read_hf_config(folder / family)
        model = build_model(config, layout, vocab_size=128, dtype=torch.float32).eval()
        load_hf_weights(model, config, layout)
        _check_megatron_reads_the_same(model, folder / "megatron" / family)
        logits_TV = forward_logits(model, _tokens()[0].tolist(), layout)
        if logits_TV is not None:
            logits[family] = logits_TV
    return logits


def _check_megatron_reads_the_same(model: Any, checkpoint: Path) -> None:
    """Megatron's own loader finds in a converted checkpoint what came from the HF folder."""
    from megatron.core import dist_checkpointing

    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # Transformer Engine keeps calibration in its extra state, which an HF checkpoint has none of.
    wanted = {
        name: entry
        for name, entry in model.sharded_state_dict().items()
        if not name.endswith("_extra_state")
    }
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def megatron_logits(request: pytest.FixtureRequest, folder: Path) -> dict[str, torch.Tensor]:
    tp, pp = request.param
    return run_distributed(_logits, tp * pp, folder, tp, pp)[-tp]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(
    folder: Path, megatron_logits: dict[str, torch.Tensor], family: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs_TV = model(_tokens()).logits[0]
    ours_TV = megatron_logits[family][:, : SIZES["vocab_size"]]
    torch.testing.assert_close(ours_TV, theirs_TV, rtol=0, atol=1e-4)


def test_rope_scaling_changes_the_logits(folder: Path) -> None:
    """The test above would not see a scaling that both leave out."""
    assert read_hf_config(folder / "llama").inv_freq != read_hf_config(folder / "qwen2").inv_freq


def _edited(folder: Path, target: Path, **values: object) -> Path:
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("mistral", {"sliding_window": 32}, r"sliding window \(sliding_window = 32"),
        # A key that Mistral's class doesn't have, so that transformers uses the window.
        ("mistral", {"sliding_window": 32, "use_sliding_window": False}, "sliding window"),
        ("llama", {"mlp_bias": True}, "mlp_bias is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mixture of dense and expert layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "mixture of dense and expert layers"),
        ("llama", {"hidden_size": "many"}, 'hidden_size is "many"; expected an integer'),
    ],
)
def test_features_that_are_not_built_are_refused(
    folder: Path, tmp_path: Path, family: str, values: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(_edited(folder / family, tmp_path / "edited", **values))


def test_window_as_long_as_the_context_is_no_window(folder: Path, tmp_path: Path) -> None:
    values = {"sliding_window": SIZES["max_position_embeddings"]}
    assert read_hf_config(_edited(folder / "mistral", tmp_path / "edited", **values))
