"""What the control bar shows: the run in a few numbers, and what can be done to it."""

from collections import deque
from typing import Any

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from widgets.controls import Controls
from widgets.frames import Payload
from widgets.topics.base import Topic, register

WINDOW_NS = 1_000_000_000  # the last second: tokens/s are counted, not guessed
AT_ONCE = 1e9  # a rate as good as infinity, of which JSON knows nothing


@register
class ControlTopic(Topic):
    """Data: running, waiting, finished, preemptions, tokens_per_s (generated in the last second of the run's own time),
    speed (steps a second or None), rate (of a recorded run), limits, arrivals, recording, cannot {what: why}."""

    name = "control"

    def __init__(self, feed, **params):
        super().__init__(feed, **params)
        self._recent: deque[tuple[int, int]] = deque()  # (time, tokens) of the last second
        self._num_recent = 0  # tokens in there
        self._told: dict[str, Any] | None = None

    def snapshot(self, state: EngineState) -> Payload:
        self._recent = deque((step.end_ns, sum(row[3] for row in step.batch)) for step in state.steps
                             if step.end_ns is not None and step.error is None)
        self._num_recent = sum(count for _, count in self._recent)
        self._told = self._describe(state)
        return Payload(self._told)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        for event in events:
            if event[2] == "tokens":
                self._recent.append((event.t_ns, len(event.a)))
                self._num_recent += len(event.a)
        now = self._describe(state)
        if now == self._told:
            return None
        self._told = now
        return Payload(now)

    def _describe(self, state: EngineState) -> dict[str, Any]:
        source, controls = self.feed.source, Controls.of(self.feed)
        since = source.now_ns() - WINDOW_NS
        while self._recent and self._recent[0][0] <= since:
            self._num_recent -= self._recent.popleft()[1]
        arrivals, rate = controls.arrivals, getattr(source, "rate", None)
        return {**count_requests(state), "tokens_per_s": self._num_recent,
                "speed": source.steps_per_second, "rate": rate and min(rate, AT_ONCE), "limits": limits(source),
                "cannot": controls.cannot(),
                "arrivals": {"rate": arrivals.rate, "sent": arrivals.sent,
                             "error": str(arrivals.error) if arrivals.error else None},
                "recording": {"on": self.feed.is_recording, "unsaved": controls.has_unsaved, **controls.recorded},
                "can_go_back": controls.set_aside is not None}


def count_requests(state: EngineState) -> dict[str, int]:
    """How many requests run, wait (preempted ones too) and have ended; how often one was preempted."""
    running, unfinished = state.counts["running"], len(state.unfinished)
    return {"running": running, "waiting": unfinished - running, "finished": len(state.requests) - unfinished,
            "preemptions": state.num_preempted}


def limits(source: Any) -> dict[str, int]:
    """The most that the limits can be set to without a reset."""
    llm = getattr(source, "llm", None)
    if llm is None:
        return {}
    return {"max_num_seqs": llm.memory_plan.max_num_seqs,
            "max_num_batched_tokens": llm.memory_plan.max_num_batched_tokens}
