"""History: what a run was like at any moment since, for whoever scrubs back while it goes on.

    chapters   | state, events ......... | state, events ......... | state, events ...      <── now
                 a copy of the state, and what happened after it

The state at a moment is the copy before it, with the events in between applied: a few milliseconds, however long the
run. The oldest chapter goes when there are too many events.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import itemgetter

from tinyvllm.engine.events import KINDS, Event
from tinyvllm.engine.state import EngineState
from tinyvllm.engine.state_records import RequestState
from tinyvllm.errors import TinyVLLMError

_KINDS = frozenset(KINDS)
CHAPTER_WORK = 60_000  # events, rows of batches, tokens: as many as are applied anew in a few milliseconds
KEPT_WORK = 66 * CHAPTER_WORK  # some 400 MB: with 8 requests at a time more than `capacity`, with 256 some 5,000 steps
PIECE = 128  # events that are applied in one go: larger pieces are no quicker

_time = itemgetter(1)


class HistoryError(TinyVLLMError, LookupError):
    """A step that this history does not hold."""


@dataclass
class _Chapter:
    state: EngineState  # before the first event; never changed, but for tokens that have come since
    num_tokens: dict[str, int]  # of those that had not ended: how many tokens there were
    first: int  # number of its first event, counted from the beginning of the history
    start_ns: int  # the time reached before its first event
    events: list[Event] = field(default_factory=list)
    old: set[int] = field(default_factory=set)  # numbers, in here, of those that said nothing new
    times: list[int] = field(default_factory=list)  # the time reached with each: it never goes backwards
    work: int = 0


class History:
    """Keeps at least the newest `capacity` events, unless they are of so large batches that they are more than
    kept_work. One thread applies them; any may ask.

    `state` is the present one, and must not be changed. What is told again because some reader missed it adds
    nothing. If a recorded run begins again, its history does too.
    """

    def __init__(self, capacity: int = 200_000, chapter_work: int = CHAPTER_WORK, kept_work: int = KEPT_WORK):
        self.capacity, self.kept_work = capacity, kept_work
        self.chapter_work = chapter_work
        self.state = EngineState()
        self._lock = threading.Lock()
        self._begin_anew(0)

    def apply(self, event: Event) -> bool:
        """Take in the next event; False if it said nothing new. Raises ValueError for an unknown kind."""
        return bool(self.extend([event]))

    def extend(self, events: Iterable[Event], breathe: Callable[[], None] = lambda: None) -> list[Event]:
        """Take in the next events; those that said something new. Raises ValueError at an unknown kind.

        breathe: called between pieces of the work.
        """
        events = [*events]
        known = next((i for i, event in enumerate(events) if event[2] not in _KINDS), len(events))
        new: list[Event] = []
        with self._lock:
            for first in range(0, known, PIECE):
                breathe()
                new += self._extend(events[first:min(known, first + PIECE)], breathe)
            if known < len(events):
                self.state.apply(events[known])  # says what is wrong
        return new

    def _extend(self, events: list[Event], breathe: Callable[[], None]) -> list[Event]:
        """Take in a few events, of which none ends a chapter but the last."""
        is_config = any(event[2] == "engine_config" for event in events)
        if is_config and len(events) > 1:  # with it a history may begin anew
            return [event for event in events if self._extend([event], breathe)]
        new = self.state.apply_all(events, breathe)
        breathe()
        if is_config and new:
            if new[0].t_ns < self._newest_ns:
                self._begin_anew(new[0].t_ns)
            self._run_begins = self._num_events  # step numbers begin again
        chapter = self._chapters[-1]
        if len(new) < len(events):
            are_new = {*map(id, new)}
            chapter.old.update(i for i, event in enumerate(events, len(chapter.events)) if id(event) not in are_new)
        chapter.events += events
        chapter.times += islice(accumulate(map(_time, events), max, initial=self._newest_ns), 1, None)
        chapter.work += (len(events) + sum([len(event[5]) for event in events if event[2] == "tokens"])
                         + 2 * sum([len(event[6]) for event in events if event[2] == "step_begun"]))  # and once ended
        self._newest_ns = chapter.times[-1]
        self._num_events += len(events)
        del self._leaving[-4 * len(events):]
        if chapter.work >= self.chapter_work:
            breathe()
            self._chapters.append(self._chapter(self.state))
            while self._chapters[1].first <= self._num_events - self.capacity or (
                    sum(chapter.work for chapter in self._chapters) - self._chapters[0].work >= self.kept_work):
                self._leaving += self._chapters.popleft().events
        return new

    def state_at(self, t_ns: int) -> EngineState:
        """The state at that time; at a time before the first event that is kept, the oldest state known."""
        with self._lock:
            chapter = next((c for c in reversed(self._chapters) if c.start_ns <= t_ns), self._chapters[0])
            events = chapter.events[:bisect_right(chapter.times, t_ns)]
        return _later(chapter, events)

    def state_at_step(self, step: int) -> EngineState:
        """The state after that step, with what came before the scheduling of the next. Raises HistoryError."""
        with self._lock:
            found = next(((chapter, i) for chapter, i, event in self._newest_first() if event[3] == step), None)
            if found is None:
                raise HistoryError(f"step {step!r} is not in the history: {self._describe_steps()}")
            chapter, last = found
            events = chapter.events[:last + 1]
        return _later(chapter, events)

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
            return self._steps()

    def __len__(self) -> int:
        """Number of events that are kept."""
        return self._num_events - self._chapters[0].first

    def _begin_anew(self, t_ns: int) -> None:
        self._num_events = 0
        self._newest_ns = t_ns
        self._run_begins = 0  # number of the event that the present run begins with
        self._leaving: list[Event] = []  # of chapters that are gone: to free them all at once would take milliseconds
        self._chapters: deque[_Chapter] = deque([self._chapter(EngineState())])

    def _chapter(self, state: EngineState) -> _Chapter:
        """A chapter that begins now. Tokens are not copied: their lists only grow, and how long they were is enough."""
        num_tokens = {name: len(request.token_ids) for name, request in state.unfinished.items()}
        return _Chapter(state.clone(RequestState.clone_but_tokens), num_tokens, self._num_events, self._newest_ns)

    def _newest_first(self) -> Iterator[tuple[_Chapter, int, Event]]:
        """(chapter, number in it, event) of all that said something new in the present run."""
        for chapter in reversed(self._chapters):
            for i in range(len(chapter.events) - 1, max(0, self._run_begins - chapter.first) - 1, -1):
                if i not in chapter.old:
                    yield chapter, i, chapter.events[i]

    def _steps(self) -> tuple[int, int] | None:
        known = {event[3] for _, _, event in self._newest_first()}
        return (min(known), max(known)) if known else None

    def _describe_steps(self) -> str:
        known = self._steps()
        return f"it holds steps {known[0]} to {known[1]}" if known else "it holds none"


def _later(chapter: _Chapter, events: list[Event]) -> EngineState:
    """A chapter's state with these of its events applied."""
    state = chapter.state.clone()
    for name, num_tokens in chapter.num_tokens.items():
        request = state.unfinished[name]
        del request.token_ids[num_tokens:], request.token_ns[num_tokens:]
    state.apply_all(events)
    return state
