"""How the feed measures itself, and how it keeps from running ahead of the page."""

import time
from collections import deque
from dataclasses import dataclass, field

from tinyvllm.engine.events import Event

ACK_INTERVAL_S, PROMPT_ACK_INTERVAL_S = 0.2, 0.5
PROMPT_S = 0.15
ACKS_UNDER_WAY = 2
ACK_TIMEOUT_S = 1.0
SAMPLES = 8  # events of a frame whose latency is taken


@dataclass
class FeedStats:
    """Counters since the feed began. latency_ms: from an event to its drawing, the newest 4,000 samples.
    pump_s: processor time of the pump's thread; read_s: what of it went into reading and applying events."""

    frames: int = 0
    bytes: int = 0
    events: int = 0
    gaps: int = 0
    messages_in: int = 0
    pump_s: float = 0.0
    read_s: float = 0.0
    latency_ms: deque = field(default_factory=lambda: deque(maxlen=4000))

    def latency(self, quantile: float) -> float | None:
        """A quantile of latency_ms, or None before the first."""
        values = sorted(self.latency_ms)
        return values[min(len(values) - 1, int(quantile * len(values)))] if values else None


class LatencyClock:
    """Event times are perf_counter's, the page's are the wall clock's; both tick on the same machine."""

    def __init__(self):
        self._to_wall_ns = time.time_ns() - time.perf_counter_ns()
        self._sent: dict[int, list[int]] = {}

    def sent(self, frame: int, events: list[Event]) -> None:
        """Note when a frame's events happened: of many, some that are spread evenly over them."""
        every = max(1, len(events) // SAMPLES)
        self._sent[frame] = [event.t_ns for event in events[::every]]
        for old in [n for n in self._sent if n < frame - 50]:
            del self._sent[old]

    def drawn(self, frame: int, wall_ms: float, stats: FeedStats) -> None:
        """The page drew a frame at this wall-clock time, in milliseconds since 1970."""
        for t_ns in self._sent.pop(frame, ()):
            latency = wall_ms - (t_ns + self._to_wall_ns) / 1e6
            if 0 <= latency < 60_000:  # a recorded run keeps its recorded times: they say nothing of latency
                stats.latency_ms.append(latency)


class Flow:
    """Keeps the feed from sending more than the page can draw, without depending on what the page says.

    Some frames ask to be acknowledged, at most one in `interval_s`: an answer costs the kernel and JupyterLab more than
    a frame does. Of a page that answered promptly the next one is asked later still. While two such frames are without
    their answer nothing is sent; one that has had none for a second is forgotten, for a page that was closed never
    answers.
    """

    def __init__(self, interval_s: float = ACK_INTERVAL_S):
        self.interval_s = interval_s
        self._wait_s = interval_s  # until the next frame that asks, if none is without its answer
        self._asked: deque[tuple[int, float]] = deque()  # (frame, when)
        self._last = float("-inf")

    def is_congested(self) -> bool:
        """Whether to wait with the next frame."""
        now = time.monotonic()
        while self._asked and now - self._asked[0][1] > ACK_TIMEOUT_S:
            self._asked.popleft()
        return len(self._asked) >= ACKS_UNDER_WAY

    def sent(self, frame: int) -> bool:
        """Note a frame; returns whether it asks to be acknowledged."""
        now = time.monotonic()
        if now - self._last < (self.interval_s if self._asked else self._wait_s):
            return False
        self._last = now
        self._asked.append((frame, now))
        return True

    def acknowledged(self, frame: int) -> None:
        """The page has drawn this frame."""
        while self._asked and self._asked[0][0] <= frame:
            _, asked = self._asked.popleft()
            is_prompt = time.monotonic() - asked < PROMPT_S
            self._wait_s = max(self.interval_s, PROMPT_ACK_INTERVAL_S) if is_prompt else self.interval_s
