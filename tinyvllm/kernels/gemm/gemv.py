"""GEMV: the matrix product when there are only a few rows of x, as in decoding.

With one to eight rows, each weight is used one to eight times and then never again, so the time is the time
to read the weights, and the kernel is about memory alone:

    - a warp takes two rows of weight. Lane l reads 16 bytes (8 values) at 8 l, 8 l + 256, ...: a warp reads
    512 adjacent
      bytes in one instruction, and several of them per row are under way before the first is used
    - x is small, used by every warp, and comes from the caches
    - a warp's 32 partial sums are added by shuffles; no shared memory, no barrier

Tensor cores would not help: they would wait for the same bytes. The order of additions depends on K only, so
a row gives the same bits whether it comes alone or among eight.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel, pointer
from tinyvllm.kernels.ptx import (
    block_index_x,
    high_bf16,
    lane_index,
    load_16_bytes,
    load_16_bytes_cached,
    load_u16,
    low_bf16,
    narrow_cuda,
    shuffle_xor,
    store_u16,
    thread_index,
)

__all__ = ["linear_gemv_cuda", "gemv_kernel", "MAX_ROWS"]

MAX_ROWS = 8
WARPS, OUTPUTS = 4, 2  # warps a block; rows of weight a warp
SIGNATURE = ("uint64", "uint64", "uint64", "uint64", "int32", "int32")


@functools.cache
def gemv_kernel(ROWS: int):
    """The kernel for exactly ROWS rows of x (a constant in it)."""
    # 16-byte loads of a weight row that are under way together. With many rows the unrolled loop grows so
    # long that the compiler leaves it rolled, and then `w` below cannot live in registers.
    UNROLL = 4 if ROWS <= 4 else 2

    @kernel(signature=SIGNATURE, max_threads=32 * WARPS)
    def gemv(out, x, weight, bias, num_outputs, depth):
        """out [ROWS, num_outputs] = x [ROWS, depth] @ weight [num_outputs, depth].T + bias (0: none)."""
        lane = lane_index()
        first = (block_index_x() * WARPS + thread_index() // 32) * OUTPUTS
        pitch = np.uint64(depth) * np.uint64(2)
        weight_row = cuda.local.array(OUTPUTS, np.uint64)
        acc = cuda.local.array((OUTPUTS, ROWS), np.float32)
        w = cuda.local.array((UNROLL, OUTPUTS, 4), np.uint32)
        xs = cuda.local.array(4, np.uint32)
        for n in range(OUTPUTS):
            weight_row[n] = weight + np.uint64(min(first + n, num_outputs - 1)) * pitch
            for m in range(ROWS):
                acc[n, m] = np.float32(0)

        k = np.int32(lane * 8)
        while k < depth:
            for u in range(UNROLL):
                for n in range(OUTPUTS):
                    # Past the end of the row load its start again; those values are not used below.
                    at = np.uint64(k + u * 256 if k + u * 256 < depth else 0) * np.uint64(2)
                    w[u, n, 0], w[u, n, 1], w[u, n, 2], w[u, n, 3] = load_16_bytes(weight_row[n] + at)
            for u in range(UNROLL):
                if k + u * 256 < depth:
                    for m in range(ROWS):
                        xs[0], xs[1], xs[2], xs[3] = load_16_bytes_cached(
                            x + np.uint64(m) * pitch + np.uint64(k + u * 256) * np.uint64(2))
                        for i in range(4):
                            x_low, x_high = low_bf16(xs[i]), high_bf16(xs[i])
                            for n in range(OUTPUTS):
                                acc[n, m] = acc[n, m] + low_bf16(w[u, n, i]) * x_low
                                acc[n, m] = acc[n, m] + high_bf16(w[u, n, i]) * x_high
            k += np.int32(256 * UNROLL)

        for n in range(OUTPUTS):
            for m in range(ROWS):
                total = acc[n, m]
                for offset in (16, 8, 4, 2, 1):
                    total = total + shuffle_xor(total, offset)
                if lane == 0 and first + n < num_outputs:
                    if bias != 0:
                        total = total + low_bf16(load_u16(bias + np.uint64(first + n) * np.uint64(2)))
                    element = np.uint64(m) * np.uint64(num_outputs) + np.uint64(first + n)
                    store_u16(out + element * np.uint64(2), narrow_cuda(total))

    return gemv


def linear_gemv_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays; at most MAX_ROWS rows, K a multiple of 8."""
    (num_rows, depth), num_outputs = x.shape, weight.shape[0]
    gemv_kernel(num_rows)[ceil_div(num_outputs, WARPS * OUTPUTS), 32 * WARPS](
        pointer(out), pointer(x), pointer(weight), pointer(bias) if bias.shape[0] else 0, num_outputs, depth)
