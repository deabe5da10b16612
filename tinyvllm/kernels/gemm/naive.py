"""GEMM, step 1: one thread an output element.

    out[t, n] = sum over k of x[t, k] * weight[n, k]

Right, and slow: every thread reads its whole row of x and its whole row of weight from memory, so each
element of x is read N times and each weight T times. The threads of a warp share a row of x (one load serves
all 32), but their weights lie K elements apart, so each 2-byte load drags in a 32-byte sector. Per
multiply-add the kernel asks for 4 bytes; the hardware can do over a hundred in the time that takes. Step 2
(tiled.py) reads each value once a tile instead.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import array_or_empty, ceil_div, cuda, kernel
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["linear_naive_cuda"]

BLOCK_ROWS, BLOCK_COLUMNS = 8, 32


@kernel
def _naive_kernel(out, x, weight, bias):
    column, row = cuda.grid(2)  # columns along threadIdx.x, so that a warp writes neighbours
    if row < out.shape[0] and column < out.shape[1]:
        total = np.float32(0)
        for k in range(x.shape[1]):
            total += widen_cuda(x[row, k]) * widen_cuda(weight[column, k])
        if bias.shape[0] > 0:
            total += widen_cuda(bias[column])
        out[row, column] = narrow_cuda(total)


def linear_naive_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays; any shape."""
    grid = ceil_div(out.shape[1], BLOCK_COLUMNS), ceil_div(out.shape[0], BLOCK_ROWS)
    _naive_kernel[grid, (BLOCK_COLUMNS, BLOCK_ROWS)](out, x, weight, array_or_empty(bias))
