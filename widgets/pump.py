"""The pump: the thread in which a feed reads, computes and sends its frames, in pieces that hold up no engine.

Of an engine that waits for a device most of the time, the pump works while it waits, and is done some time before:

    engine   | schedule, launch | wait for the device ........................ | schedule, launch | wait ...
    pump                          | frame, as far as it comes ....... |                             | and so on ...

Of one that computes in this process it does a small piece at a time. What is old by then is done all the same.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from widgets.pace import DEVICE_SWITCH_S, SWITCH_S, Pace, switches

if TYPE_CHECKING:
    from widgets.feed import Feed

PIECE_S = 0.00015  # of processor time: so much of a frame is done in one go,
END_S = 0.0002  # before a device is done, the pump is: its longest pieces are as long
PAUSE_S, SHORT_PAUSE_S = 0.0005, 0.0001  # and then the engine gets the interpreter; the short one
PASS_ON_S = 0.0003  # after a message was sent Jupyter's thread passes it on
LOOK_S, MOST_OF = 0.00005, 0.85  # for room to send: how often, and what share of the longest wait is taken for that
PATIENCE_S = 0.02  # where the pauses of a frame have taken so long: its news are getting old
REST_S = 0.005  # between two frames, at least


class Pump:
    """Calls feed.tick() in time, until the feed is closed, and does jobs that others would rather not do themselves.

    frames_per_second: the most (see Pace).
    """

    def __init__(self, feed: "Feed", frames_per_second: float):
        self.pace = Pace(frames_per_second)
        self._feed = feed
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tinyvllm-feed", daemon=True)
        self._went_on = 0.0  # processor time of the thread after the last pause
        self._patience_s = 0.0
        self._beside = False  # it works while the engine waits for its device
        self._send_s = self._room_s = 0.0  # processor time of sending a frame; the longest wait of the engine, lately

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
        """Between two pieces of a frame, however small: an engine at full speed is held up by one of PIECE_S and not by
        the sum."""
        if threading.current_thread() is not self._thread:
            return
        spare_s = self._spare_s()
        if spare_s is not None and spare_s > END_S:
            self._beside = True
        elif self._beside or time.thread_time() - self._went_on >= PIECE_S:
            self._pause(PAUSE_S if spare_s is None else SHORT_PAUSE_S)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around the sending of a frame, its longest piece. Of an engine that waits for a device it begins where the
        wait has room for it; where none has, at the beginning of one."""
        if threading.current_thread() is self._thread:
            self._find_room(self._send_s + PASS_ON_S)
        before = time.thread_time()
        yield
        self._send_s += 0.2 * (time.thread_time() - before - self._send_s)
        self._beside = False

    def _find_room(self, needed_s: float) -> None:
        until = time.monotonic() + PATIENCE_S / 4
        while self._feed.source.state == "running" and (spare_s := self._spare_s()) is not None:
            self._room_s = max(spare_s, 0.99 * self._room_s)
            if spare_s >= min(needed_s, MOST_OF * self._room_s) or time.monotonic() > until:
                break
            time.sleep(LOOK_S)

    def _spare_s(self) -> float | None:
        """For how long the engine's device will likely work yet; None: there is none."""
        return getattr(self._feed.source, "spare_s", lambda: None)()

    def _pause(self, look_every_s: float) -> None:
        """Let the engine have the interpreter: for a while, or until it waits for its device again."""
        self._beside = False
        if self._feed.source.state == "running":
            began, longest = time.monotonic(), PAUSE_S if self._patience_s > 0 else SHORT_PAUSE_S
            while not self._beside and time.monotonic() < began + longest:
                time.sleep(min(look_every_s, longest))
                self._beside = (self._spare_s() or 0.0) > END_S
            self._patience_s -= time.monotonic() - began
        self._went_on = time.thread_time()

    def _run(self) -> None:
        feed, was_closed = self._feed, False
        began = time.monotonic()
        due = began + self.pace.least_s
        while not feed.closed:
            try:
                if (wait := due - time.monotonic()) > 0:
                    self._jobs.get(timeout=wait)()
                    continue
                was_closed = feed.source.state == "closed"
                began = time.monotonic()
                with feed.lock:
                    self._frame()
            except queue.Empty:
                continue
            except Exception as error:  # a picture's mistake is not the engine's, nor the other pictures'
                feed.error = error
            visible, source = len(feed.subscriptions.visible_ones()), feed.source
            is_fast = source.state == "running" and getattr(source, "steps_per_second", None) is None
            waits = self._spare_s() is not None
            switches.quick(self, (DEVICE_SWITCH_S if waits else SWITCH_S) if visible and is_fast else None)
            due = max(began + self.pace.interval_s(visible), time.monotonic() + REST_S)
            if was_closed:  # all that it has said has just been sent
                feed.end()
        switches.quick(self, None)
        while not self._jobs.empty():
            self._jobs.get()()

    def _frame(self) -> None:
        stats, started = self._feed.stats, time.thread_time()
        self._went_on, self._patience_s = started, PATIENCE_S
        read_s = stats.read_s
        self._feed.tick()
        spent = time.thread_time() - started
        stats.pump_s += spent
        self.pace.spent(spent - (stats.read_s - read_s))  # to read half as often is to read twice as much
