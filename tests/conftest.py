"""Fixtures that several test files share, and the skipping of tests without their devices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.layouts import LAYOUTS, Layout, ProbeResult, probe, write_inputs

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
        if item.get_closest_marker(marker) and torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device(s), found {torch.cuda.device_count()}")


# Files that look at the probe run, then those that take longest: each group begins in this order.
PROBE_FILES = (
    "behavior/test_policies.py",
    "models/test_hf_weights.py",
    "models/test_models.py",
    "plan/test_plan.py",
    "rollout/test_rollout.py",
    "test_trainer.py",
)
LONG_FILES = ("rollout/test_speculative_law.py", "job/test_supervision.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [*PROBE_FILES, *LONG_FILES]
    items.sort(key=lambda item: _place(item.nodeid, order))


def _place(nodeid: str, order: list[str]) -> int:
    file = nodeid.split("::")[0].removeprefix("tests/")
    return order.index(file) if file in order else len(order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist, keep a file on one worker, and all files of the probe run on another."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0].removeprefix("tests/")
            return "probe" if file in PROBE_FILES else file

    return ByFile(config, log)


def train_bpe() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["what is the sum of these numbers", "the answer is in the box"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[..., Path]:
    """Return a function that writes a tokenizer's files into a folder.

    `edit` changes the parsed tokenizer.json before it is written; other keywords go into
    tokenizer_config.json.
    """
    trained = json.loads(train_bpe().to_str())

    def write(
        folder: Path, edit: Callable[[dict[str, Any]], None] | None = None, **settings: Any
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = json.loads(json.dumps(trained))
        if edit is not None:
            edit(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            **settings,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real evaluation sets beside the repository; skips where it is not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real evaluation sets are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def probe_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of the probe run; its checkpoints and prompts lie beside it."""
    return write_inputs(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="session")
def probe_results(probe_config: Path) -> dict[Layout, ProbeResult]:
    """The probe run at every layout; spawned once for all test modules."""
    return {layout: probe(probe_config, layout) for layout in LAYOUTS}
