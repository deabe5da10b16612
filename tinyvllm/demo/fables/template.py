"""The grammar's small language: text with choices and slots, parsed once and rendered with a random
generator.

    [a|b|c]      one of the three, each as likely; choices nest, and an empty choice is allowed
    {h}          the value of role `h` in the scene; {H} the same with a capital letter
    {h.his}      form `his` of role `h`
    {@wonder}    one line of the pool `wonder`, rendered in the same scene

A scene is a dict from role to a value: a string, a callable that takes the generator and returns a string, or
an object with a method `form(name, rng) -> str` (see cast.py). Under "@" it holds a callable (pool, rng) ->
line.
"""

import re
from functools import cache
from typing import Any

Node = str | tuple  # text, ("slot", role, form, capital), ("pool", name) or ("choice", [sequence, ...])


class TemplateError(ValueError):
    """A template that cannot be parsed, or that names a role or a pool that the scene does not have."""


@cache
def parse(template: str) -> tuple[Node, ...]:
    """Return `template` as a sequence of nodes. Raises TemplateError where brackets do not match."""
    nodes, end = _sequence(template, 0)
    if end != len(template):
        raise TemplateError(f"stray {template[end]!r} at {end} in template: {template!r}")
    return nodes


def _sequence(text: str, i: int) -> tuple[tuple[Node, ...], int]:
    """Parse up to the end of the text, or to the '|' or ']' that closes an enclosing choice."""
    nodes: list[Node] = []
    start = i
    while i < len(text) and text[i] not in "|]":
        if text[i] not in "[{":
            i += 1
            continue
        if i > start:
            nodes.append(text[start:i])
        if text[i] == "{":
            close = text.find("}", i)
            if close < 0:
                raise TemplateError(f"unclosed '{{' in template: {text!r}")
            nodes.append(_slot(text[i + 1 : close]))
            i = close + 1
        else:
            options = []
            while i < len(text) and text[i] in "[|":
                option, i = _sequence(text, i + 1)
                options.append(option)
            if i >= len(text):
                raise TemplateError(f"unclosed '[' in template: {text!r}")
            nodes.append(("choice", options))
            i += 1
        start = i
    if i > start:
        nodes.append(text[start:i])
    return tuple(nodes), i


def _slot(inside: str) -> Node:
    if inside.startswith("@"):
        return ("pool", inside[1:])
    role, _, form = inside.partition(".")
    return ("slot", role[0].lower() + role[1:], form, role[0].isupper())


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _emit(nodes: tuple[Node, ...], scene: dict[str, Any], rng, out: list[str]) -> None:
    for node in nodes:
        if type(node) is str:
            out.append(node)
        elif node[0] == "choice":
            _emit(node[1][int(rng.random() * len(node[1]))], scene, rng, out)
        elif node[0] == "pool":
            if "@" not in scene:
                raise TemplateError(f"the scene has no pools, and the template asks for {node[1]!r}")
            _emit(parse(scene["@"](node[1], rng)), scene, rng, out)
        else:
            _, role, form, upper = node
            if role not in scene:
                raise TemplateError(f"the scene has no role {role!r}")
            value = scene[role]
            if type(value) is not str:
                value = value.form(form, rng) if hasattr(value, "form") else value(rng)
            out.append(capital(value) if upper else value)


_SPACES = re.compile(r"  +")


def render(template: str, scene: dict[str, Any], rng) -> str:
    """Render `template` in `scene`; `rng` is a random.Random, and the same state gives the same text.

    Raises TemplateError for a role or a pool that the scene lacks.
    """
    out: list[str] = []
    _emit(parse(template), scene, rng, out)
    return _SPACES.sub(" ", "".join(out)).strip()
