"""How often the feed sends a frame: as often as the eye likes it, as seldom as the engine needs it.

And for how long the interpreter may be kept from the engine's thread at a time.
"""

import sys
import threading
from typing import Any

FRAMES_PER_SECOND = 20
MANY_TOPICS = 4  # from so many visible topics on, which are as many pictures to draw in every frame,
FRAMES_OF_MANY = 15  # so many frames: 100 ms from an event to its pixels are still kept
SHARE = 0.05  # of the interpreter's time that frames may take, beside the reading: engine and pump share it
SLOWEST_S = 0.25  # but not slower than this
SWITCH_S = 0.0005  # so soon a thread that waits for the interpreter gets it: half a step of a small model,
DEVICE_SWITCH_S = 0.00002  # or, of an engine that waits for a device most of the time, at once


class Pace:
    """Chooses the time between two frames by what frames have cost.

    frames_per_second: the most, whatever they cost.
    """

    def __init__(self, frames_per_second: float):
        if not frames_per_second > 0:
            raise ValueError(f"frames_per_second must be above 0, got {frames_per_second!r}")
        self.least_s = 1.0 / frames_per_second
        self.cost_s = 0.0  # processor time of a frame: a moving average over about ten

    def spent(self, seconds: float) -> None:
        """Note the processor time that a frame took, without the reading of events. One that took much longer (a
        snapshot) counts as four."""
        if self.cost_s:
            seconds = min(seconds, 4 * self.cost_s)
        self.cost_s += 0.1 * (seconds - self.cost_s)

    def interval_s(self, num_topics: int) -> float:
        """From one frame to the next, while so many topics are visible."""
        by_eye = 1.0 / FRAMES_OF_MANY if num_topics >= MANY_TOPICS else 0.0
        return max(self.least_s, by_eye, min(self.cost_s / SHARE, SLOWEST_S))


class Switches:
    """Python hands its interpreter to another thread that waits for it after five milliseconds: three steps of a small
    model. While somebody shows an engine at full speed it does so sooner, for every thread of the process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._wanted: dict[int, float] = {}
        self._before: float | None = None  # what it was, while it is quick

    def quick(self, who: Any, interval_s: float | None) -> None:
        """Say how soon `who` wants it from now on, or None: no matter. The soonest counts, and never later than it was;
        it is again what it was when nobody cares."""
        if self._wanted.get(id(who)) == interval_s:
            return
        with self._lock:
            if interval_s is None:
                self._wanted.pop(id(who), None)
            else:
                self._wanted[id(who)] = interval_s
            if self._before is None:
                self._before = sys.getswitchinterval()
            sys.setswitchinterval(min(self._before, *self._wanted.values()) if self._wanted else self._before)
            if not self._wanted:
                self._before = None


switches = Switches()
