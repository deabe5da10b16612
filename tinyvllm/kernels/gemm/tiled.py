"""GEMM, step 2: tiles in shared memory.

A block owns a 16 x 16 tile of the output and walks along k in steps of 16. In each step its 256 threads fetch
a 16 x 16 tile of x and one of weight into shared memory, wait for each other, and then every thread uses 16
values of each, all of which some neighbour fetched. Each value is read from memory once a tile instead of
once an output: 16 times less traffic. It also turns the awkward access of step 1 into a friendly one: the
fetch runs along rows, where neighbours in memory are neighbours in the warp.

    for k0 in 0, 16, 32, ...:              x[16 rows, k0 : k0 + 16]  @  weight[16 rows, k0 : k0 + 16].T
        fetch both tiles | barrier | multiply | barrier

The two barriers have different jobs: the first, that a tile is complete before anyone reads it; the second,
that all have read it before anyone overwrites it. The weight tile has a 17th column, so that the 16 threads
that read down a column hit 16 different banks of shared memory.

Still, each multiply-add costs two reads of shared memory, and that is now the limit. Step 3 (tensor_core.py)
hands whole tiles to the tensor cores.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import array_or_empty, ceil_div, cuda, kernel
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["linear_tiled_cuda"]

TILE = 16
PADDED = TILE + 1  # numba wants the size of a shared array as one constant


@kernel
def _tiled_kernel(out, x, weight, bias):
    x_tile = cuda.shared.array((TILE, TILE), np.float32)
    weight_tile = cuda.shared.array((TILE, PADDED), np.float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    row = cuda.blockIdx.y * TILE + ty
    column = cuda.blockIdx.x * TILE + tx
    weight_row = cuda.blockIdx.x * TILE + ty  # the row this thread fetches, not the one it computes
    depth = x.shape[1]

    total = np.float32(0)
    for k0 in range(0, depth, TILE):
        # Beyond an edge the tile is filled with zeros, which add nothing.
        inside = k0 + tx < depth
        x_tile[ty, tx] = widen_cuda(x[row, k0 + tx]) if inside and row < out.shape[0] else np.float32(0)
        weight_tile[ty, tx] = (widen_cuda(weight[weight_row, k0 + tx]) if inside and weight_row < out.shape[1]
                               else np.float32(0))
        cuda.syncthreads()
        for k in range(TILE):
            total += x_tile[ty, k] * weight_tile[tx, k]
        cuda.syncthreads()

    if row < out.shape[0] and column < out.shape[1]:
        if bias.shape[0] > 0:
            total += widen_cuda(bias[column])
        out[row, column] = narrow_cuda(total)


def linear_tiled_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays; any shape."""
    grid = ceil_div(out.shape[1], TILE), ceil_div(out.shape[0], TILE)
    _tiled_kernel[grid, (TILE, TILE)](out, x, weight, array_or_empty(bias))
