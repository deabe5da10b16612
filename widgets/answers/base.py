"""The register of answers."""

from collections.abc import Callable
from typing import Any

ANSWERS: dict[str, Callable[..., Any]] = {}


def answers(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function answers the question `what`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if ANSWERS.setdefault(what, function) is not function:
            raise ValueError(f"there are two answers to {what!r}")
        return function

    return register
