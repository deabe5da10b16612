"""Attention weights made small enough to send: the largest of each group of columns, as one byte.

    out[n, c] = floor(255 * max(weights[n, first .. last]) + 0.5)
    first = c * C // W,   last = (c + 1) * C // W - 1            C columns of weights -> W of `out`, W at most C

The largest, not the mean: a head that looks at one token of a thousand must stay visible in a thumbnail. With
W = C nothing is pooled, only rounded. A weight of NaN, which a broken model can give, becomes 255. The product is
exact in float64, so that every backend rounds alike.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit

__all__ = ["pool_uint8_numpy", "pool_uint8_cpu", "pool_uint8_cuda"]


def pool_uint8_numpy(out, weights):
    """out uint8 [N, W] from weights float32 [N, C], C at least W, all between 0 and 1."""
    columns, width = weights.shape[1], out.shape[1]
    for c in range(width):
        largest = weights[:, c * columns // width : (c + 1) * columns // width].max(axis=1)
        out[:, c] = np.where(np.isnan(largest), 255, np.floor(largest * np.float64(255) + 0.5))


@cpu_jit
def pool_uint8_cpu(out, weights):
    """As pool_uint8_numpy."""
    columns, width = weights.shape[1], out.shape[1]
    for n in range(out.shape[0]):
        for c in range(width):
            largest = np.float32(0)
            for column in range(c * columns // width, (c + 1) * columns // width):
                if not weights[n, column] <= largest:  # so that NaN is taken, and kept
                    largest = weights[n, column]
                if largest != largest:
                    break
            out[n, c] = 255 if largest != largest else np.uint8(largest * np.float64(255) + 0.5)


@kernel
def _pool_uint8_kernel(out, weights):
    """One thread an element of `out`."""
    n, c = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    columns, width = weights.shape[1], out.shape[1]
    if c < width:
        largest, broken = np.float32(0), False
        for column in range(c * columns // width, (c + 1) * columns // width):
            value = weights[n, column]
            broken = broken or value != value
            largest = max(largest, value)
        out[n, c] = 255 if broken else int(np.float64(largest) * 255.0 + 0.5)


def pool_uint8_cuda(out, weights):
    """As pool_uint8_numpy, on device arrays."""
    if out.size:
        _pool_uint8_kernel[row_grid(*out.shape)](out, weights)
