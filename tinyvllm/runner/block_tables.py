"""The block tables of the rows of a step as one array, of which only what is new is written.

    requests of the step before   A B C D           array   A: 7 2 9
    of this one                   A C D E                   C: 4 5          rows move up, C has grown,
                                                            D: 1 . .        E's table is written whole
                                                            E: 8 3
"""

import numpy as np


class BlockTables:
    """max_rows tables of at most max_blocks blocks, on the host."""

    def __init__(self, max_rows: int, max_blocks: int, block_size: int):
        self.block_size = block_size
        self.array = np.zeros((max_rows, max_blocks), np.int32)  # row i: a request's blocks, then what nobody reads
        self._tables: list[list[int]] = []  # whose they are: a request's list is its own, and only grows
        self._written = np.zeros(max_rows, np.int32)  # of each, so many blocks are in the array
        self._rows = np.arange(max_rows)

    def slots(self, tables: list[list[int]], positions: np.ndarray) -> np.ndarray:
        """Where in the cache each row's position lies: int32 [rows]. Row i of `array` holds tables[i] afterwards, at
        least as far as that position.
        """
        count = len(tables)
        if tables is not self._tables:
            self._arrange(tables)
        numbers = positions // self.block_size
        for row in (numbers >= self._written[:count]).nonzero()[0].tolist():
            table, written = tables[row], self._written[row]
            self.array[row, written:len(table)] = table[written:]
            self._written[row] = len(table)
        return self.array[self._rows[:count], numbers] * self.block_size + (positions - numbers * self.block_size)

    def _arrange(self, tables: list[list[int]]) -> None:
        """Tables that stood in other rows move."""
        row_of = {id(table): row for row, table in enumerate(self._tables)}
        before = [row_of.get(id(table), -1) for table in tables]
        count, width = len(tables), int(self._written[:len(self._tables)].max(initial=0))
        self._tables = []  # what is interrupted here is written anew
        if before != list(range(count)):
            written = np.where(np.array(before) < 0, 0, self._written[before])
            self.array[:count, :width] = self.array[before, :width]
            self._written[:count] = written
        self._tables = tables
