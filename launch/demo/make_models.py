"""Make the demo's teacher and student: tiny Qwen3 checkpoints that have learned to add.

    python launch/demo/make_models.py

writes launch/demo/teacher and launch/demo/student (both are in the repository already). Each starts
from random weights and imitates worked examples in this project's own supervised mode. One in four
steps in the student's examples is off by one, and so are its own: it has the method, but not the
care. As with a chat teacher and a base student, their files differ in weight type, rows of the
embedding, tied embeddings and stop token; the tokenizer is the same.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from problems import write_examples
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

DEMO = Path(__file__).parent
WORK = Path("runs/demo_models")  # as in the supervised_*.yaml files

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    write_examples(WORK / "teacher.jsonl", "teacher", 25_600)
    write_examples(WORK / "student.jsonl", "student", 25_600, slip_rate=0.25)
    make_teacher()
    make_student()


def make_teacher() -> None:
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    save_random_model(WORK / "teacher_init", config, eos_token="<|im_end|>", seed=1)
    train("supervised_teacher.yaml")
    train(
        "supervised_teacher.yaml",
        f"run.dir={WORK}/teacher_fine",
        f"student.path={WORK}/teacher/hf",
        "training.steps=200",
        "optimizer.lr=2e-4",
    )
    replace_folder(DEMO / "teacher", WORK / "teacher_fine/hf")


def make_student() -> None:
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype="float32",
    )
    save_random_model(WORK / "student_init", config, eos_token="<|endoftext|>", seed=2)
    train("supervised_student.yaml")
    replace_folder(DEMO / "student", WORK / "student/hf")


def save_random_model(folder: Path, config: Qwen3Config, eos_token: str, seed: int) -> None:
    """Save a checkpoint with random weights, its tokenizer and its stop id."""
    tokenizer = build_tokenizer()
    config.eos_token_id = tokenizer.token_to_id(eos_token)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).to(config.dtype)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_tokenizer() -> Tokenizer:
    """Build a tokenizer of single bytes, with tokens for the chat template and the answer's box."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    words = ["user", "assistant", "system", "\\boxed{"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def train(config: str, *overrides: str) -> None:
    """Run the project's training on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*launcher, "-m", "trb_megatron.train", str(DEMO / config), *overrides]
    subprocess.run(command, check=True)


def replace_folder(target: Path, source: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


if __name__ == "__main__":
    main()
