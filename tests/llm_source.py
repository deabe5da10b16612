"""A real LLM with the face of a LiveEngine, stepped by the test itself."""

import time
from concurrent.futures import Future
from typing import Any

from tests.feed_stand_ins import SteppedSource
from tinyvllm.engine.events import EventLog


class LLMSource(SteppedSource):
    """Steps when `run` says so; a look is answered at once."""

    def __init__(self, llm: Any):
        self.llm, self.engine, self.events, self.told_again = llm, llm.engine, EventLog(), 0
        self.engine.listen(self.events)

    def between_steps(self, look, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(look(self.llm, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def token_text(self, token_id: int) -> str | None:
        return f"<{token_id}>"

    def run(self, steps: int = 10**6) -> None:
        while steps and self.engine.has_unfinished_requests():
            self.engine.step()
            steps -= 1


def settle(feed, topic: str, frames: int = 60) -> None:
    """Frames until the topic has nothing more to say."""
    quiet = 0
    for _ in range(frames):
        time.sleep(0.002)
        before = len(feed.page.frames)
        feed.tick()
        told = any(topic in frame["topics"] for frame in feed.page.frames[before:])
        feed.page.say({"op": "ack", "n": feed.page.frames[-1]["n"] if feed.page.frames else 0, "drawn": 0})
        quiet = 0 if told else quiet + 1
        if quiet >= 4:
            return
