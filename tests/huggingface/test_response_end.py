"""The stop token behind the responses of supervised training."""

from typing import Any

import pytest

from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from trb_megatron.huggingface.response_end import ResponseEnd

EOS, START, END = 0, 1, 2  # <|endoftext|>, the tokenizer's eos token; <|im_start|>, <|im_end|>
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ mark }}{{ m.content }}")
BOTH = CHAT_TEMPLATE.replace("<|im_end|>", "\n<|im_end|><|endoftext|>")


def find(
    stop_ids: tuple[int, ...], template: str = CHAT_TEMPLATE, options: dict[str, Any] | None = None
) -> ResponseEnd:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ResponseEnd.find(tokenizer, stop_ids, {} if options is None else options)


@pytest.mark.parametrize(
    ("stop_ids", "template", "token_id", "reason"),
    [
        ((EOS,), CHAT_TEMPLATE, EOS, "the only stop id"),
        # As Llama 3 Instruct: the first of [128001, 128008, 128009] ends texts, not turns.
        ((EOS, START, END), CHAT_TEMPLATE, END, "which ends a turn in the chat template"),
        ((END, EOS), BOTH, END, "which ends a turn"),
        ((EOS, END), THINKING, END, "which ends a turn"),
        ((START, EOS), CHAT_TEMPLATE, EOS, "the tokenizer's eos token; no stop id ends a turn"),
        ((START, END), PLAIN, START, "the first stop id; no stop id ends a turn in the chat"),
    ],
)
def test_responses_end_as_turns_do(
    stop_ids: tuple[int, ...], template: str, token_id: int, reason: str
) -> None:
    end = find(stop_ids, template, {"mark": "<|endoftext|>"})
    assert end.token_id == token_id
    token = make_tokenizer().convert_ids_to_tokens(token_id)
    assert str(end).startswith(f"responses end with '{token}' (id {token_id}), {reason}")


def test_plain_text_ends_with_the_eos_token() -> None:
    for stop_ids, token_id in (((END, EOS), EOS), ((END, START), END)):
        assert ResponseEnd.find(make_tokenizer(), stop_ids, None).token_id == token_id


@pytest.mark.parametrize(
    ("response", "closed"),
    [
        ("12", "12<|im_end|>"),
        ("12<|im_end|>", "12<|im_end|>"),
        ("12<|endoftext|>", "12<|endoftext|>"),
        ("12<|im_end|>\n \n", "12<|im_end|>"),
        ("12<|im_start|>", "12<|im_start|><|im_end|>"),
        ("1<|im_end|>2", "1<|im_end|>2<|im_end|>"),
        ("12\n", "12\n<|im_end|>"),
        ("", "<|im_end|>"),
    ],
)
def test_a_response_has_one_stop_token_at_its_end(response: str, closed: str) -> None:
    tokenizer, end = make_tokenizer(), find((EOS, END))
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(end.close(ids)) == closed


def test_a_template_that_fails_matters_where_there_is_a_choice() -> None:
    failing = "{{ raise_exception('no answers') }}"
    assert find((EOS,), failing).token_id == EOS
    with pytest.raises(ValueError, match=r"no answers\), .* name it in rollout.stop_ids=\[ID\]"):
        find((EOS, END), failing)
