"""ReplayEngine: a recorded run behind LiveEngine's interface, so that every widget shows it as if it ran now.

No GPU, no model and no waiting for either: a class without hardware, homework, and tests that come out the same twice.
The recorded events are emitted again, at the distances at which they happened, with their own times and step numbers:

    Trace ──> pace: recorded distance / rate, at most so many steps a second ──> EventLog ──> widgets

While paused it stands between two steps, as an engine does. A step is everything from the first event that carries its
number (its scheduling: who is admitted, preempted, given blocks) to the last one before the next number comes up: the
run itself, its tokens, who ended, and who arrived before the next scheduling.
"""

import time
from bisect import bisect_left, bisect_right
from concurrent.futures import Future
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

from tinyvllm.engine.driver import Driver
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.trace import Trace, TraceError
from tinyvllm.errors import ConfigError, TinyVLLMError


class ReplayError(TinyVLLMError, RuntimeError):
    """Something was asked of a recorded run that only a running engine can do."""


class ReplayEngine(Driver):
    """Plays a trace from a background thread.

    trace: a Trace, or the path of one. events: the log to emit into (default: a new one that holds all of the trace).
    rate: how many times as fast as it was recorded; infinity: at once. steps_per_second: never more steps a second
    than that; None for no such limit. paused: show what there was before the first step, and wait.

    Raises TraceError for a trace without events, ConfigError for a rate or speed that cannot be.
    """

    kind = "replay"
    unfinished = "the replay has not come to its end"

    def __init__(self, trace: Trace | str | Path, *, events: EventLog | None = None, rate: float = 1.0,
                 steps_per_second: float | None = None, paused: bool = False):
        self.trace = trace if isinstance(trace, Trace) else Trace.load(trace)
        if not len(self.trace):
            raise TraceError("this trace holds no events: there is nothing to replay")
        recorded = self.trace.events
        # Twice its length: tell_again says up to all of it once more, and no reader must miss the beginning of that.
        super().__init__(EventLog(max(100_000, 2 * len(recorded))) if events is None else events,
                         steps_per_second, paused)
        self._rate = _checked_rate(rate)
        self._times = list(accumulate((event.t_ns for event in recorded), max))  # never backwards
        self._step_starts = [i for i, (a, b) in enumerate(pairwise(recorded), start=1) if b.step > a.step]
        self._next = 0  # index of the next event to emit
        self._stopped = False
        self._begin()
        self._thread.start()

    @property
    def rate(self) -> float:
        """How many times as fast as it was recorded."""
        return self._rate

    # ---- what a notebook asks for: each returns at once ----

    def set_rate(self, factor: float) -> None:
        """Play so many times as fast as it was recorded."""
        self._send(self._set_rate, _checked_rate(factor))

    def reset(self, **changes: Any) -> None:
        """From the beginning again; paused if it is paused now."""
        self._check_open()
        if changes:
            _refuse(f"reset cannot change {', '.join(changes)} in it. reset() plays it from the beginning")
        self._send(self._begin)

    def stop(self) -> None:
        """End the replay where it is. reset() begins again."""
        self._send(self._stop)

    # ---- what it is doing ----

    @property
    def state(self) -> str:
        """As of a LiveEngine; "idle" at the end, or after stop(), paused or not."""
        state = super().state
        return "idle" if state == "paused" and self._is_idle() else state

    @property
    def metadata(self) -> dict[str, Any]:
        """What the recorder said of the run."""
        return self.trace.metadata

    def now_ns(self) -> int:
        """The recorded time reached, in nanoseconds; never past an event that is still to come."""
        return int(min(self._reached(), self._times[min(self._next, len(self._times) - 1)]))

    def token_text(self, token_id: int) -> str | None:
        """What a token stands for, if the recording says so."""
        return self.metadata.get("vocabulary", {}).get(str(token_id))

    # ---- what only a running engine can do ----

    def add(self, *_, **__) -> NoReturn:
        _refuse("it takes no new prompt")

    def chat(self, *_, **__) -> NoReturn:
        _refuse("it takes no new message")

    def stream(self, *_, **__) -> NoReturn:
        _refuse("it takes no new prompt")

    def abort(self, *_, **__) -> NoReturn:
        _refuse("its requests ended as they ended. stop() ends the replay")

    def set_policy(self, *_, **__) -> NoReturn:
        _refuse("it was scheduled as it was scheduled")

    def on_output(self, *_, **__) -> NoReturn:
        _refuse("it computes no outputs. Read its `events`")

    def between_steps(self, *_, **__) -> Future:
        """A Future of the error that says so: there is no model to look into."""
        future: Future = Future()
        try:
            _refuse("there is no model in it to look into")
        except ReplayError as error:
            future.set_exception(error)
        return future

    # ---- the replay's thread ----

    def _has_work(self) -> bool:
        return not self._stopped and self._next < len(self._times)

    def _advance(self) -> float:
        number = bisect_left(self._step_starts, self._next)  # of the first step that has not begun
        if self._paused:  # and a step is asked for: all of it at once, with what came before it
            if wait := self._seconds_until_due():
                return wait
            self._emit_until(self._step_start(number + 1))
            self._stand()
            self._count_step()  # last: "paused" means that all of it is there
            return 0.0
        begins = self._next == self._step_start(number)
        wait = self._seconds_until_recorded()
        if wait := max(wait, self._seconds_until_due()) if begins else wait:
            return wait
        if begins:
            if self._interval:
                self._go_on(self._times[self._next])  # the limit may have held it back: no haste now to make up for it
            self._count_step()
        end = bisect_right(self._times, self._reached(), self._next)
        self._emit_until(max(self._next + 1, min(end, self._step_start(number + begins))))
        return 0.0

    def _step_start(self, number: int) -> int:
        """Index of the first event of a step, or where the trace ends."""
        return self._step_starts[number] if number < len(self._step_starts) else len(self._times)

    def _emit_until(self, end: int) -> None:
        self._emit(self._next, end)
        self._next = max(self._next, end)

    def _emit(self, begin: int, end: int) -> None:
        for event in self.trace.events[begin:end]:
            self.events.step = event.step
            self.events.emit_at(event.t_ns, event.kind, event.request_id, event.a, event.b)

    def _tell_again(self) -> None:
        if not self._next:
            return
        events = self.trace.events
        configs = (i for i in range(self._next - 1, -1, -1) if events[i].kind == "engine_config")
        begin = next(configs, 0)
        config = events[begin]
        self.events.step = config.step
        self.events.emit_at(config.t_ns, config.kind, None, config.a, self._next - begin - 1)
        self._emit(begin + 1, self._next)

    def _begin(self) -> None:
        self.error, self._stopped = None, False
        self._next = self._next_due = self._steps_allowed = 0
        self._go_on(self._times[0])
        if self._paused:
            self._emit_until(self._step_start(0))
            self._stand()

    def _stop(self) -> None:
        self._stand()
        self._stopped = True

    def _set_paused(self, paused: bool) -> None:
        if paused and not self._paused:
            self._finish_step()
            self._stand()
        elif self._paused and not paused and not self._stopped:
            self._go_on(self.now_ns())
        super()._set_paused(paused)

    def _allow_steps(self, count: int) -> None:
        if not self._paused:
            self._set_paused(True)
        super()._allow_steps(count)

    def _finish_step(self) -> None:
        """Emit what is left of the step in whose middle the replay is, but not what came after it."""
        end, limit = self._next, self._step_start(bisect_left(self._step_starts, self._next))
        while end < limit and not self._is_between_steps(end):
            end += 1
        self._emit_until(end)

    def _is_between_steps(self, index: int) -> bool:
        """Whether this event, which is not of a step's scheduling, came from outside: an arrival, an abort, a reset."""
        kind = self.trace.events[index].kind
        if kind == "blocks_freed" and index + 1 < len(self._times):  # whose end comes next
            index += 1
        event = self.trace.events[index]
        return kind in ("engine_config", "request_added") or (event.kind, event.a) == ("request_finished", "abort")

    # ---- its clock: (real time, recorded time at that moment, how fast it goes) ----

    def _reached(self) -> float:
        real_ns, recorded_ns, rate = self._clock
        return recorded_ns + max(1, time.perf_counter_ns() - real_ns) * rate  # 1: infinity times 0 is no number

    def _go_on(self, recorded_ns: int) -> None:
        self._clock = time.perf_counter_ns(), recorded_ns, self._rate

    def _stand(self) -> None:
        """The clock stops, at the last event that was emitted or at the time that was reached since."""
        reached = self.now_ns()
        self._clock = 0, max(reached, self._times[self._next - 1]) if self._next else reached, 0

    def _seconds_until_recorded(self) -> float:
        left_ns = self._times[self._next] - self._reached()
        return left_ns / 1e9 / self._rate if left_ns > 0 else 0.0

    def _set_rate(self, rate: float) -> None:
        reached, self._rate = self.now_ns(), rate
        if self._clock[2]:
            self._go_on(reached)

    def _set_interval(self, interval: float) -> None:
        super()._set_interval(interval)
        if self._clock[2]:
            self._go_on(self.now_ns())  # the old limit may have held it back


def _refuse(what: str) -> NoReturn:
    raise ReplayError(f"this is a recorded run: {what}. For a run that answers, use a LiveEngine")


def _checked_rate(rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ConfigError(f"the rate must be a number above 0 (1: as recorded, 2: twice as fast, infinity: at once), "
                          f"got {rate!r}")
    return rate
