r"""LaTeX whose backslashes were read as escapes: `"\boxed"` in JSON is a backspace and `oxed`.

JSON, YAML and Python know escapes of one letter. Half of LaTeX begins with one of them.
"""

from __future__ import annotations

import re

_NAMES = {
    "\a": "a bell",
    "\b": "a backspace",
    "\t": "a tab",
    "\n": "a newline",
    "\v": "a vertical tab",
    "\f": "a form feed",
    "\r": "a carriage return",
    "\x1b": "an escape character",
}
_LETTERS = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r"}
_LETTERS["\x1b"] = "e"

# No text has the first two; the others stand before a letter only where they ate another one.
_BROKEN = re.compile(r"[\b\f]|[\a\v\x1b](?=[A-Za-z]{2})")
# What is left of a command behind its first letter, where that is no word of its own.
_LEFT_OVER = re.compile(
    r"\t(?:ext(?:bf|it|rm|sf|tt|sc|up|normal|style|color)?\s*\{|frac|heta|imes|au(?![a-z])|ilde"
    r"|riangle|herefore|binom|anh|op\{|an(?=\s*[({\\^])|o(?=\s*(?:[-+]?\d|\\)))"
    r"|\n(?:eq|eg|leq|geq|otin|abla|subseteq|cong|warrow|earrow|ot(?=\s*[\\=])"
    r"|[eu](?=\s*[-=\\({^_])|(?<=\s\n)e(?=\s\d))(?![a-z])"
    r"|\r(?:ho|ight(?:arrow|\s*[)\]}|.\\])|angle(?![a-z])|ceil|floor(?![a-z])|vert|brace|oot(?![a-z]))"
)


def find_control(text: str) -> str | None:
    r"""What a text holds that no text means to, and the fix; None: nothing.

    That is a backspace or a form feed, or a bell, vertical tab or escape character before letters.
    """
    match = _BROKEN.search(text)
    return None if match is None else _describe(text, match)


def find_left_over(text: str) -> str | None:
    r"""Where a tab, newline or carriage return and what follows look like LaTeX; None: nowhere.

    `\text{cm}`, for example, that was read as a tab and `ext{cm}`.
    """
    match = _LEFT_OVER.search(text)
    return None if match is None else _describe(text, match)


def _describe(text: str, match: re.Match[str]) -> str:
    character = match[0][0]
    rest = re.match(r"[A-Za-z]*", text[match.start() + 1 :])
    command = _LETTERS[character] + (rest[0] if rest is not None else "")
    return (
        f"{_NAMES[character]}, which is what an unescaped \\{command} becomes; write \\\\{command}"
    )
