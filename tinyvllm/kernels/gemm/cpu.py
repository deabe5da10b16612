"""The linear layer on the CPU: tiles (tile.py) over a packed weight (packing.py).

    out[t, n] = bf16( sum over k of x[t, k] * weight[n, k]  +  bias[n] )

With one token nothing can be reused, and reading the weight is all there is: a 1 x 4 tile reads four panels
side by side. With many, a pair of panels stays in the cache while all tokens pass by in groups of eight.
Threads share out the panels. Every tile forms each sum alike, so out[t, n] has the same bits whatever the
batch is, wherever the row stands in it and however many threads there are.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange

from tinyvllm.kernels.bf16 import narrow, widen
from tinyvllm.kernels.gemm.packing import PANEL
from tinyvllm.kernels.gemm.tile import STEP, make_tile, processor_has
from tinyvllm.kernels.jit import cpu_helper, cpu_jit, thread_count

__all__ = ["linear_cpu", "make_linear"]

# A second thread pays from some 30 microseconds of work on: so many multiply-adds, or so many weights from
# memory.
PARALLEL_WORK = 8 << 20
PARALLEL_WEIGHTS = 1 << 20


class Tiles(NamedTuple):
    """(rows, panels) of the tiles for one token, for up to `few` tokens, and for more."""

    one: tuple[int, int]
    few: tuple[int, int]
    many: tuple[int, int]


WIDE = Tiles(one=(1, 4), few=(4, 4), many=(8, 2))  # 32 vector registers of 512 bits
NARROW = Tiles(one=(1, 2), few=(4, 1), many=(4, 1))  # 16 of 256 bits, or 32 of 128


def make_linear(step, tiles: Tiles) -> Callable:
    """linear(out, x, weight, bias) with one kind of step."""
    tile_one, tile_few, tile_many = (make_tile(*shape, step) for shape in tiles)
    few_rows, many_rows = tiles.few[0], tiles.many[0]
    one_panels, few_panels, many_panels = (shape[1] for shape in tiles)
    sums_shape = max(rows for rows, _ in tiles), PANEL * max(panels for _, panels in tiles)

    @cpu_helper
    def store(out, sums, bias, row, num_rows, panel, num_panels):
        """Add the bias, round once, and leave the rows and columns that are past the end."""
        first = panel * PANEL
        for m in range(min(num_rows, out.shape[0] - row)):
            for n in range(min(num_panels * PANEL, out.shape[1] - first)):
                value = sums[m, n]
                if bias.shape[0]:
                    value += widen(bias[first + n])
                out[row + m, first + n] = narrow(value)

    @cpu_helper
    def linear_panels(out, x, weight, bias, first, last):
        """The outputs of panels first .. last."""
        sums = np.empty(sums_shape, np.float32)
        num_tokens = x.shape[0]
        if num_tokens == 1:
            for panel in range(first, last, one_panels):
                tile_one(sums, x, weight, 0, panel, 0, 0)
                store(out, sums, bias, 0, 1, panel, one_panels)
        elif num_tokens <= few_rows:
            for panel in range(first, last, few_panels):
                tile_few(sums, x, weight, 0, panel, 0, 0)
                store(out, sums, bias, 0, few_rows, panel, few_panels)
        else:
            for panel in range(first, last, many_panels):
                for row in range(0, num_tokens, many_rows):
                    tile_many(sums, x, weight, row, panel, 0, 0)
                    store(out, sums, bias, row, many_rows, panel, many_panels)

    @cpu_helper
    def with_zero_column(x):
        padded = np.empty((x.shape[0], x.shape[1] + 1), np.uint16)
        for t in range(x.shape[0]):
            for k in range(x.shape[1]):
                padded[t, k] = x[t, k]
            padded[t, x.shape[1]] = 0
        return padded

    @cpu_jit(parallel=True)
    def linear(out, x, weight, bias):
        """As linear_numpy, with the weight packed: uint16 [ceil(N / 16), ceil(K / 2), 32]."""
        num_panels = weight.shape[0]
        num_threads = thread_count()
        if x.shape[1] % 2:  # tiles read pairs (no model has an odd K: this need not be quick)
            linear_panels(out, with_zero_column(x), weight, bias, np.int64(0), num_panels)
        elif num_threads == 1 or (weight.size < PARALLEL_WEIGHTS
                                  and x.shape[0] * weight.size < PARALLEL_WORK):
            linear_panels(out, x, weight, bias, np.int64(0), num_panels)
        else:
            groups = (num_panels + one_panels - 1) // one_panels
            for i in prange(num_threads):
                thread = np.int64(i)  # prange counts in uint64: that would be one more function to compile
                linear_panels(out, x, weight, bias, groups * thread // num_threads * one_panels,
                              min(num_panels, groups * (thread + 1) // num_threads * one_panels))

    return linear


TILES = WIDE if processor_has("avx512f") else NARROW
linear_cpu = make_linear(STEP, TILES)
