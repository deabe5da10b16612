"""Rotary embedding and the cache write in one pass over a row of qkv (rope.py, then kv_cache.py).

Query heads are turned in place, key heads are turned on their way into the cache, and values are copied there; the
key and value heads in qkv itself keep what they had. A thread has 8 pairs (i, i + D/2) of a query or key head, or 8
features of a value head.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    divide,
    high_bf16,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_i32,
    load_u32,
    low_bf16,
    pack_bf16,
    store_16_bytes,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["rope_write_kernel", "THREADS"]

THREADS = 256


@functools.cache
def rope_write_kernel(D: int, DEPENDENT: bool = False):
    """The kernel for head_dim D, a multiple of 16."""
    PIECES = D // 16  # of a head, 8 pairs each

    @kernel(signature=("uint64",) * 6 + ("int32",) * 3, max_threads=THREADS)
    def rope_write(qkv, positions, slots, cos_sin, k_cache, v_cache, num_heads, num_kv_heads, block_size):
        """A block a row."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        row = block_index_x()
        line = qkv + np.uint64(row) * np.uint64((num_heads + 2 * num_kv_heads) * D * 2)
        slot = load_i32(slots + np.uint64(row) * np.uint64(4))
        position = load_u32(positions + np.uint64(row) * np.uint64(4))
        block = np.uint32(divide(np.uint32(max(slot, 0)), block_size))
        offset = np.uint32(max(slot, 0) - block * block_size)
        turned = np.uint32((num_heads + num_kv_heads) * PIECES)
        items = np.uint32(turned + num_kv_heads * 2 * PIECES)
        a, b = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        cos, sin = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        item = thread_index()
        while item < items:
            if item < turned:
                head = np.uint32(divide(item, PIECES))
                feature = np.uint32((item - head * PIECES) * 8)
                at = line + np.uint64((head * D + feature) * 2)
                a[0], a[1], a[2], a[3] = load_16_bytes_cached(at)
                b[0], b[1], b[2], b[3] = load_16_bytes_cached(at + np.uint64(D))
                angle = cos_sin + (np.uint64(position) * np.uint64(D) + np.uint64(feature)) * np.uint64(2)
                cos[0], cos[1], cos[2], cos[3] = load_16_bytes_cached(angle)
                sin[0], sin[1], sin[2], sin[3] = load_16_bytes_cached(angle + np.uint64(D))
                for j in range(4):
                    a_low, a_high, b_low, b_high = low_bf16(a[j]), high_bf16(a[j]), low_bf16(b[j]), high_bf16(b[j])
                    c_low, c_high = low_bf16(cos[j]), high_bf16(cos[j])
                    s_low, s_high = low_bf16(sin[j]), high_bf16(sin[j])
                    a_cos, b_sin = pack_bf16(a_low * c_low, a_high * c_high), pack_bf16(b_low * s_low, b_high * s_high)
                    b_cos, a_sin = pack_bf16(b_low * c_low, b_high * c_high), pack_bf16(a_low * s_low, a_high * s_high)
                    a[j] = pack_bf16(low_bf16(a_cos) - low_bf16(b_sin), high_bf16(a_cos) - high_bf16(b_sin))
                    b[j] = pack_bf16(low_bf16(b_cos) + low_bf16(a_sin), high_bf16(b_cos) + high_bf16(a_sin))
                if head < num_heads:
                    store_16_bytes(at, a[0], a[1], a[2], a[3])
                    store_16_bytes(at + np.uint64(D), b[0], b[1], b[2], b[3])
                elif slot >= 0:
                    place = np.uint64((block * num_kv_heads + head - num_heads) * block_size + offset)
                    to = k_cache + (place * np.uint64(D) + np.uint64(feature)) * np.uint64(2)
                    store_16_bytes(to, a[0], a[1], a[2], a[3])
                    store_16_bytes(to + np.uint64(D), b[0], b[1], b[2], b[3])
            elif slot >= 0:
                head = np.uint32(divide(np.uint32(item - turned), 2 * PIECES))
                feature = np.uint32((item - turned - head * (2 * PIECES)) * 8)
                at = line + np.uint64(((num_heads + num_kv_heads + head) * D + feature) * 2)
                a[0], a[1], a[2], a[3] = load_16_bytes_cached(at)
                place = np.uint64((block * num_kv_heads + head) * block_size + offset)
                store_16_bytes(v_cache + (place * np.uint64(D) + np.uint64(feature)) * np.uint64(2),
                               a[0], a[1], a[2], a[3])
            item = np.uint32(item + THREADS)

    return rope_write
