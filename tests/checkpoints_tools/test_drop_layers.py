"""drop_layers writes the model that transformers would have with those layers taken out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_tools import drop_layers
from tests.families import FAMILIES, make_family_checkpoint

NUM_LAYERS = 5


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def side_files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder besides weights and config.json."""
    others = (f for f in folder.iterdir() if "safetensors" not in f.name)
    return {file.name: file.read_bytes() for file in others if file.name != "config.json"}


def take_out(model: torch.nn.Module, dropped: set[int]) -> torch.nn.Module:
    """Remove layers of transformers' model by hand."""
    layers = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number  # where its keys lie in the cache
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_model_without_the_layers(
    tmp_path: Path, family: str, tied: bool
) -> None:
    source = make_family_checkpoint(
        tmp_path / "hf",
        family,
        tied=tied,
        num_hidden_layers=NUM_LAYERS,
        dtype=torch.bfloat16,
        max_shard_size="20KB",
    )
    target = tmp_path / "fewer"
    options = ["--drop", "0,2-3", "--max-shard-size", "0.03MB"]
    drop_layers.main([str(source), str(target), *options])
    expected = take_out(load(source), {0, 2, 3})
    found = load(target)
    assert found.config.num_hidden_layers == 2
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert side_files(target) == side_files(source) and "tokenizer.json" in side_files(target)


def test_configuration_changes_in_what_counts_layers(tmp_path: Path) -> None:
    """Three stop ids are no list of three layers."""
    source = make_family_checkpoint(tmp_path / "hf", "qwen3", eos_token_id=[0, 1, 2])
    config = json.loads((source / "config.json").read_text())
    types = ["full_attention", "sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": types}
    (source / "config.json").write_text(json.dumps({**config, **window}))
    drop_layers.main([str(source), str(tmp_path / "fewer"), "--drop", "0"])
    fewer = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert fewer == {**config, **window, "num_hidden_layers": 2, "layer_types": types[1:]}
    assert load(tmp_path / "fewer").config.layer_types == types[1:]


def test_tensors_of_no_known_kind_go_with_their_layer(tmp_path: Path) -> None:
    """Old checkpoints hold what transformers computes today, in each layer and beside them."""
    source = make_family_checkpoint(tmp_path / "hf", "llama")
    extra = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((3,), float(i))
        for i in range(3)
    }
    tensors = {**read_tensors(source), **extra, "score.weight": torch.ones(2)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    drop_layers.main([str(source), str(tmp_path / "fewer"), "--layers", "2"])
    found = read_tensors(tmp_path / "fewer")
    assert [found[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"][0].item() for i in (0, 1)] == [
        0.0,
        2.0,
    ]
    assert torch.equal(found["score.weight"], torch.ones(2))
    assert not [name for name in found if name.startswith("model.layers.2.")]


@pytest.mark.parametrize(
    ("num_kept", "num_layers", "kept"),
    [
        (1, 3, [0]),
        (2, 3, [0, 2]),
        (4, 5, [0, 1, 2, 4]),
        (3, 9, [0, 4, 8]),
        (20, 30, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27, 29]),
    ],
)
def test_layers_are_spread_evenly(num_kept: int, num_layers: int, kept: list[int]) -> None:
    assert drop_layers.spread_evenly(num_kept, num_layers) == kept


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_checkpoint(tmp_path_factory.mktemp("drop") / "hf", "qwen2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "--layers 0: the model has 3 layers; keep 1 to 2"),
        (["--layers", "3"], "--layers 3: the model has 3 layers; keep 1 to 2"),
        (["--drop", "1,3"], "--drop 3: the model has 3 layers, 0 to 2"),
        (["--drop", "0-2"], "--drop names all 3 layers; at least one has to stay"),
        (["--drop", "1,0-1"], "1,0-1 names layer 1 twice"),
        (["--drop", "2-1"], "'2-1' is no layer; write numbers and ranges, such as 2,5,10-14"),
        (["--drop", "1,"], "'' is no layer"),
        ([], "one of the arguments --layers --drop is required"),
        (["--drop", "1", "--layers", "2"], "not allowed with argument"),
    ],
)
def test_wrong_layers_are_refused_by_name(
    source: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = source.parent / "fewer"
    with pytest.raises(SystemExit) as stop:
        drop_layers.main([str(source), str(target), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_dry_run_says_what_stays_and_writes_nothing(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop_layers.main([str(source), str(source.parent / "dry"), "--layers", "2", "--dry-run"])
    said = capsys.readouterr().out
    assert said.startswith("keeps layers 0, 2 of 3: ") and "parameters" in said
    assert not (source.parent / "dry").exists()


def test_target_that_exists_is_kept_without_overwrite(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        drop_layers.main([str(source), str(tmp_path), "--layers", "2"])
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
    drop_layers.main([str(source), str(tmp_path), "--layers", "2", "--overwrite"])
    assert not (tmp_path / "mine").exists()
