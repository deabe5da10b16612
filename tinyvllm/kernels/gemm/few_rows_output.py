"""The way out of gemm/few_rows.py: the sums of a tile are added over the warps, and what follows the product is done.

A thread has one row of x and two outputs of the tile's 16: i and i + 8, or two that belong together (`first_rows`). Of
a narrow tile's 8 outputs it has one, whose sum comes in two halves.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.ptx import (
    divide,
    exp2,
    load_i32,
    load_shared_f32,
    load_u16,
    narrow_cuda,
    store_u16,
    widen_cuda,
)

__all__ = ["first_rows_of_tile", "store_sums", "LOG2_E"]

LOG2_E = 1.4426950408889634


def first_rows_of_tile(AFTER: str, HEAD_DIM: int, NARROW: bool):
    """A function for the kernel: first_rows(tile, num_outputs), the first row of weight of either half of a tile."""
    SILU, ROPE, HALF, TILES_A_HEAD = AFTER == "silu", AFTER == "rope", HEAD_DIM // 2, max(1, HEAD_DIM // 16)

    @device_function
    def first_rows(tile, num_outputs):
        if SILU:
            return np.uint32(tile * 8), np.uint32(tile * 8 + np.uint32(num_outputs) // np.uint32(2))
        if ROPE:
            head = np.uint32(divide(tile, TILES_A_HEAD))
            first = np.uint32(head * HEAD_DIM + (tile - head * TILES_A_HEAD) * 8)
            return first, np.uint32(first + HALF)
        if NARROW:
            return np.uint32(tile * 8), np.uint32(tile * 8)
        return np.uint32(tile * 16), np.uint32(tile * 16 + 8)

    return first_rows


def store_sums(WARPS: int, AFTER: str, HEAD_DIM: int, NARROW: bool):
    """A function for the kernel: store(sums, thread, tile, ...), the rest being arguments of the kernel. sums: address
    of float32 [WARPS][16 rows of weight][8 rows of x]."""
    ROPE, SILU, ADD, HALF = AFTER == "rope", AFTER == "silu", AFTER == "add", HEAD_DIM // 2
    first_rows = first_rows_of_tile(AFTER, HEAD_DIM, NARROW)

    @device_function
    def store(sums, thread, tile, out, positions, slots, cos_sin, k_cache, v_cache, num_rows, num_outputs, num_heads,
              num_kv_heads, block_size):
        col, r_own = np.uint32(thread % np.uint32(8)), np.uint32(thread // np.uint32(8))
        if thread < 64 and col < num_rows:
            low, high = np.float32(0), np.float32(0)
            other = np.uint32(col + 4) if NARROW else col
            for v in range(WARPS):
                low = low + load_shared_f32(np.uint32(sums + ((v * 16 + r_own) * 8 + col) * 4))
                high = high + load_shared_f32(np.uint32(sums + ((v * 16 + r_own + 8) * 8 + other) * 4))
            if NARROW:
                low = low + high
            low, high = widen_cuda(narrow_cuda(low)), widen_cuda(narrow_cuda(high))
            first_0, first_1 = first_rows(tile, num_outputs)
            n_0, n_1 = np.uint32(first_0 + r_own), np.uint32(first_1 + r_own)
            if SILU:
                silu = widen_cuda(narrow_cuda(low / (np.float32(1) + exp2(low * np.float32(-LOG2_E)))))
                half_outputs = np.uint32(num_outputs) // np.uint32(2)
                if n_0 < half_outputs:
                    store_u16(out + (np.uint64(col) * np.uint64(half_outputs) + np.uint64(n_0)) * np.uint64(2),
                              narrow_cuda(silu * high))
            elif ROPE:
                head = np.uint32(divide(n_0, HEAD_DIM))
                feature = np.uint32(n_0 - head * HEAD_DIM)
                if head < num_heads + num_kv_heads:
                    position = load_i32(positions + np.uint64(col) * np.uint64(4))
                    angle = (cos_sin + np.uint64(position) * np.uint64(2 * HEAD_DIM)
                             + np.uint64(feature) * np.uint64(2))
                    cos, sin = widen_cuda(load_u16(angle)), widen_cuda(load_u16(angle + np.uint64(2 * HALF)))
                    x1_cos, x2_sin = widen_cuda(narrow_cuda(low * cos)), widen_cuda(narrow_cuda(high * sin))
                    x2_cos, x1_sin = widen_cuda(narrow_cuda(high * cos)), widen_cuda(narrow_cuda(low * sin))
                    low, high = x1_cos - x2_sin, x2_cos + x1_sin
                if head < num_heads:
                    to = out + (np.uint64(col) * np.uint64(num_outputs) + np.uint64(n_0)) * np.uint64(2)
                    store_u16(to, narrow_cuda(low))
                    store_u16(to + np.uint64(2 * HALF), narrow_cuda(high))
                else:
                    slot = load_i32(slots + np.uint64(col) * np.uint64(4))
                    if slot >= 0:
                        kv_head, cache = np.uint32(head - num_heads), k_cache
                        if kv_head >= num_kv_heads:
                            kv_head, cache = np.uint32(kv_head - num_kv_heads), v_cache
                        block = np.uint32(divide(np.uint32(slot), block_size))
                        line = np.uint64((block * num_kv_heads + kv_head) * block_size + slot - block * block_size)
                        to = cache + (line * np.uint64(HEAD_DIM) + np.uint64(feature)) * np.uint64(2)
                        store_u16(to, narrow_cuda(low))
                        store_u16(to + np.uint64(2 * HALF), narrow_cuda(high))
            else:
                at = out + (np.uint64(col) * np.uint64(num_outputs) + np.uint64(n_0)) * np.uint64(2)
                if ADD:
                    if n_0 < num_outputs:
                        store_u16(at, narrow_cuda(widen_cuda(load_u16(at)) + low))
                    if not NARROW and n_1 < num_outputs:
                        at = at + np.uint64(16)
                        store_u16(at, narrow_cuda(widen_cuda(load_u16(at)) + high))
                else:
                    if n_0 < num_outputs:
                        store_u16(at, narrow_cuda(low))
                    if not NARROW and n_1 < num_outputs:
                        store_u16(at + np.uint64(16), narrow_cuda(high))

    return store
