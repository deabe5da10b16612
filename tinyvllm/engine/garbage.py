"""Python's garbage collector, kept from stopping a run.

Reference counts free nearly everything at once; the collector is for cycles. Now and then it goes through *all* objects
of the process, with every thread standing still, and a process that has compiled kernels has hundreds of thousands:
0.12 to 0.26 seconds were seen, in which hundreds of steps would have run. What triggers it is the number of objects
that came and stayed, and a run makes many: events, outputs. So while one is under way, only young objects are looked
through, which takes some milliseconds at most. And those that are no longer quite young, a tenth as often as usual:
of a thousand steps a second one in fifty would be 0.3 ms longer. Where a device computes, Python waits for it most of
the time, and looks through the young ones then. Afterwards all is as it was.

    with no_whole_collections():
        while engine.has_unfinished_requests():
            engine.step()
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["WholeCollections", "collect_young", "no_whole_collections"]

MIDDLE = 100  # collections of the youngest generation to each of the middle one
RARELY = 1_000_000  # and of the middle one to each of all: hours
MANY = 350  # objects that have come and stayed: half of what makes Python collect

_lock = threading.Lock()
_holders = 0
_before: tuple[int, int, int] | None = None  # the thresholds that were, while somebody holds


class WholeCollections:
    """One who may hold them back. As soon as nobody does, they come as before. Any thread may call."""

    def __init__(self):
        self._holds = False

    def hold_back(self, hold: bool) -> None:
        """Hold them back, or let them go; once is enough for either."""
        global _holders, _before
        with _lock:
            if hold == self._holds:
                return
            self._holds = hold
            _holders += 1 if hold else -1
            if hold and _holders == 1:
                _before = gc.get_threshold()
                gc.set_threshold(_before[0], *_while_held(_before))
            elif not hold and not _holders:
                first, *others = gc.get_threshold()
                gc.set_threshold(first, *(was if now == held else now  # what somebody else has set since stays
                                          for now, held, was in zip(others, _while_held(_before), _before[1:])))
                _before = None


def _while_held(thresholds: tuple[int, int, int]) -> tuple[int, int]:
    """The last two thresholds while somebody holds."""
    return max(MIDDLE, thresholds[1]), max(RARELY, thresholds[2])


def collect_young() -> None:
    """Look through the objects that have come lately, if they are many and somebody holds the others back.

    For a moment at which Python has nothing to do: it waits for a device. Then nobody has to wait for a collection.
    """
    if _holders and gc.get_count()[0] >= MANY:
        gc.collect(1)


@contextlib.contextmanager
def no_whole_collections() -> Iterator[None]:
    """Hold them back for a while."""
    holder = WholeCollections()
    holder.hold_back(True)
    try:
        yield
    finally:
        holder.hold_back(False)
