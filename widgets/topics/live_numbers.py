"""Nothing but the few numbers that every frame carries: for panels that draw what they ask for, not what is pushed."""

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from widgets.frames import Payload
from widgets.topics.base import Topic, register


@register
class LiveNumbersTopic(Topic):
    """As long as somebody subscribes to it, frames come and `client.live` is up to date (BitLens, TensorFile)."""

    name = "live_numbers"

    def snapshot(self, state: EngineState) -> Payload:
        return Payload()

    def delta(self, state: EngineState, events: list[Event]) -> None:
        return None
