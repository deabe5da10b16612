"""Kernels that do one thing as fast as can be: read memory, or multiply. bench/ceilings.py times them.

They use what the real kernels use: on the CPU the tile of the matrix product (gemm/tile.py), on the GPU the weight
loads of gemm/gemv.py and the mma.sync of gemm/tensor_core.py. What they reach is the roof of a roofline.
"""

import numpy as np
from numba import prange

from tinyvllm.kernels.cuda_support import cuda, kernel
from tinyvllm.kernels.gemm.cpu import TILES
from tinyvllm.kernels.gemm.packing import PANEL
from tinyvllm.kernels.gemm.tile import STEP, make_tile
from tinyvllm.kernels.jit import cpu_jit, thread_count
from tinyvllm.kernels.ptx import (
    block_index_x,
    grid_size_x,
    load_16_bytes,
    mma_m16n8k16,
    store_f32,
    store_u32,
    thread_index,
)

__all__ = ["read_cpu", "multiply_cpu", "tile_operands", "read_kernel", "multiply_kernel", "MULTIPLY_FLOPS"]

# ---- CPU ----

ROWS, PANELS = TILES.many
DEPTH = 256  # of the operands: eight rows and two panels of it stay in the first-level cache
_tile = make_tile(ROWS, PANELS, STEP)


@cpu_jit(parallel=True)
def read_cpu(array, repetitions):
    """All of array (uint64 [N]) by all threads, so many times; returns what keeps the compiler from leaving it out."""
    num_threads = thread_count()
    result = np.zeros(num_threads, np.uint64)
    for i in prange(num_threads):
        thread = np.int64(i)
        part = array[array.shape[0] * thread // num_threads : array.shape[0] * (thread + 1) // num_threads]
        for repetition in range(repetitions):
            mixed = np.uint64(repetition)
            for j in range(part.shape[0]):
                mixed ^= part[j]
            result[thread] ^= mixed
    return result


def tile_operands() -> tuple[np.ndarray, np.ndarray, int]:
    """(x, packed weight) for multiply_cpu, and the floating-point operations of one tile."""
    x = np.full((2 * ROWS, DEPTH), 0x3F80, np.uint16)
    weight = np.full((PANELS, DEPTH // 2, 2 * PANEL), 0x3F80, np.uint16)
    return x, weight, 2 * ROWS * PANELS * PANEL * DEPTH


@cpu_jit(parallel=True)
def multiply_cpu(x, weight, repetitions):
    """Every thread multiplies one tile so many times; returns the number of threads."""
    num_threads = thread_count()
    sums = np.empty((num_threads * ROWS, PANELS * PANEL), np.float32)
    for i in prange(num_threads):
        thread = np.int64(i)
        for repetition in range(repetitions):
            _tile(sums, x, weight, repetition % 2 * ROWS, 0, thread * ROWS, 0)
    return num_threads


# ---- CUDA ----

THREADS = 256  # a block
UNROLL = 4  # 16-byte loads of a thread that are under way together
TILES_A_WARP = 8  # sums of 16 x 8 that do not wait for each other
MULTIPLY_FLOPS = THREADS // 32 * TILES_A_WARP * 2 * 16 * 8 * 16  # of one repetition in one block


@kernel(signature=("uint64", "uint64", "int64", "int32"), max_threads=THREADS)
def read_kernel(out, array, num_bytes, repetitions):
    """All of `array` by all blocks, so many times. num_bytes: a multiple of 16 * UNROLL * THREADS. out: 4 bytes."""
    step = np.int64(grid_size_x()) * np.int64(THREADS * 16 * UNROLL)
    words = cuda.local.array((UNROLL, 4), np.uint32)
    mixed = np.uint32(0)
    for _ in range(repetitions):
        start = np.int64(block_index_x()) * np.int64(THREADS * 16 * UNROLL) + np.int64(thread_index()) * np.int64(16)
        while start < num_bytes:
            for u in range(UNROLL):
                words[u, 0], words[u, 1], words[u, 2], words[u, 3] = load_16_bytes(
                    array + np.uint64(start + np.int64(u * THREADS * 16)))
            for u in range(UNROLL):
                mixed ^= words[u, 0] ^ words[u, 1] ^ words[u, 2] ^ words[u, 3]
            start += step
    if mixed == np.uint32(0x9E3779B9):  # all but never: so that the loads are for something
        store_u32(out, mixed)


@kernel(signature=("uint64", "int32"), max_threads=THREADS)
def multiply_kernel(out, repetitions):
    """Every warp multiplies TILES_A_WARP pairs of 16 x 16 by 16 x 8 so many times, all in registers. out: 4 bytes."""
    sums = cuda.local.array((TILES_A_WARP, 4), np.float32)
    for t in range(TILES_A_WARP):
        for i in range(4):
            sums[t, i] = np.float32(0)
    a = np.uint32(0x3F803F80) + np.uint32(thread_index())
    b = np.uint32(0x3F80BF80) + np.uint32(block_index_x())
    for _ in range(repetitions):
        for t in range(TILES_A_WARP):
            sums[t, 0], sums[t, 1], sums[t, 2], sums[t, 3] = mma_m16n8k16(
                sums[t, 0], sums[t, 1], sums[t, 2], sums[t, 3], a, b, a, b, a, b)
    total = np.float32(0)
    for t in range(TILES_A_WARP):
        for i in range(4):
            total += sums[t, i]
    if total == np.float32(-123456.75):  # all but never
        store_f32(out, total)
