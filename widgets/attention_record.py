"""What is remembered of one request's attention: thumbnails of every head, and full rows of the heads in focus.

It outlives the request, the page and the engine's cache, so that a map can still be shown when its blocks have long
been given to somebody else. One byte a weight: round(255 * weight).

    thumbnails   uint8 [layers * heads, SIDE, SIDE]   a pixel: the largest weight of f x f tokens, f = extent / SIDE
    full rows    of a head: row p is uint8 [p + 1]    what comes after the row's own token is 0 and is not stored
"""

from collections import OrderedDict

import numpy as np

SIDE = 64  # pixels of a thumbnail, both ways
KEPT_HEADS = 12  # heads whose full rows are remembered, the last ones looked at


class AttentionRecord:
    """Rows of one request, as they come. Positions may come in any order, and twice."""

    def __init__(self, num_layers: int, num_heads: int, num_kv_heads: int):
        self.num_layers, self.num_heads, self.num_kv_heads = num_layers, num_heads, num_kv_heads
        self.extent = SIDE  # tokens that a thumbnail covers: SIDE, 2 * SIDE, 4 * SIDE, ...
        self.thumbnails = np.zeros((num_layers * num_heads, SIDE, SIDE), np.uint8)
        self.has_row = np.zeros(SIDE, bool)  # [extent]: positions that are in the thumbnails
        self._full: OrderedDict[tuple[int, int], dict[int, np.ndarray]] = OrderedDict()

    @property
    def num_rows(self) -> int:
        return int(self.has_row.sum())

    def add(self, positions: np.ndarray, pooled: np.ndarray, context: int) -> set[int]:
        """Take in rows of all heads; returns the thumbnails' rows that changed.

        positions: int [R]; pooled: uint8 [layers, heads, R, W], W columns that share `context` tokens as
        Probe.attention_uint8 does it. A column that straddles two pixels counts in both: with W = context, never.
        """
        while self.extent < context:
            self._double()
        tokens_each = self.extent // SIDE
        width = pooled.shape[3]
        columns = np.arange(width + 1) * context // width  # column c covers tokens columns[c] .. columns[c + 1] - 1
        first, last = columns[:-1] // tokens_each, (columns[1:] - 1) // tokens_each
        pixels = np.arange(last[-1] + 1)
        rows = pooled.reshape(-1, *pooled.shape[2:])
        # Pixel i: the largest of columns begin[i] .. end[i] - 1, in one go; what lies between two pixels is dropped.
        bounds = np.stack([np.searchsorted(last, pixels), np.searchsorted(first, pixels, side="right")], axis=1)
        padded = np.zeros((*rows.shape[:2], width + 1), np.uint8)  # an end may be one behind the last column
        padded[:, :, :width] = rows
        small = np.maximum.reduceat(padded, bounds.ravel(), axis=2)[:, :, ::2]
        for i, position in enumerate(positions.tolist()):
            row = self.thumbnails[:, position // tokens_each, :len(pixels)]
            np.maximum(row, small[:, i], out=row)
            self.has_row[position] = True
        return {position // tokens_each for position in positions.tolist()}

    def add_full(self, layer: int, head: int, positions: np.ndarray, rows: np.ndarray) -> None:
        """Take in full rows of one head: uint8 [R, at least position + 1]."""
        known = self._rows(layer, head)
        for position, row in zip(positions.tolist(), rows):
            known[position] = row[:position + 1].copy()

    def full(self, layer: int, head: int) -> dict[int, np.ndarray]:
        """Position -> uint8 [position + 1] of one head, as far as it is there."""
        return self._rows(layer, head)

    def missing(self, layer: int, head: int) -> np.ndarray:
        """Positions that are in the thumbnails and not among this head's full rows, ascending."""
        known = self._full.get((layer, head), {})
        return np.array([p for p in np.flatnonzero(self.has_row).tolist() if p not in known], np.int64)

    def _rows(self, layer: int, head: int) -> dict[int, np.ndarray]:
        rows = self._full.setdefault((layer, head), {})
        self._full.move_to_end((layer, head))
        while len(self._full) > KEPT_HEADS:
            self._full.popitem(last=False)
        return rows

    def _double(self) -> None:
        """Twice the tokens: four pixels become one, the largest of them."""
        pixels, half = self.thumbnails, SIDE // 2
        rows = np.maximum(pixels[:, ::2], pixels[:, 1::2])  # thirty times as fast as one max over two axes
        small = np.maximum(rows[:, :, ::2], rows[:, :, 1::2])
        pixels[:, half:] = 0
        pixels[:, :half, half:] = 0
        pixels[:, :half, :half] = small
        self.has_row = np.concatenate([self.has_row, np.zeros(self.extent, bool)])
        self.extent *= 2


def ranges(positions: np.ndarray) -> list[list[int]]:
    """[[first, last], ...] of ascending positions: [0, 1, 2, 5] -> [[0, 2], [5, 5]]."""
    if not len(positions):
        return []
    ends = np.flatnonzero(np.diff(positions) > 1)
    firsts = np.concatenate([positions[:1], positions[ends + 1]])
    lasts = np.concatenate([positions[ends], positions[-1:]])
    return np.stack([firsts, lasts], axis=1).tolist()
