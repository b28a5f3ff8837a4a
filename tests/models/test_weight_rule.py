"""What a folder's weights mean is what transformers reads, or they are refused by name."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tests.changed_weights import (
    CHANGES,
    NOT_FINITE,
    NUM_LAYERS,
    ONLY_IN,
    ONLY_TIED,
    ONLY_UNTIED,
    Changes,
    Folder,
)
from tests.families import SIZES, make_family_checkpoint
from tests.ranks import run_distributed
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed.layout import ParallelLayout, initialize
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.tensors import SINGLE_FILE, CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
TOKENS = torch.arange(24)[None] * 7 % SIZES["vocab_size"]


class Outcome(NamedTuple):
    """What became of a folder: in transformers, and in ours."""

    family: str
    change: str
    says: str | None
    theirs: Tensor | None
    is_quiet: bool
    ours: Tensor | None
    message: str

    @property
    def agrees(self) -> bool:
        assert self.ours is not None
        return self.theirs is not None and bool((self.ours - self.theirs).abs().max() < 1e-3)


class _Warnings(logging.Handler):
    """Whether transformers warned."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.number = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.number += 1


@torch.no_grad()
def transformers_logits(path: Path) -> tuple[Tensor | None, bool]:
    """transformers' logits, and whether it had nothing to warn of; None where it fails.

    Logits that are not finite count as a warning.
    """
    heard, logger = _Warnings(), logging.getLogger("transformers")
    logger.addHandler(heard)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(path, dtype=torch.float32, output_loading_info=True)
    except Exception:
        return None, False
    finally:
        logger.removeHandler(heard)
    is_quiet = heard.number == 0 and not found["missing_keys"] and not found["unexpected_keys"]
    logits_TV = model.eval()(TOKENS).logits[0]
    return logits_TV, is_quiet and bool(logits_TV.isfinite().all())


def our_logits(path: Path, layout: ParallelLayout) -> tuple[Tensor | None, str]:
    """Megatron's logits and the warnings; or None and why the folder is refused."""
    from checkpoints_tools.verify_conversion import forward_logits
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    try:
        config = read_hf_config(path)
        model = build_model(config, layout, vocab_size=64, dtype=torch.float32).eval()
        warnings = load_hf_weights(model, config, layout)
    except CheckpointError as error:
        return None, str(error)
    logits_TV = forward_logits(model, TOKENS[0].tolist(), layout)
    assert logits_TV is not None
    return logits_TV[:, : config.vocab_size].detach(), "\n".join(warnings)


def _try(
    changes: Changes,
    source: Path,
    layout: ParallelLayout,
) -> list[Outcome]:
    tensors, config = (
        load_file(source / SINGLE_FILE),
        json.loads((source / "config.json").read_text()),
    )
    config.pop("layer_types", None)  # as in published models
    outcomes = []
    for name, (change, says) in changes.items():
        folder = Folder(dict(tensors), dict(config))
        change(folder)
        path = folder.write(source.parent / "changed")
        theirs, is_quiet = transformers_logits(path)
        ours, message = our_logits(path, layout)
        outcomes.append(Outcome(source.name, name, says, theirs, is_quiet, ours, message))
        shutil.rmtree(path)
    return outcomes


SECOND = (
    *("several files", "an index beside a single file", "an index with a wrong file"),
    *("one tensor in two files", "frequencies", "no prefix", "a prefix twice", "bf16"),
)


def _pairs(changes: dict[str, Any], seed: int, count: int) -> dict[str, Any]:
    """Two changes at a time, drawn at random."""
    rng = random.Random(seed)
    pairs = {}
    for _ in range(count):
        one, other = rng.choice(sorted(changes)), rng.choice(SECOND)

        def change(folder: Folder, one: str = one, other: str = other) -> None:
            changes[one][0](folder)
            changes[other][0](folder)

        pairs[f"{one}, {other}"] = (change, None)
    return pairs


def _try_all(folder: Path, singly: bool) -> list[Outcome]:
    layout = initialize(ParallelConfig())
    logging.getLogger("transformers").handlers.clear()  # hundreds of tables on a terminal
    transformers_logging.disable_progress_bar()
    outcomes = []
    for number, family in enumerate(FAMILIES):
        for tied in (True, False):
            source = make_family_checkpoint(
                folder / f"{family}-{tied}", family, tied=tied, num_hidden_layers=NUM_LAYERS
            )
            of_output = ONLY_TIED if tied else ONLY_UNTIED
            changes = {**CHANGES, **NOT_FINITE, **of_output, **ONLY_IN[family]}
            if not singly:
                changes = _pairs(changes, 2 * number + tied, 25)
            outcomes += _try(changes, source, layout)
    return outcomes


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Each change, in each family, tied or not."""
    return run_distributed(_try_all, 1, tmp_path_factory.mktemp("rule"), True, timeout_s=400)[0]


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Changes in pairs."""
    return run_distributed(_try_all, 1, tmp_path_factory.mktemp("pairs"), False, timeout_s=400)[0]


def test_logits_are_those_of_transformers_or_the_folder_is_refused(
    single: list[Outcome], double: list[Outcome]
) -> None:
    outcomes = single + double
    wrong = [o[:3] for o in outcomes if o.ours is not None and not o.agrees]
    assert not wrong
    quiet = [o for o in outcomes if o.is_quiet]
    refused = [o for o in quiet if o.ours is None]
    print(
        f"{len(outcomes)} folders; of {len(quiet)} that transformers loads in silence, "
        f"{1 - len(refused) / len(quiet):.1%} are accepted"
    )
    assert len(quiet) >= 150
    assert len(refused) <= 0.1 * len(quiet), [o[:3] for o in refused]


def test_what_transformers_warns_of_is_named(single: list[Outcome]) -> None:
    for outcome in single:
        where = (outcome.family, outcome.change, outcome.message)
        if outcome.says is None:
            assert outcome.ours is not None and outcome.message == "", where
        else:
            assert outcome.says in outcome.message, where
            assert (
                "classifier" in outcome.change or "head" in outcome.change or (outcome.ours is None)
            ), where
        if not outcome.is_quiet and outcome.change != "an old mask":
            assert outcome.message, where
