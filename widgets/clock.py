"""How the feed measures itself: counts, and the time from an event to its pixels."""

import time
from collections import deque
from dataclasses import dataclass, field

from tinyvllm.engine.events import Event


@dataclass
class FeedStats:
    """Counters since the feed began. latency_ms: from the newest event of a frame to its drawing, the last 1,000."""

    frames: int = 0
    bytes: int = 0
    events: int = 0
    gaps: int = 0
    messages_in: int = 0
    pump_s: float = 0.0
    latency_ms: deque = field(default_factory=lambda: deque(maxlen=1000))

    def latency(self, quantile: float) -> float | None:
        """A quantile of latency_ms, or None before the first."""
        values = sorted(self.latency_ms)
        return values[min(len(values) - 1, int(quantile * len(values)))] if values else None


class LatencyClock:
    """Event times are perf_counter's, the page's are the wall clock's; both tick on the same machine."""

    def __init__(self):
        self._to_wall_ns = time.time_ns() - time.perf_counter_ns()
        self._oldest: dict[int, int] = {}

    def sent(self, frame: int, events: list[Event]) -> None:
        """Note a frame's oldest event: the one that has waited longest."""
        if events:
            self._oldest[frame] = events[0].t_ns
        for old in [n for n in self._oldest if n < frame - 50]:
            del self._oldest[old]

    def drawn(self, frame: int, wall_ms: float, stats: FeedStats) -> None:
        """The page drew a frame at this wall-clock time, in milliseconds since 1970."""
        oldest = self._oldest.pop(frame, None)
        if oldest is not None:
            latency = wall_ms - (oldest + self._to_wall_ns) / 1e6
            if 0 <= latency < 60_000:  # a recorded run keeps its recorded times: they say nothing of latency
                stats.latency_ms.append(latency)
