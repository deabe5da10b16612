"""What a topic is: the data behind one kind of picture, as a snapshot and as what changed since."""

from typing import TYPE_CHECKING, Any

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from widgets.frames import Payload

if TYPE_CHECKING:
    from widgets.feed import Feed

TOPICS: dict[str, type["Topic"]] = {}


def register(topic: type["Topic"]) -> type["Topic"]:
    """Class decorator: make a topic known under its name."""
    if TOPICS.setdefault(topic.name, topic) is not topic:
        raise ValueError(f"there are two topics called {topic.name!r}")
    return topic


class Topic:
    """One subscription's data. It lives in the pump's thread, which alone calls it.

    feed: where the state, the selection and the engine are. params: what the view asked for; a view that asks for
    other params gets a topic of its own.
    """

    name = ""
    scrubbable = False  # True: while the feed's cursor is set, snapshot() gets the state of that time

    def __init__(self, feed: "Feed", **params: Any):
        self.feed = feed
        self.params = params

    def snapshot(self, state: EngineState) -> Payload:
        """Everything that a view needs which has nothing yet."""
        raise NotImplementedError

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        """What changed by these events, which are in `state` already; None if nothing did."""
        return self.snapshot(state)

    def hidden(self) -> None:
        """Nobody can see it for now; the next call is snapshot() when somebody can, or close()."""

    def close(self) -> None:
        """The last view has gone."""
