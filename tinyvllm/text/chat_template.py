"""A model's chat template: from a list of messages to the text that the model was trained on.

The template is a Jinja program that comes with the model. It runs in Jinja's sandbox, with what such
templates expect from the reference implementation: trim_blocks and lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the tag {% generation %}, which
marks the assistant's words for training and renders as its content.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinyvllm.errors import RequestError, TokenizerError
from tinyvllm.text.messages import check_messages

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """One compiled template.

    source: the template's text; origin: the file it comes from, for messages. special_tokens: {"bos_token":
    ...}, variables that every template may use. now: the clock behind `strftime_now`.
    Raises TokenizerError if the template is not valid.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
        now: Callable[[], datetime] = datetime.now,
    ):
        self.source = source
        self.origin = origin
        self.special_tokens = dict(special_tokens or {})
        environment = _environment(now)
        try:
            syntax = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as problem:
            lines = source.splitlines()
            line = lines[problem.lineno - 1].strip() if 0 < problem.lineno <= len(lines) else ""
            raise TokenizerError(
                f"{origin}: the template has a syntax error in line {problem.lineno}: {problem.message}\n"
                f"    {line}"
            ) from None
        except RecursionError:
            raise TokenizerError(f"{origin}: the template is nested too deeply") from None
        self.variables = frozenset(node.name for node in syntax.find_all(jinja2.nodes.Name))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        date_string: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        messages: dicts with "role" and "content" (see messages.py). add_generation_prompt: end with the
        header of the assistant's turn, so that the model answers. date_string: the date that the text
        mentions, in the template's own format, for templates that know it; None leaves the template's choice,
        usually today. variables: passed to the template.

        Raises RequestError for messages that are wrong or that the template refuses, or for a variable that
        it does not use; TokenizerError if the template itself fails.
        """
        if date_string is not None:
            variables["date_string"] = date_string
        unused = sorted(set(variables) - self.variables)
        if unused:
            raise RequestError(
                f"{self.origin} does not use {', '.join(map(repr, unused))}, so it would have no effect: "
                "leave it out"
            )
        context = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(
                messages=check_messages(messages), add_generation_prompt=add_generation_prompt, **context
            )
        except _Refusal as problem:
            raise RequestError(f"{self.origin} refuses these messages: {problem}") from None
        except RequestError:
            raise
        except Exception as problem:  # whatever a template can do wrong: it is a program of somebody else's
            raise TokenizerError(
                f"{self.origin} failed{_template_line(problem)}: {type(problem).__name__}: {problem}"
            ) from problem


def read_chat_template(folder: str | Path, tokenizer_config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(template text, its file) of a model folder, or None if it has no template.

    chat_template.jinja comes first, then tokenizer_config.json's "chat_template": a text, or a list of
    {"name", "template"} of which "default" counts. Raises TokenizerError.
    """
    path = Path(folder) / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is not UTF-8 text") from None
    value = tokenizer_config.get("chat_template")
    origin = str(Path(folder) / "tokenizer_config.json")
    if value is None:
        return None
    if isinstance(value, list):
        named = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
        if "default" not in named:
            raise TokenizerError(
                f"{origin}: of the chat templates ({', '.join(named) or 'none'}), none is 'default'"
            )
        value = named["default"]
    if not isinstance(value, str):
        raise TokenizerError(f"{origin}: chat_template must be text, got {type(value).__name__}")
    return value, origin


class _Refusal(Exception):
    """The template called raise_exception."""


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise _Refusal(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: renders its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _template_line(problem: Exception) -> str:
    """' in line 12', if the traceback passes through the template."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(problem.__traceback__)
        if frame.filename == "<template>"
    ]
    return f" in line {lines[-1]}" if lines else ""
