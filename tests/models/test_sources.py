"""The text of responses, as it is graded and written to files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_checkpoint
from trb_megatron.config.reading import load_job_config
from trb_megatron.evaluation.comparison import grade
from trb_megatron.models.sources import ModelSources

TAGS = (
    *("<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>"),
    *("[THINK]", "[/THINK]", "<s>"),
)
FIRST_TAG, STOP_ID, SIZE = 289, 288, 320  # behind <|endoftext|>, <|im_start|>, <|im_end|>
PROMPT = "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=["no", "ordinary", "special"])
def sources(
    request: Any, tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., Path]
) -> ModelSources:
    """A student whose tokenizer has no tags, tags as ordinary tokens, or as special ones."""

    def add_tags(tokenizer: dict[str, Any]) -> None:
        for number, tag in enumerate(TAGS if request.param != "no" else ()):
            token = {**tokenizer["added_tokens"][-1], "id": FIRST_TAG + number, "content": tag}
            is_special = request.param == "special" or tag == "<s>"
            tokenizer["added_tokens"].append({**token, "special": is_special})

    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, vocab_size=SIZE, eos_token_id=STOP_ID)
    (folder / "chat_template.jinja").unlink()
    bos = {} if request.param == "no" else {"bos_token": "<s>"}
    write_tokenizer(folder, add_tags, **bos)
    read = ModelSources.read(load_job_config(None, [f"student.path={folder}"]), with_teacher=False)
    names = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert any(token["content"] == "<think>" for token in names) == (request.param != "no")
    return read


def encode(sources: ModelSources, text: str) -> list[int]:
    return list(sources.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "response", "reads"),
    [
        ("", "the \\boxed{5}", "5"),
        ("", "<think> so \\boxed{5} but", None),
        ("", "<think> so \\boxed{5} </think> So the answer is 6.", "6"),
        ("", "<think>\\boxed{5}</think>\\boxed{6}", "6"),
        ("", "<answer>6</answer> or \\boxed{5}", "6"),
        ("", "<answer>6", None),
        ("", "<reasoning>\\boxed{5}", None),
        ("", "[THINK]\\boxed{5}", None),
        ("", "[THINK]\\boxed{5}[/THINK]So it is 6.", "6"),
        ("[THINK]", "so \\boxed{5} but", None),
        ("<think>\n", "so \\boxed{5} but", None),
        ("<think>\n", "so \\boxed{5} </think> 6", "6"),
        ("<think>", "so \\boxed{5}", None),
        ("<reasoning>\n\n", "so \\boxed{5}", None),
        ("<think>\n\n</think>\n\n", "\\boxed{5}", "5"),
    ],
)
def test_tags_count_however_the_tokenizer_has_them(
    sources: ModelSources, prompt: str, response: str, reads: str | None
) -> None:
    """As text of several tokens, as ordinary tokens or as special ones."""
    prompt_ids = encode(sources, PROMPT + prompt)
    response_ids = [*encode(sources, response), STOP_ID]
    text = sources.decode_to_grade(prompt_ids, response_ids)
    assert text.endswith(response)
    rewards = {answer: grade(text, [answer])[0] for answer in ("5", "6")}
    assert rewards == {answer: float(answer == reads) for answer in ("5", "6")}


def test_other_special_tokens_are_no_text(sources: ModelSources) -> None:
    assert sources.decode([*encode(sources, "a <|im_start|>b<|endoftext|>"), STOP_ID]) == "a b"
    if sources.tokenizer.bos_token == "<s>":
        assert sources.decode(encode(sources, "<s>a")) == "a"
