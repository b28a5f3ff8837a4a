"""The prompt of a row: text, or the messages of a conversation that the model is to answer."""

import re
from typing import Any

from trb_megatron.escapes import find_control
from trb_megatron.prompts.readers import parse_json

ROLES = ("system", "developer", "user", "assistant")
"""Roles that a message may have. A template decides what it makes of them."""

# Text that begins with a message, whole or cut off; or is one JSON value with messages' keys in it.
_BEGINS_WITH_MESSAGE = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_HOLDS_OBJECTS = re.compile(r"""\s*(\[\s*\{\s*['"].*\}\s*\]|\{\s*['"].*\})\s*""", re.DOTALL)
_MESSAGE_KEY = re.compile(r"""[{,]\s*['"](role|content|from|value)['"]\s*:""")


def parse_prompt(value: Any, location: str) -> str | list[dict[str, Any]]:
    """Check a prompt; messages may be spelled in JSON, as a column of text must hold them.

    A message comes back with `role`, `content` as text, and what else it has that is not null.

    Raises:
        ValueError: with the location: no text and no conversation that a user's message ends.
    """
    if isinstance(value, str) and _spells_messages(value):
        value = parse_json(value, f"{location} looks like chat messages, but is")
    if isinstance(value, dict):
        raise ValueError(
            f"{location} holds one object with the keys {', '.join(map(repr, value))}, not text or "
            "a list of messages; name the column inside it, such as 'prompt.text', or put the "
            "message into a list"
        )
    if not isinstance(value, list):
        return parse_text(value, location)
    if not value:
        raise ValueError(f"{location} is an empty list of messages")
    messages = [_parse_message(m, f"{location}: message {n}") for n, m in enumerate(value, start=1)]
    if (last := messages[-1]["role"]) != "user":
        what = ", perhaps the solution" if last == "assistant" else ""
        raise ValueError(
            f"{location} ends with a message of the {last}{what}; the model answers a user: leave "
            "out what comes behind the user's last message"
        )
    return messages


def _spells_messages(text: str) -> bool:
    if _BEGINS_WITH_MESSAGE.match(text):
        return True
    keys = set(_MESSAGE_KEY.findall(text)) if _HOLDS_OBJECTS.fullmatch(text) else set()
    return keys >= {"role", "content"} or keys >= {"from", "value"}


def parse_text(value: Any, location: str) -> str:
    """Check that a value is text with something in it. Raises ValueError with the location."""
    if not isinstance(value, str):
        raise ValueError(f"{location} holds {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{location} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{location} is not valid Unicode text") from None
    if found := find_control(value):
        raise ValueError(f"{location} holds {found}")
    return value


def _parse_message(message: Any, location: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{location} is no object with role and content")
    # A table of messages gives each of them every key that one of them has.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and {"from", "value"} <= message.keys():
        raise ValueError(
            f"{location} has 'from' and 'value' (ShareGPT's form); rename them to 'role' and "
            "'content', and human to user, gpt to assistant"
        )
    if message.get("role") not in ROLES:
        raise ValueError(
            f"{location} has the role {message.get('role')!r}; a message needs a role and content, "
            f"with one of the roles {', '.join(ROLES)}"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise ValueError(f"{location} has {key}: tools are not supported; leave the row out")
    content = _text_of_parts(message.get("content"), f"{location}: its content")
    return {**message, "content": parse_text(content, f"{location}: its content")}


def _text_of_parts(content: Any, location: str) -> Any:
    """The text of a content that is a list of one part, as models that see images have it."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if kinds != ["text"]:
        raise ValueError(
            f"{location} is a list of parts of the types {', '.join(map(str, kinds)) or 'none'}; "
            "one part of the type text can be read"
        )
    return content[0].get("text")
