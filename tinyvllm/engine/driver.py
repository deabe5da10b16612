"""Driver: a thread that takes something step by step, and hears commands between two steps.

What LiveEngine (a real engine) and ReplayEngine (a recorded one) have in common, so that a control bar drives either:

    notebook, widgets ── pause, step, resume, speed, reset, stop, ... ──> commands
                                                                            │ between steps
    EventLog <── events <── thread: drain commands, advance, ... <──────────┘

An exception ends nothing but the run: it is kept in `error`, the state is "failed", and `reset` starts afresh.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from tinyvllm.engine.events import EventLog
from tinyvllm.engine.garbage import WholeCollections
from tinyvllm.errors import ConfigError, TinyVLLMError


class Driver:
    """Base class. A subclass says what there is to do (`_has_work`) and does a piece of it (`_advance`).

    events: the log that the thread emits into. steps_per_second: a speed limit; None is as fast as it goes.
    paused: start paused, to go on step by step.

    Every method returns at once, except `wait_idle` and `close`, which are for scripts: in a notebook cell they keep
    the page from being served.
    """

    unfinished = "requests are still running"  # what wait_idle says when its time is over

    def __init__(self, events: EventLog, steps_per_second: float | None, paused: bool):
        self.events = events
        self.error: BaseException | None = None
        self._interval = _interval(steps_per_second)
        self._next_due = 0.0  # time.perf_counter() from which the limit allows the next step
        self._paused = paused
        self._steps_allowed = 0  # while paused
        self._stepping = False
        self._closed = False  # somebody has asked for the end
        self._is_over = False  # it has come
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_sent = self._num_done = 0  # commands
        self._thread = threading.Thread(target=self._run, name="tinyvllm-engine", daemon=True)

    # ---- what a subclass brings ----

    def _has_work(self) -> bool:
        """Whether anything is left to do, paused or not."""
        raise NotImplementedError

    def _advance(self) -> float:
        """Do the next piece of work, or none if its time has not come; returns for how many seconds to wait then."""
        raise NotImplementedError

    def _failed(self, error: BaseException) -> None:
        """The run has ended with an error."""

    def _ended(self) -> None:
        """The thread is about to end: the last thing that it does."""
        self._is_over = True

    def tell_again(self) -> None:
        """Emit the present state as events once more, from engine_config on: for a reader that missed some."""
        self._send(self._tell_again)

    def _tell_again(self) -> None:
        raise NotImplementedError

    # ---- what a notebook asks for: each returns at once ----

    def pause(self) -> None:
        """Stop after the step that is running."""
        self._send(self._set_paused, True)

    def resume(self) -> None:
        """Go on."""
        self._send(self._set_paused, False)

    def step(self, count: int = 1) -> None:
        """Run so many steps and be paused again."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"step needs a whole number of 1 or more, got {count!r}")
        self._send(self._allow_steps, count)

    def set_speed(self, steps_per_second: float | None) -> None:
        """At most so many steps a second; None for no limit."""
        self._send(self._set_interval, _interval(steps_per_second))

    # ---- what it is doing ----

    @property
    def steps_per_second(self) -> float | None:
        """The speed limit; None: none."""
        return 1.0 / self._interval if self._interval else None

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the thread that takes the steps: a callback, or a look between two steps."""
        return threading.current_thread() is self._thread

    @property
    def state(self) -> str:
        """"running", "paused", "idle" (nothing to do), "failed" (see `error`) or "closed"."""
        if self._is_over:
            return "closed"
        if self.error is not None:
            return "failed"
        if self._paused and not self._steps_allowed:
            return "paused"
        return "idle" if self._is_idle() else "running"

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until there is nothing left to do. Raises the error that ended the run, or TimeoutError."""
        if self.is_own_thread:
            raise TinyVLLMError("wait_idle() in a callback would wait for itself: call it elsewhere")
        deadline = time.monotonic() + timeout
        while True:
            if self.error is not None:
                raise self.error
            if self._is_idle() or self._is_over and not self._has_work():
                return
            if self._is_over:
                self._check_open()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.unfinished} after {timeout:g} s (state: {self.state})")
            time.sleep(0.005)

    def close(self) -> None:
        """End the thread."""
        if not self._closed:
            self._closed = True
            self._send(lambda: None)
        if not self.is_own_thread:  # a callback may close: then it ends after that
            self._thread.join(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        trouble = f", error: {self.error}" if self.error is not None else ""
        return f"{type(self).__name__}({self._describe()}{trouble})"

    def _describe(self) -> str:
        return self.state

    def _check_open(self) -> None:
        if self._closed:
            raise TinyVLLMError(f"this {type(self).__name__} is closed: make a new one")

    def _is_idle(self) -> bool:
        """Every command carried out, all work done, every output handed on. The order of the questions counts."""
        return self._num_sent == self._num_done and not self._has_work() and not self._stepping

    def _send(self, command: Callable, *arguments: Any) -> None:
        with self._lock:
            self._num_sent += 1
        self._commands.put((command, arguments))

    # ---- the thread ----

    def _run(self) -> None:
        wait: float = 0.0  # seconds
        collections = WholeCollections()
        while not self._closed:
            try:
                collections.hold_back(not self._nothing_to_do())
                self._drain(None if self._nothing_to_do() else wait)
                wait = 0.0
                if not self._closed and not self._nothing_to_do():
                    collections.hold_back(True)
                    wait = self._advance()
            except BaseException as error:  # the run is over, the notebook and this thread are not
                self.error = error if self.error is None else self.error
                self._failed(error)
        collections.hold_back(False)
        self._ended()

    def _nothing_to_do(self) -> bool:
        return self.error is not None or not self._has_work() or (self._paused and not self._steps_allowed)

    def _drain(self, wait: float | None) -> None:
        """Run the commands that have come. Wait so many seconds for the first; None: until there is one."""
        while True:
            try:
                # One second at most: time to wait may be more than a lock's timeout can be.
                command, arguments = self._commands.get(wait != 0, None if wait is None else min(wait, 1.0))
            except queue.Empty:
                return
            wait = 0.0
            try:
                command(*arguments)
            finally:
                self._num_done += 1

    def _seconds_until_due(self) -> float:
        """How long the speed limit holds the next step back; 0 if it does not."""
        return max(0.0, self._next_due - time.perf_counter())

    def _count_step(self) -> None:
        """A step begins."""
        self._next_due = time.perf_counter() + self._interval
        if self._steps_allowed:
            self._steps_allowed -= 1

    def _set_paused(self, paused: bool) -> None:
        self._paused, self._steps_allowed = paused, 0

    def _allow_steps(self, count: int) -> None:
        self._paused = True
        self._steps_allowed += count

    def _set_interval(self, interval: float) -> None:
        self._interval, self._next_due = interval, 0.0


def _interval(steps_per_second: float | None) -> float:
    if steps_per_second is None:
        return 0.0
    if isinstance(steps_per_second, bool) or not isinstance(steps_per_second, (int, float)) or not steps_per_second > 0:
        raise ConfigError(f"the speed must be a number of steps a second above 0, or None for no limit, "
                          f"got {steps_per_second!r}")
    return 1.0 / steps_per_second if steps_per_second < 1e300 else 0.0
