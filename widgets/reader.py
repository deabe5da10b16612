"""One engine's events as a feed reads them: in order, none twice, and whole again after a gap."""

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import numpy as np

from tinyvllm.engine.events import Event
from tinyvllm.engine.history import PIECE, History
from tinyvllm.engine.state import EngineState


class Reader:
    """Follows a source's log and keeps the state, and the history behind it.

    source: a LiveEngine, a ReplayEngine or anything with `events`, `tell_again`, `now_ns`; or None: nothing to read.
    """

    def __init__(self, source: Any):
        self.source = source
        self.history = History()
        self.origin_ns: int | None = None  # the first event's time: the page's time zero
        self.num_gaps = 0
        self._next_seq = 0
        self._skip_to_config = False

    @property
    def state(self) -> EngineState:
        """The state after the last event that was read."""
        return self.history.state

    def read(self, breathe: Callable[[], None] = lambda: None) -> tuple[list[Event], list[Event], bool]:
        """(everything since the last time, what of it is new, whether that begins anew after a gap).

        What is told again because somebody else missed it, or records, is not new; what is new has been applied. After
        a gap, what is left of the log is of no use: the source is asked to tell its state again, and nothing counts
        until it has. breathe: called between small pieces of the work.
        """
        rows, gap = self.source.events.read_rows(self._next_seq)
        if gap:  # also if the log had moved on before the first look at it
            self.num_gaps += self._next_seq > 0
            self._skip_to_config = True
            self.source.tell_again()
        if rows:
            self._next_seq = rows[-1][0] + 1
        anew = self._skip_to_config
        if self._skip_to_config:
            first = next((i for i, row in enumerate(rows) if row[2] == "engine_config"), None)
            if first is None:
                return [], [], False
            rows, self._skip_to_config = rows[first:], False
        if rows and self.origin_ns is None:
            self.origin_ns = rows[0][1]
        events: list[Event] = []
        new: list[Event] = []
        for first in range(0, len(rows), PIECE):
            breathe()
            piece = [*map(Event._make, rows[first:first + PIECE])]
            events += piece
            new += self.history.extend(piece, breathe)
        return events, new, anew

    def ms(self, t_ns: int) -> float:
        """An event's time in the page's unit: milliseconds since the origin."""
        return (t_ns - (t_ns if self.origin_ns is None else self.origin_ns)) / 1e6

    def all_ms(self, times_ns: Sequence[int | None]) -> np.ndarray:
        """The same of many times: float64, NaN for None."""
        origin = self.origin_ns or 0
        return np.array([nan if t_ns is None else t_ns - origin for t_ns in times_ns], np.float64) / 1e6

    def state_at(self, ms: float) -> EngineState:
        """The state at a time in the page's unit."""
        return self.history.state_at(int((self.origin_ns or 0) + ms * 1e6))
