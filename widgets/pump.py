"""The pump: the thread in which a feed reads, computes and sends its frames, in pieces that hold up no engine."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from widgets.pace import Pace, switches

if TYPE_CHECKING:
    from widgets.feed import Feed

SLICE_PAUSE_S = 0.001  # between two pieces of a frame


class Pump:
    """Calls feed.tick() in time, until the feed is closed, and does jobs that others would rather not do themselves.

    frames_per_second: the most (see Pace).
    """

    def __init__(self, feed: "Feed", frames_per_second: float):
        self.pace = Pace(frames_per_second)
        self._feed = feed
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tinyvllm-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, after the feed was closed."""
        self._jobs.put(lambda: None)  # it need not wait for its next frame
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def later(self, job: Callable, *arguments: Any) -> None:
        """Call job(*arguments) in this thread, soon; here and now if it does not run."""
        if self._thread.is_alive() and not self._feed.closed:
            self._jobs.put(partial(job, *arguments))
        else:
            job(*arguments)

    def breathe(self) -> None:
        """Between two pieces of a frame: an engine at full speed is held up by one of them and not by the sum."""
        if threading.current_thread() is self._thread and self._feed.source.state == "running":
            time.sleep(SLICE_PAUSE_S)

    def _run(self) -> None:
        feed, was_closed = self._feed, False
        due = time.monotonic() + self.pace.least_s
        while not feed.closed:
            try:
                if (wait := due - time.monotonic()) > 0:
                    self._jobs.get(timeout=wait)()
                    continue
                was_closed = feed.source.state == "closed"
                with feed.lock:
                    self._frame()
            except queue.Empty:
                continue
            except Exception as error:  # a picture's mistake is not the engine's, nor the other pictures'
                feed.error = error
            visible, source = len(feed.subscriptions.visible_ones()), feed.source
            is_fast = source.state == "running" and getattr(source, "steps_per_second", None) is None
            switches.quick(self, bool(visible) and is_fast)
            due = time.monotonic() + self.pace.interval_s(visible)
            if was_closed:  # all that it has said has just been sent
                feed.end()
        switches.quick(self, False)
        while not self._jobs.empty():
            self._jobs.get()()

    def _frame(self) -> None:
        started = time.thread_time()
        self._feed.tick()
        spent = time.thread_time() - started
        self._feed.stats.pump_s += spent
        self.pace.spent(spent)
