"""The text of a prompt: inside a chat template, or as it is."""

from transformers import PreTrainedTokenizerFast

from trb_megatron.prompts.records import Record


def render_chat(
    record: Record, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> str:
    """The prompt inside the tokenizer's chat template, up to the opening of the answer.

    The system prompt comes first, unless the messages bring their own. Raises ValueError, with the
    row, for a template that fails.
    """
    messages = record.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything, about roles in particular
        raise ValueError(f"{record.location}: the chat template fails: {error}") from error
    assert isinstance(text, str)
    return text


def plain_text(record: Record) -> str:
    """The prompt as it is. Raises ValueError, with the row, for chat messages."""
    if not isinstance(record.prompt, str):
        raise ValueError(
            f"{record.location}: chat messages need a chat template; set apply_chat_template=true"
        )
    return record.prompt
