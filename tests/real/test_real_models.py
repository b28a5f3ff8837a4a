"""A real model: its tokenizer, its logits at every layout, its conversion in both directions."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints_tools import hf_to_megatron, megatron_to_hf
from tests.ranks import run_distributed
from tests.real.conftest import load_reference
from tests.runs import run_module
from trb_megatron.huggingface.config import padded_vocab_size, read_hf_config
from trb_megatron.huggingface.tokenizer import load_tokenizer, stop_ids

pytestmark = pytest.mark.real

LAYOUTS = [(1, 1), (3, 1), (1, 2)]  # 9 heads in 3 query groups: TP 3 divides them, TP 2 doesn't
LIMIT = 5e-4  # on a logit of up to 30 in fp32; 1.3e-4 was measured


def test_tokenizer_is_the_one_that_the_model_learned(laptop_model: Path) -> None:
    tokenizer = load_tokenizer(laptop_model / "teacher")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert stop_ids(laptop_model / "teacher") == (2,)
    for text in ("Hello  world\n\n  12 345\t½ é 你好 🙂 it's I'LL", " a", "a ", "3,141.50 €"):
        ids = tokenizer.encode(text)
        assert ids[0] != tokenizer.bos_token_id and tokenizer.decode(ids) == text
    # The blank lines of a list are one token, as the model writes them.
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a\n\n12.")] == [
        *("a", "\n\n", "1", "2", ".")
    ]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(chat).count(1) == 3


def test_teacher_greets(laptop_model: Path) -> None:
    """Weights that were read wrongly would say anything else."""
    tokenizer = load_tokenizer(laptop_model / "teacher")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reference = load_reference(laptop_model / "teacher")
    out = reference.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]).startswith("Hello!")


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def converted(
    request: pytest.FixtureRequest, laptop_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, int]:
    """The student as a Megatron checkpoint, and the layout that it was written for."""
    tp, pp = request.param
    target = tmp_path_factory.mktemp("converted") / "megatron"
    layout = ["--tensor-parallel", str(tp), "--pipeline-parallel", str(pp)]
    hf_to_megatron.main([str(laptop_model / "student"), str(target), *layout])
    return target, tp, pp


def test_round_trip_is_exact(
    laptop_model: Path, converted: tuple[Path, int, int], tmp_path: Path
) -> None:
    megatron_to_hf.main([str(converted[0]), str(tmp_path / "hf")])
    files = (laptop_model / "student" / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    with safe_open(files[0], framework="pt") as ours, safe_open(files[1], framework="pt") as back:
        assert set(ours.keys()) == set(back.keys())
        for name in ours.keys():
            tensor = ours.get_tensor(name)
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, back.get_tensor(name)), name


def _logits(
    source: Path, checkpoint: Path, tp: int, pp: int, texts: list[list[int]]
) -> list[torch.Tensor | None]:
    """Megatron's logits of the converted student on the last stage."""
    from checkpoints_tools.verify_conversion import forward_logits
    from trb_megatron.checkpoint.megatron_tensors import open_megatron_checkpoint
    from trb_megatron.config.options import ParallelConfig
    from trb_megatron.distributed.layout import initialize
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import fill_model

    layout = initialize(
        ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    )
    config = read_hf_config(source)
    vocab_size = padded_vocab_size([config.vocab_size], tp)
    model = build_model(config, layout, vocab_size=vocab_size, dtype=torch.float32).eval()
    fill_model(model, config, layout, open_megatron_checkpoint(checkpoint)[0])
    return [forward_logits(model, tokens, layout) for tokens in texts]


def test_logits_equal_transformers(
    laptop_model: Path, converted: tuple[Path, int, int], texts: list[list[int]]
) -> None:
    checkpoint, tp, pp = converted
    student = laptop_model / "student"
    ours = run_distributed(_logits, tp * pp, student, checkpoint, tp, pp, texts)[-1]
    reference = load_reference(student)
    for tokens, logits_TV in zip(texts, ours, strict=True):
        with torch.no_grad():
            expected_TV = reference(torch.tensor([tokens])).logits[0]
        difference_TV = (logits_TV[:, : expected_TV.shape[1]] - expected_TV).abs()
        assert difference_TV.max() < LIMIT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verification_holds(laptop_model: Path, tmp_path: Path, precision: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\n12 + 30 = \n")
    options = ["--precision", precision, "--prompts", str(prompts), "--new-tokens", "6"]
    done = run_module(
        "checkpoints_tools.verify_conversion", str(laptop_model / "teacher"), *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nholds " in done.stdout
