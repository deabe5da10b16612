"""A page and an engine that tests of the feed can hold in their hands."""

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from tests.toy import toy_engine
from tinyvllm.engine.events import EventLog
from widgets.feed import Feed
from widgets.frames import Payload, unpack
from widgets.hub import SELECTION


def ready_message(topic: str, view: str, visible: bool, params: dict[str, Any]) -> dict[str, Any]:
    """What a page says of a view that it has drawn."""
    return {"op": "ready", "view": view, "topic": topic, "params": params, "key": f"{topic}{params or ''}",
            "visible": visible}


class Page:
    """The hub and the page behind it: it keeps the frames, and says what it is told to say."""

    def __init__(self):
        self.selection, self.cursor, self.inspected = dict(SELECTION), None, {}
        self.frames: list[dict] = []
        self.answers: list[dict] = []

    def listen(self, handler) -> None:
        self.say = handler

    def observe(self, *_) -> None:
        """A real hub tells of changes of its traits; here the tests call what would follow."""

    def send(self, content: dict, buffers: Any = None) -> None:
        (self.frames if content["type"] == "frame" else self.answers).append({**content, "buffers": buffers or []})

    def ready(self, topic: str, view: str = "v", visible: bool = True, **params: Any) -> None:
        self.say(ready_message(topic, view, visible, params))

    def part(self, key: str, frame: int = -1) -> tuple[str, Payload]:
        """(mode, payload) of a topic in a frame."""
        found = self.frames[frame]
        return found["topics"][key]["mode"], unpack(found["topics"][key], found["buffers"])


class SteppedSource:
    """A toy engine with the face of a LiveEngine, stepped by the test itself: no thread, no luck."""

    kind, error = "cpu", None

    def __init__(self, capacity: int = 100_000, **options: Any):
        self.engine, self.events = toy_engine(**options), EventLog(capacity)
        self.engine.listen(self.events)
        self.told_again = 0

    @property
    def state(self) -> str:
        return "running" if self.engine.has_unfinished_requests() else "idle"

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def tell_again(self) -> None:
        self.told_again += 1
        self.engine.listen(self.events)

    def between_steps(self, look, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(look(SimpleNamespace(engine=self.engine), *arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"


class SteppedFeed(Feed):
    """A feed whose frames the test asks for, one by one, with `tick()`."""

    def __init__(self, source: Any = None, **options: Any):
        super().__init__(source, hub=Page(), start=False, **options)
        self.page = self.hub
