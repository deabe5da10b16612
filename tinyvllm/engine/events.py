"""What the engine tells the world: small numbered events, one way, never back.

    (sequence number, t_ns, kind, step, request_id, a, b)

`a` and `b` depend on the kind (the table below). Events are plain tuples of numbers, strings and lists, so that a trace
is a file of them and a widget needs nothing else. Rows, which may be many, are kept as columns and read as tuples
(event_rows.py): of millions of small objects Python's garbage collector would hold everybody up for a fifth of a second
at a time. The engine emits events only while somebody listens: without an EventLog it spends one comparison with None
on each.

| kind | request_id | a | b |
|---|---|---|---|
| engine_config | - | {option: value}: everything begins anew | only told again: in so many events that follow |
| policy_changed | - | {option: value} of those that changed | - |
| request_added | yes | [token id, ...] of the prompt, or only how many | most tokens it may have |
| request_scheduled | yes | tokens found in the prefix cache; told again: [that, computed ones] | preemptions so far |
| request_preempted | yes | tokens that had been computed | - |
| request_finished | yes | finish reason | output tokens |
| step_begun | - | tokens in the step | ((request_id, start, count, sampled), ...), decodes first |
| step_ended | - | nanoseconds the runner took | - |
| step_failed | - | the error | - |
| blocks_allocated | yes | [block_id, ...], fresh ones | - |
| blocks_shared | yes | [block_id, ...], found in the prefix cache | - |
| block_cached | yes | block_id, full and findable from now on; told again: [block_id, ...] | number in the request |
| blocks_evicted | - | [block_id, ...], no longer findable | - |
| blocks_freed | yes | [block_id, ...], let go by this request | - |
| tokens | - | ((request_id, token id, its text as far as it is whole), ...) | told again: [its t_ns, ...] |
| step_profiled | - | [[operation, layer or -1, nanoseconds, bytes, flops], ...] | {what was measured how} |
"""

from collections import deque
from itertools import islice
from time import perf_counter_ns
from typing import Any, NamedTuple

KINDS = ("engine_config", "policy_changed", "request_added", "request_scheduled", "request_preempted",
         "request_finished", "step_begun", "step_ended", "step_failed", "blocks_allocated", "blocks_shared",
         "block_cached", "blocks_evicted", "blocks_freed", "tokens", "step_profiled")


class Event(NamedTuple):
    """One thing that happened. seq counts up by one; t_ns is time.perf_counter_ns()."""

    seq: int
    t_ns: int
    kind: str
    step: int
    request_id: str | None
    a: Any
    b: Any


class EventLog:
    """A bounded log: the newest `capacity` events. One writer, the engine; any number of readers.

    A reader remembers the next sequence number that it wants. If the log has moved on past it, `read` says so, and
    the reader asks for a snapshot instead of guessing what it missed.
    """

    def __init__(self, capacity: int = 100_000):
        self._events: deque[tuple] = deque(maxlen=capacity)
        self.next_seq = 0
        self.step = 0  # set by the engine; carried by every event

    def emit(self, kind: str, request_id: str | None = None, a: Any = None, b: Any = None) -> None:
        """Append an event. `a` and `b` must not be changed afterwards by whoever made them."""
        self.emit_at(perf_counter_ns(), kind, request_id, a, b)

    def emit_at(self, t_ns: int, kind: str, request_id: str | None = None, a: Any = None, b: Any = None) -> None:
        """Append an event that happened at another time than now: one of a recording."""
        # No lock: there is one writer, and appending to a deque is one indivisible step.
        self._events.append((self.next_seq, t_ns, kind, self.step, request_id, a, b))
        self.next_seq += 1

    def make_room(self, count: int) -> None:
        """Hold at least so many events from now on."""
        if count > self._events.maxlen:
            self._events = deque(self._events, maxlen=count)

    def read(self, since: int = 0) -> tuple[list[Event], bool]:
        """Events from sequence number `since` on, and whether some of them are gone already (a gap)."""
        rows, gap = self.read_rows(since)
        return [*map(Event._make, rows)], gap

    def read_rows(self, since: int = 0) -> tuple[list[tuple], bool]:
        """The same as plain tuples: quicker, for who makes events of a few at a time (Event._make)."""
        newest_first: list[tuple] = []
        while True:
            # From the right: a reader that keeps up wants a handful out of many. A few more than there seem to be,
            # for the writer goes on; and in one go, which no other thread interrupts: a busy one would for ever.
            wanted = self.next_seq - since + 16
            try:
                newest_first = list(islice(reversed(self._events), max(0, wanted)))
            except RuntimeError:  # interrupted all the same: a Python without the global lock
                continue
            if len(newest_first) < wanted or newest_first[-1][0] <= since:
                break
        while newest_first and newest_first[-1][0] < since:
            newest_first.pop()
        newest_first.reverse()
        return newest_first, bool(newest_first) and newest_first[0][0] > since

    def __len__(self) -> int:
        return len(self._events)
