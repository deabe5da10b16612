"""Questions from the page, and their answers: a Payload, a dictionary, None, or a Future of one of these.

A Future may also bring a function that gives one of these. It is called, and the answer packed and sent, in the pump's
thread: what looked into the engine has done so in the engine's, which has better things to do.
"""

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import ANSWERS
from widgets.frames import Packer, Payload

if TYPE_CHECKING:
    from widgets.feed import Feed


def reply(feed: "Feed", message: dict[str, Any]) -> None:
    """Answer {"id", "what", "args"} through the feed's hub, now or when the engine has; errors in the user's words."""
    try:
        if message["what"] not in ANSWERS:
            raise TinyVLLMError(f"nobody knows an answer to {message['what']!r}")
        answer = ANSWERS[message["what"]](feed, **(message.get("args") or {}))
    except Exception as error:
        _refuse(feed, message["id"], error)
        return
    if isinstance(answer, Future):
        answer.add_done_callback(lambda done: feed.later(_take, feed, message["id"], done))
    else:
        _send(feed, message["id"], answer)


def _take(feed: "Feed", question: str, done: Future) -> None:
    try:
        answer = done.result()
        _send(feed, question, answer() if callable(answer) else answer)
    except BaseException as error:  # a cancelled Future's too: the page must not wait for ever
        _refuse(feed, question, error)


def _send(feed: "Feed", question: str, answer: Any) -> None:
    packer = Packer()
    part = packer.add(answer if isinstance(answer, Payload) else Payload(answer or {}))
    feed.hub.send({"type": "answer", "id": question, **part}, packer.buffers())


def _refuse(feed: "Feed", question: str, error: BaseException) -> None:
    text = str(error) if isinstance(error, TinyVLLMError) else f"{type(error).__name__}: {error}"
    feed.hub.send({"type": "answer", "id": question, "error": text})
