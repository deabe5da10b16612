"""The messages of a chat, checked before a template sees them, in the words of whoever wrote them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tinyvllm.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_EXAMPLE = '[{"role": "user", "content": "Hello"}]'


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages in the one form that templates read: "content" is text.

    A content that is a list of parts, as in OpenAI's API, is joined; parts other than text are refused, and
    so is an unknown role: most templates would print it and leave the model to guess. Other keys ("name",
    "tool_calls", ...) stay. Raises RequestError.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list such as {_EXAMPLE}, got {_described(messages)}")
    if not messages:
        raise RequestError(f"messages is empty: give at least one, such as {_EXAMPLE}")
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"message {number} must be a dictionary with 'role' and 'content', got {_described(message)}"
        )
    role = message.get("role")
    if "role" not in message:
        raise RequestError(f"message {number} has no 'role': it is one of {', '.join(map(repr, ROLES))}")
    if role not in ROLES:
        raise RequestError(
            f"message {number} has the role {role!r}: it must be one of {', '.join(map(repr, ROLES))}"
        )
    if "content" not in message and not message.get("tool_calls"):
        raise RequestError(f"message {number} ({role}) has no 'content': give its text")
    return {**message, "content": _text(number, role, message)}


def _text(number: int, role: str, message: Mapping[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(
            f"message {number} ({role}) must have text as its content, got {_described(content)}"
        )
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise RequestError(
                f"message {number} ({role}) has a content part that is not text, which this model cannot "
                f"read: {_described(part)}"
            )
    return "".join(part["text"] for part in content)


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
