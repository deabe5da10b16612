"""The CPU's layout of a linear weight: panels of 16 outputs, in which two neighbouring k stand together.

    weight[n, k]  ->  packed[n // 16, k // 2, 2 * (n % 16) + k % 2]    uint16 [ceil(N / 16), ceil(K / 2), 32]

    panel p, pair j:  | W[16p, 2j] W[16p, 2j+1] | W[16p+1, 2j] W[16p+1, 2j+1] | ... | W[16p+15, 2j] ...
                        lane 0                    lane 1                              lane 15
                      '------------------------- 64 bytes: one vector register -----------------------'

One load brings what 16 outputs need for two steps of k, and going on along k goes on in memory: a decode
step, which is nothing but reading weights, reads them in one long sweep. The pairs are what the processor's
bf16 dot-product instruction takes; a processor without it separates them by a shift and a mask (see cpu.py).

An odd K is padded with a zero. Rows past N in the last panel are zero from `pack_linear`; kernels never look
at them.
"""

import numpy as np
from numba import prange

from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.threads import KERNEL_LOCK, configure_threads

__all__ = ["PANEL", "packed_shape", "packed_place", "pack_linear", "pack_rows", "unpack_linear"]

PANEL = 16  # outputs in a panel: float32 lanes of a 512-bit register


def packed_shape(num_rows: int, num_columns: int) -> tuple[int, int, int]:
    """Shape of the packed form of a [num_rows, num_columns] weight."""
    return -(-num_rows // PANEL), -(-num_columns // 2), 2 * PANEL


def packed_place(row, column):
    """Index of weight[row, column] in its packed form; whole arrays of indices may be given."""
    return row // PANEL, column // 2, 2 * (row % PANEL) + column % 2


def pack_linear(weight: np.ndarray) -> np.ndarray:
    """weight uint16 [N, K] (bf16 bits) -> packed uint16 [ceil(N/16), ceil(K/2), 32]."""
    packed = np.zeros(packed_shape(*weight.shape), np.uint16)
    pack_rows(packed, 0, weight)
    return packed


def pack_rows(packed: np.ndarray, row_offset: int, rows: np.ndarray) -> None:
    """Write rows uint16 [n, K] of a weight into its packed form, as rows row_offset .. row_offset + n.

    A loader calls this once a tensor, in any order: only the lanes of these rows are written.
    Raises ValueError when the rows do not fit.
    """
    panels, pairs, width = packed.shape
    if width != 2 * PANEL or rows.ndim != 2 or -(-rows.shape[1] // 2) != pairs:
        raise ValueError(f"rows of shape {rows.shape} do not belong in a packed weight of shape "
                         f"{packed.shape}")
    if row_offset < 0 or row_offset + rows.shape[0] > panels * PANEL:
        raise ValueError(f"rows {row_offset} to {row_offset + rows.shape[0]} are not all within the "
                         f"{panels * PANEL} rows of the packed weight")
    if packed.dtype != np.uint16 or rows.dtype != np.uint16:
        raise TypeError(f"bfloat16 bits are uint16 arrays, got {packed.dtype} and {rows.dtype}")
    if rows.shape[0] and rows.shape[1]:
        with KERNEL_LOCK:
            configure_threads()
            _pack_rows(packed, row_offset, np.require(rows, requirements=["C", "A"]))


@cpu_jit(parallel=True)
def _pack_rows(packed, row_offset, rows):
    num_rows, num_columns = rows.shape
    first_panel = row_offset // PANEL
    last_panel = (row_offset + num_rows - 1) // PANEL
    for panel in prange(first_panel, last_panel + 1):
        first = max(0, panel * PANEL - row_offset)
        last = min(num_rows, (panel + 1) * PANEL - row_offset)
        for row in range(first, last):
            lane = 2 * (row_offset + row - panel * PANEL)
            for pair in range(num_columns // 2):
                packed[panel, pair, lane] = rows[row, 2 * pair]
                packed[panel, pair, lane + 1] = rows[row, 2 * pair + 1]
            if num_columns % 2:
                packed[panel, num_columns // 2, lane] = rows[row, num_columns - 1]
                packed[panel, num_columns // 2, lane + 1] = 0


def unpack_linear(packed: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """packed uint16 [ceil(N/16), ceil(K/2), 32] -> weight uint16 [num_rows, num_columns]. For reading."""
    panels, pairs, _ = packed.shape
    weight = packed.reshape(panels, pairs, PANEL, 2).transpose(0, 2, 1, 3).reshape(panels * PANEL, 2 * pairs)
    return np.ascontiguousarray(weight[:num_rows, :num_columns])
