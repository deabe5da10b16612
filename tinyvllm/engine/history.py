"""History: what a run was like at any moment since, for whoever scrubs back while it goes on.

    chapters   | state, events ......... | state, events ......... | state, events ...      <── now
                 a copy of the state, and what happened after it

The state at a moment is the copy before it, with the events in between applied: a few milliseconds, however long the
run. The oldest chapter goes when there are too many events.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from tinyvllm.errors import TinyVLLMError

CHAPTER_WORK = 20_000  # events, rows of batches, tokens: as many as are applied anew in a few milliseconds


class HistoryError(TinyVLLMError, LookupError):
    """A step that this history does not hold."""


@dataclass
class _Chapter:
    state: EngineState  # before the first event; never changed
    first: int  # number of its first event, counted from the beginning of the history
    start_ns: int  # the time reached before its first event
    events: list[Event] = field(default_factory=list)
    times: list[int] = field(default_factory=list)  # the time reached with each: it never goes backwards
    work: int = 0


class History:
    """Keeps at least the newest `capacity` events. One thread applies them; any may ask.

    `state` is the present one, and must not be changed. What is told again because some reader missed it adds
    nothing. If a recorded run begins again, its history does too.
    """

    def __init__(self, capacity: int = 200_000, chapter_work: int = CHAPTER_WORK):
        self.capacity = capacity
        self.chapter_work = chapter_work
        self.state = EngineState()
        self._lock = threading.Lock()
        self._begin_anew(0)

    def apply(self, event: Event) -> bool:
        """Take in the next event; False if it said nothing new. Raises ValueError for an unknown kind."""
        return bool(self.extend([event]))

    def extend(self, events: Iterable[Event]) -> list[Event]:
        """Take in the next events; those that said something new. Raises ValueError at an unknown kind."""
        new: list[Event] = []
        apply, chapter = self.state.apply, self._chapters[-1]
        with self._lock:
            for event in events:
                _, t_ns, kind, step, _, a, b = event
                is_new = apply(event)
                if is_new and kind == "engine_config":
                    self._step_ends.clear()  # their numbers begin again
                    if t_ns < self._newest_ns:
                        self._begin_anew(t_ns)
                        chapter = self._chapters[-1]
                if t_ns > self._newest_ns:
                    self._newest_ns = t_ns
                self._num_events += 1
                chapter.events.append(event)
                chapter.times.append(self._newest_ns)
                if kind == "step_begun":
                    chapter.work += 1 + 2 * len(b)  # once more when it ends
                else:
                    chapter.work += 1 + len(a) if kind == "tokens" else 1
                if is_new:
                    self._step_ends[step] = self._num_events
                    new.append(event)
                if chapter.work >= self.chapter_work:
                    chapter = _Chapter(_frozen(self.state), self._num_events, self._newest_ns)
                    self._chapters.append(chapter)
                    self._forget()
        return new

    def state_at(self, t_ns: int) -> EngineState:
        """The state at that time; at a time before the first event that is kept, the oldest state known."""
        with self._lock:
            chapter = next((c for c in reversed(self._chapters) if c.start_ns <= t_ns), self._chapters[0])
            events = chapter.events[:bisect_right(chapter.times, t_ns)]
        return _later(chapter.state, events)

    def state_at_step(self, step: int) -> EngineState:
        """The state after that step, with what came before the scheduling of the next. Raises HistoryError."""
        with self._lock:
            end = self._step_ends.get(step)
            if end is None:
                raise HistoryError(f"step {step!r} is not in the history: {self._describe_steps()}")
            chapter = next(c for c in reversed(self._chapters) if c.first < end)
            events = chapter.events[:end - chapter.first]
        return _later(chapter.state, events)

    @property
    def span_ns(self) -> tuple[int, int]:
        """(first, last): the times between which the state is known."""
        with self._lock:
            first = self._chapters[0]
            return first.times[0] if first.times else first.start_ns, self._newest_ns

    @property
    def steps(self) -> tuple[int, int] | None:
        """(first, last): numbers of the steps that are kept, of the present run; None if there are none."""
        with self._lock:
            return (min(self._step_ends), max(self._step_ends)) if self._step_ends else None

    def __len__(self) -> int:
        """Number of events that are kept."""
        return self._num_events - self._chapters[0].first

    def _begin_anew(self, t_ns: int) -> None:
        self._num_events = 0
        self._newest_ns = t_ns
        self._step_ends: dict[int, int] = {}  # step -> number of events up to its last one
        self._chapters: deque[_Chapter] = deque([_Chapter(EngineState(), 0, t_ns)])

    def _forget(self) -> None:
        while self._chapters[1].first <= self._num_events - self.capacity:
            first = self._chapters.popleft()
            for step in {event.step for event in first.events}:
                if self._step_ends.get(step, self._num_events) <= self._chapters[0].first:
                    del self._step_ends[step]

    def _describe_steps(self) -> str:
        known = self._step_ends
        return f"it holds steps {min(known)} to {max(known)}" if known else "it holds none"


def _frozen(state: EngineState) -> EngineState:
    """A copy to keep, which may only be cloned: its longest lists are tuples, no work for the garbage collector."""
    state = state.clone()
    for request in state.unfinished.values():
        request.token_ids, request.token_ns = tuple(request.token_ids), tuple(request.token_ns)
    return state


def _later(state: EngineState, events: list[Event]) -> EngineState:
    state = state.clone()
    for event in events:
        state.apply(event)
    return state
