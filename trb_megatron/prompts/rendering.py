"""The text of a prompt: inside a chat template, or as it is."""

import inspect
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerFast

from trb_megatron.prompts.records import Record

_MORE = "and so on"  # a text that no message needs, to see whether it is rendered


def prints_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer's chat template can ask for today's date."""
    return bool(tokenizer.chat_template) and "strftime_now" in tokenizer.get_chat_template()


class ChatTemplate:
    """A tokenizer's chat template with its options.

    Args:
        section: of the configuration that names the system prompt, for errors.
        system_prompt: opens a conversation that brings no system message of its own; None: nothing.
        options: variables of the template, such as `enable_thinking`.
        today: the date that the template prints as today's; None: that of the clock.

    Raises:
        ValueError: the tokenizer has no template, or its template no such option.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        section: str,
        system_prompt: str | None,
        options: Mapping[str, Any],
        today: date | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._no_system_prompt = f"set {section}.system_prompt=null"
        self._system_prompt = system_prompt
        self._options = options
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; set "
                "apply_chat_template=false and system_prompt=null for plain text prompts"
            )
        template = tokenizer.get_chat_template()
        self._template = template if today is None else _fix_date(template, today)
        if not options:
            return
        known = _find_options(tokenizer, template)
        for name in options:
            if name not in known:
                raise ValueError(
                    f"data.chat_template_kwargs.{name}: is no option of the chat template of "
                    f"{tokenizer.name_or_path}, which has {', '.join(sorted(known)) or 'none'}; "
                    "correct its name or leave it out"
                )

    def render(self, record: Record) -> str:
        """The prompt inside the template, up to the opening of the answer.

        Raises:
            ValueError: with the row: the template fails, or leaves a message out.
        """
        messages = record.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        own = messages
        if self._system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        text, failure = self._apply(messages)
        if failure is not None:
            hint = ""
            if messages is not own and self._apply(own)[1] is None:
                hint = f"; it takes no system message: {self._no_system_prompt}"
            raise ValueError(f"{record.location}: the chat template fails: {failure}{hint}")
        if (left_out := self._find_left_out(messages, text)) is not None:
            role = messages[left_out]["role"]
            fix = "give the row another role or leave it out"
            if messages is not own and left_out == 0:
                fix = f"{self._no_system_prompt}, and write the instruction into the prompts"
            raise ValueError(
                f"{record.location}: the chat template leaves out the message of the {role} "
                f"({messages[left_out]['content'][:40]!r}); {fix}"
            )
        return text

    def _apply(self, messages: list[dict[str, Any]]) -> tuple[str, Exception | None]:
        """The rendered text, or why there is none."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._options,
            )
        except Exception as error:  # a template may raise anything, about roles in particular
            return "", error
        assert isinstance(text, str)
        return text, None

    def _find_left_out(self, messages: list[dict[str, Any]], text: str) -> int | None:
        """Which message, if any, makes no difference to the text.

        One whose content is in the text as often as in the messages does; any other is made longer
        to see. Templates cut the thinking from earlier answers, and mean it: what is behind it is
        what counts.
        """
        contents = [message["content"].strip() for message in messages]
        for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
            if text.count(content) >= sum(other.count(content) for other in contents):
                continue
            changed = [*messages]
            changed[number] = {**message, "content": f"{message['content']} {_MORE}"}
            if self._apply(changed) == (text, None):
                return number
        return None


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, in which transformers has templates mark what is to learn."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _find_options(tokenizer: PreTrainedTokenizerFast, template: str) -> set[str]:
    """Variables that a template reads, and neither sets before nor has from transformers."""
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    try:
        read = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template is broken at line {error.lineno}: {error}"
        ) from None
    given = {"messages", "strftime_now", "raise_exception", *DEFAULT_NAMESPACE}
    given |= {*inspect.signature(tokenizer.apply_chat_template).parameters}
    return read - given


def _fix_date(template: str, today: date) -> str:
    """The template with a macro in place of transformers' function that reads the clock.

    A function cannot be handed over as a variable: transformers makes text of it.
    """
    replaced = "format.replace('%%', '\\0')"
    for directive in sorted(set(re.findall(r"%[-_0^#]?[a-zA-Z]", template))):
        replaced += f".replace({directive!r}, {today.strftime(directive)!r})"
    replaced += ".replace('\\0', '%')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ {replaced} }}}}{{%- endmacro +%}}{template}"


def plain_text(record: Record) -> str:
    """The prompt as it is. Raises ValueError, with the row, for chat messages."""
    if not isinstance(record.prompt, str):
        raise ValueError(
            f"{record.location}: chat messages need a chat template; set apply_chat_template=true"
        )
    return record.prompt
