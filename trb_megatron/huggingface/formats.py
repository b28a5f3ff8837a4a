"""Weights in other formats than safetensors, told by file names, and how to convert them.

Of a file of weights nothing but its first bytes is read.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from trb_megatron.huggingface.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    refuse_lfs_pointer,
)

# transformers refuses to save a model that it has loaded from a GGUF file; a fresh one takes its
# values.
_FROM_GGUF = (
    "import sys; from transformers import AutoConfig as C, AutoModelForCausalLM as M, AutoTokenizer"
    " as T; s, f, o = sys.argv[1:]; load = lambda K: K.from_pretrained(s, gguf_file=f); m = "
    "M.from_config(load(C)); m.load_state_dict(load(M).state_dict()); m.save_pretrained(o); "
    "load(T).save_pretrained(o)"
)
_FROM_PICKLES = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "s, o = sys.argv[1:]; [K.from_pretrained(s).save_pretrained(o) for K in (M, T)]"
)
_FROM_ADAPTER = (
    "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import "
    "AutoTokenizer as T; s, o = sys.argv[1:]; m = M.from_pretrained(s); {tokenizer}; "
    "T.from_pretrained(t).save_pretrained(o); m.merge_and_unload().save_pretrained(o)"
)
# transformers loads both unless the adapter is looked for where it is not.
_FROM_MODEL_AND_ADAPTER = (
    "import sys; from peft import PeftModel as P; from transformers import AutoModelForCausalLM as "
    "M, AutoTokenizer as T; s, o = sys.argv[1:]; m = M.from_pretrained(s, adapter_kwargs="
    "{'subfolder': 'none'}); P.from_pretrained(m, s).merge_and_unload().save_pretrained(o); "
    "T.from_pretrained(s).save_pretrained(o)"
)
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_ORIGINAL = "take the model's Hugging Face version, which has safetensors"
_OLD = (
    "if there is none, write it with transformers 4, in an environment of its own: "
    "AutoModelForCausalLM.from_pretrained(..., {option}=True).save_pretrained(...)"
)
# What the files are, and what to do; the first pattern that fits counts.
_OTHERS = (
    ("consolidated*.pth", "in Meta's own format", _ORIGINAL),
    ("consolidated*.safetensors", "in Mistral's own format", _ORIGINAL),
    (
        "*.safetensors",
        f"without their index: neither {SINGLE_FILE} nor {INDEX_FILE} is here",
        "download the missing file, or the folder once more",
    ),
    ("*.h5", "TensorFlow's", f"{_ORIGINAL}; {_OLD.format(option='from_tf')}"),
    ("*.msgpack", "Flax's", f"{_ORIGINAL}; {_OLD.format(option='from_flax')}"),
    ("*.npz", "NumPy arrays, as of MLX or JAX", _ORIGINAL),
    ("*.onnx", "an exported graph, which cannot be trained", _ORIGINAL),
    *(
        (
            pattern,
            "pickles of some training, which could run code and are never loaded",
            "write them by save_pretrained() of transformers, in the program that made them",
        )
        for pattern in ("*.bin", "*.pth", "*.pt", "*.ckpt")
    ),
)

# What is read of a folder besides weights: configurations, tokenizers and chat templates.
_SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def refuse_other_formats(path: Path) -> None:
    """Refuse what is no folder or empty, weights but no safetensors, adapters, Git LFS pointers.

    A folder without any weights passes: its configuration and tokenizer can be read.

    Raises:
        CheckpointError: says what `path` is and, where one helps, the command that makes a folder
            that can be used.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(_gguf_message(path))
        raise CheckpointError(f"{path}: a file; name the model's folder, such as {path.parent}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model folder")
    weights = SINGLE_FILE if (path / SINGLE_FILE).is_file() else "model*.safetensors"
    for pattern in (weights, *_SIDE_FILES):
        for file in sorted(path.glob(pattern)):
            refuse_lfs_pointer(file)
    files = [file for file in path.iterdir() if file.is_file()]
    adapter = sorted(f.name for f in files if any(f.match(pattern) for pattern in _ADAPTER))
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        if adapter:
            raise CheckpointError(_both_message(path, adapter))
        return
    if not any(path.iterdir()):
        raise CheckpointError(
            f"{path}: empty; a model folder has config.json, {SINGLE_FILE} and a tokenizer"
        )
    if ggufs := [file for file in files if file.suffix == ".gguf"]:
        raise CheckpointError(_gguf_message(max(ggufs, key=lambda file: file.stat().st_size)))
    if adapter:
        raise CheckpointError(_adapter_message(path, adapter[0]))
    if pickles := sorted(file.name for file in files if file.match("pytorch_model*.bin")):
        raise CheckpointError(
            f"{path}: the weights are pickles ({pickles[0]}), which could run code and are never "
            "loaded. Where you trust them, make a folder of safetensors:\n"
            + _command(_FROM_PICKLES, path, _beside(path))
        )
    for pattern, what, advice in _OTHERS:
        if found := sorted(file.name for file in files if file.match(pattern)):
            raise CheckpointError(
                f"{path}: the weights ({found[0]}) are {what}; only safetensors can be read: "
                f"{advice}"
            )


def _gguf_message(file: Path) -> str:
    return (
        f"{file}: the weights are GGUF; only a folder of safetensors can be read. The model's own "
        "folder is best, for GGUF weights are mostly rounded, and transformers may guess at the "
        "tokenizer. If you have none, make one (pip install gguf accelerate):\n"
        + _command(_FROM_GGUF, file.parent, file.name, _beside(file.with_suffix("")))
    )


def _both_message(path: Path, adapter: list[str]) -> str:
    return (
        f"{path}: an adapter ({', '.join(adapter)}) lies beside a whole model, and transformers "
        "with peft would load both. Move these files elsewhere if you mean the model without it, "
        "or merge both (pip install peft):\n"
        + _command(_FROM_MODEL_AND_ADAPTER, path, _beside(path, "merged"))
    )


def _adapter_message(path: Path, file: str) -> str:
    own = (path / "tokenizer_config.json").is_file()
    tokenizer = "t = s" if own else "t = m.peft_config['default'].base_model_name_or_path"
    return (
        f"{path}: an adapter ({file}) is no whole model. Merge it into its base model "
        "(pip install peft):\n"
        + _command(_FROM_ADAPTER.format(tokenizer=tokenizer), path, _beside(path))
    )


def _beside(path: Path, ending: str = "safetensors") -> Path:
    """A folder for the result, next to its source."""
    return path.with_name(f"{path.name}-{ending}")


def _command(code: str, *arguments: object) -> str:
    """A command of one line for a shell; the code holds nothing that double quotes give meaning."""
    return f'    python -c "{code}" ' + " ".join(shlex.quote(str(a)) for a in arguments)
