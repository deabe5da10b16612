"""Greedy decoding over a wide vocabulary: argmax.py's answer, with many blocks a row.

One block a row leaves a GPU idle when there is one row. So a row is cut into parts, a block finds the best of its
part, and a second kernel the best of the parts. Larger wins, then the lower id, NaN never: that does not depend on the
order, so neither does the result depend on the number of parts.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    dynamic_shared,
    grid_size_x,
    high_bf16,
    lane_index,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_f32,
    load_shared_f32,
    low_bf16,
    shuffle_xor,
    store_f32,
    store_shared_f32,
    store_u32,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["best_of_parts_kernel", "best_of_row_kernel", "THREADS", "SHARED_BYTES"]

THREADS = 256
WARPS = THREADS // 32
SHARED_BYTES = WARPS * 8


@device_function
def _block_best(value, index, shared, lane, warp):
    """(value, index) of the block's best, in every lane. Indices travel as float32, exact below 2**24."""
    for offset in (16, 8, 4, 2, 1):
        other, other_index = shuffle_xor(value, offset), shuffle_xor(index, offset)
        if other > value or (other == value and other_index < index):
            value, index = other, other_index
    if lane == 0:
        store_shared_f32(np.uint32(shared + warp * 8), value)
        store_shared_f32(np.uint32(shared + warp * 8 + 4), index)
    cuda.syncthreads()
    for w in range(WARPS):
        other = load_shared_f32(np.uint32(shared + w * 8))
        other_index = load_shared_f32(np.uint32(shared + w * 8 + 4))
        if other > value or (other == value and other_index < index):
            value, index = other, other_index
    return value, index


@functools.cache
def best_of_parts_kernel(DEPENDENT: bool = False):
    @kernel(signature=("uint64", "uint64", "int32"), max_threads=THREADS)
    def best_of_parts(parts, logits, vocab_size):
        """parts float32 [rows, grid x, 2]: (value, id). Block (x, y): part x of row y. vocab_size: a multiple of 8."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        lane, warp = lane_index(), np.uint32(thread_index() // np.uint32(32))
        row = logits + np.uint64(block_index_y()) * np.uint64(vocab_size) * np.uint64(2)
        value, index = np.float32(-np.inf), np.float32(0)
        v = cuda.local.array(4, np.uint32)
        column = np.uint32((block_index_x() * THREADS + thread_index()) * 8)
        while column < vocab_size:
            v[0], v[1], v[2], v[3] = load_16_bytes_cached(row + np.uint64(column) * np.uint64(2))
            for j in range(4):
                low, high = low_bf16(v[j]), high_bf16(v[j])
                if low > value:
                    value, index = low, np.float32(column + 2 * j)
                if high > value:
                    value, index = high, np.float32(column + 2 * j + 1)
            column = np.uint32(column + grid_size_x() * (THREADS * 8))
        value, index = _block_best(value, index, dynamic_shared(), lane, warp)
        if thread_index() == 0:
            number = np.uint64(block_index_y()) * np.uint64(grid_size_x()) + np.uint64(block_index_x())
            at = parts + number * np.uint64(8)
            store_f32(at, value)
            store_f32(at + np.uint64(4), index)

    return best_of_parts


@functools.cache
def best_of_row_kernel(DEPENDENT: bool = False):
    @kernel(signature=("uint64", "uint64", "int32"), max_threads=THREADS)
    def best_of_row(ids, parts, num_parts):
        """ids int32 [rows]. A block a row."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        lane, warp = lane_index(), np.uint32(thread_index() // np.uint32(32))
        value, index = np.float32(-np.inf), np.float32(0)
        part = thread_index()
        while part < num_parts:
            at = parts + (np.uint64(block_index_x()) * np.uint64(num_parts) + np.uint64(part)) * np.uint64(8)
            other, other_index = load_f32(at), load_f32(at + np.uint64(4))
            if other > value or (other == value and other_index < index):
                value, index = other, other_index
            part = np.uint32(part + THREADS)
        value, index = _block_best(value, index, dynamic_shared(), lane, warp)
        if thread_index() == 0:
            store_u32(ids + np.uint64(block_index_x()) * np.uint64(4), np.uint32(index))

    return best_of_row
