"""The rows of an event as columns: what a step with 64 requests would otherwise make 130 tuples for.

    Rows(("a", "b"), (7, 3), (1, 1), (True, True))      is like      (("a", 7, 1, True), ("b", 3, 1, True))

Rows are made when somebody asks for them. Most events are never asked: whoever follows many steps works on the columns
(state_runs.py). And what is not made need not be looked through by Python's garbage collector, for which everybody
waits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Rows", "columns_of"]


class Rows(Sequence):
    """A tuple of rows, given by its columns: tuples of one length. Nobody may change them."""

    __slots__ = ("columns",)

    def __init__(self, *columns: tuple):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __iter__(self) -> Iterator[tuple]:
        return zip(*self.columns)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return (*zip(*(column[index] for column in self.columns)),)
        return tuple(column[index] for column in self.columns)

    def __eq__(self, other: object) -> bool:
        """As the tuple of its rows."""
        return isinstance(other, (Rows, tuple, list)) and [*self] == [*other]

    __hash__ = None

    def __repr__(self) -> str:
        return repr((*self,))


def columns_of(rows: Sequence) -> tuple[tuple, ...]:
    """The columns of any rows, of one length; none if there are no rows."""
    return rows.columns if type(rows) is Rows else (*zip(*rows),)
