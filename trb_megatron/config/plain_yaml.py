r"""The plain part of YAML that configurations are written in: read strictly, written back equal.

Words have the types of YAML 1.2: a date, `12:30`, `1_000` and `yes` are text, `010` is ten and
`1e-5` is a number. Keys are text, and none comes twice in a mapping. Tags such as `!!python/name`
are refused, all of them, and so is nesting without end. Text in double quotes, where `"\\b"` is a
backspace, holds no control characters that LaTeX with single backslashes becomes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from trb_megatron.escapes import find_control

_MAX_LEVELS = 16

# An integer too long for 64 bits is read as a float, which no count accepts.
_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?0*[0-9]{1,19}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_RESOLVERS = {
    None: [
        (f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"))
        for name, pattern in _WORDS.items()
    ]
}


class BrokenYAML(ValueError):
    """Text that is not plain YAML; the message starts with the line, counted from 1."""


def parse_yaml(text: str) -> Any:
    """Read one document. Raises BrokenYAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise BrokenYAML(f"{line}: broken YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise BrokenYAML(f"{line}: broken YAML: {error.reason}") from None


def parse_value(text: str) -> Any:
    """Read a value outside a file, as `parse_yaml` does, where nothing of its text may be lost.

    Raises BrokenYAML, also for what means something in a file alone: a comment, an anchor, the mark
    of a document, and a line break, of which YAML makes a blank.
    """
    value = parse_yaml(text)
    if (lost := _find_lost(text)) is not None:
        position, problem = lost
        line = text[:position].count("\n") + 1
        raise BrokenYAML(f"{line}: {problem}")
    return value


_LOST_TOKENS = {
    yaml.AnchorToken: "an anchor",
    yaml.DirectiveToken: "a directive",
    yaml.DocumentStartToken: "the start of a document",
    yaml.DocumentEndToken: "the end of a document",
}


def _find_lost(text: str) -> tuple[int, str] | None:
    """Where a text that YAML can read has something that its value has not, and the fix."""
    end = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        start = token.start_mark.index
        is_scalar = isinstance(token, yaml.ScalarToken)
        is_block = is_scalar and token.style in ("|", ">")
        head = text[end:start] + (text[start:].partition("\n")[0] if is_block else "")
        what = "a comment" if "#" in head else _LOST_TOKENS.get(type(token))
        if what is not None:
            at = end + head.index("#") if "#" in head else start
            shown = text[at : at + 20]
            return at, (
                f"{shown!r} is {what} in YAML, and would be left out; put the value in quotes, "
                "inside those of the shell"
            )
        if is_scalar and not is_block and token.start_mark.line != token.end_mark.line:
            return start, (
                "a line break is a blank in YAML; write it as \\n in a value in double quotes"
            )
        end = max(end, token.end_mark.index)
    return None


def dump_yaml(values: dict[str, Any]) -> str:
    """Write plain values, in their order, so that `parse_yaml` reads them back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS
    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ComposerError(None, None, f"the tag {tag} is not supported", event.start_mark)
        if self._level == _MAX_LEVELS:
            raise ComposerError(
                None, None, f"nested deeper than {_MAX_LEVELS} levels", event.start_mark
            )
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key in mapping:
                problem = f"the key {key!r} is given twice"
                raise ConstructorError(None, None, problem, key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if found := find_control(text):
            problem = f"the text holds {found}, or put the text in single quotes"
            raise ConstructorError(None, None, problem, node.start_mark)
        return text

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
