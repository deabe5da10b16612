"""Arrivals: a thread that brings prompts to a live engine at random times, as users would.

The times are those of engine/arrivals.py, drawn from a seed, so the same traffic can be had twice. They are kept in
units of the mean gap, so that turning the rate up or down in the middle of a wait does what it should.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from tinyvllm.engine.arrivals import poisson_stream
from tinyvllm.errors import TinyVLLMError

TICK_S = 0.05
MOST_WAITING = 500  # while so many requests wait, nobody new comes in
MOST_PER_SECOND = 200.0


class ArrivalsError(TinyVLLMError, ValueError):
    """A rate that cannot be."""


class LiveArrivals:
    """Brings requests to an engine while `rate` is above 0.

    bring: called with 0, 1, 2, ... in this object's thread, once for each arrival. is_over: asked now and then; once
    it is true the thread ends by itself. may_come: false holds the traffic's clock (the engine is paused, or full).
    The thread lives only while there is a rate, so an idle one costs nothing.
    """

    def __init__(self, bring: Callable[[int], Any], *, is_over: Callable[[], bool], may_come: Callable[[], bool],
                 seed: int = 0):
        self.error: BaseException | None = None  # what ended the traffic, if it was not somebody's wish
        self.sent = 0
        self._bring, self._is_over, self._may_come, self._seed = bring, is_over, may_come, seed
        self._rate = 0.0
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self.begin_again()

    @property
    def rate(self) -> float:
        """Requests a second, on the average."""
        return self._rate

    def set_rate(self, rate: float) -> None:
        """So many requests a second from now on; 0 for none. Raises ArrivalsError."""
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= MOST_PER_SECOND:
            raise ArrivalsError(f"the rate of arrivals can be 0 (none) to {MOST_PER_SECOND:g} requests a second, "
                             f"got {rate!r}")
        with self._lock:
            self._rate, self.error = float(rate), None
            if rate and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tinyvllm-arrivals", daemon=True)
                self._thread.start()
        self._changed.set()

    def begin_again(self) -> None:
        """The same traffic from its beginning."""
        with self._lock:
            self._times = (arrival.at for arrival in poisson_stream(1.0, seed=self._seed))  # in mean gaps,
            self._now, self._next = 0.0, next(self._times)  # as these are
            self.sent = 0

    def close(self, timeout: float = 5.0) -> None:
        """No more arrivals; waits until the thread has ended."""
        thread = self._thread
        self.set_rate(0)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            rate = self._rate  # once: whoever turns it down does so in another thread
            self._changed.wait(min(TICK_S, max(0.001, (self._next - self._now) / rate)) if rate else TICK_S)
            self._changed.clear()
            now = time.monotonic()
            elapsed, last = now - last, now
            with self._lock:
                if not self._rate or self._is_over():
                    self._rate, self._thread = 0.0, None
                    return
            try:
                if self._may_come():
                    self._bring_due(elapsed)
            except Exception as error:  # a bad prompt, an engine that failed: told, and the traffic ends
                self.error, self._rate = error, 0.0

    def _bring_due(self, elapsed: float) -> None:
        with self._lock:
            self._now += elapsed * self._rate
        while self._next <= self._now and self._rate:
            with self._lock:
                number, self.sent = self.sent, self.sent + 1
                self._next = next(self._times)
            self._bring(number)
