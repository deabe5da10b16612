"""Combine the parts of a split context, as decode_simple.combine_kernel does, over addresses.

A warp takes one query head of one request. Its lanes read the maxima and sums of 32 parts at once, and then each adds
its own columns over the parts, in ascending order, four parts on their way at a time: one after the other they would
cost a trip to the second-level cache each.
"""

import functools

import numpy as np

from tinyvllm.kernels.attention.decode_simple import STATISTICS
from tinyvllm.kernels.attention.prefill import LOG2_E
from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    exp2,
    instruction,
    lane_index,
    let_next_kernel_start,
    load_i32,
    maximum,
    narrow_cuda,
    quotient,
    shuffle_xor,
    store_u16,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["combine_parts_kernel", "WARPS"]

WARPS = 4  # a block
AT_ONCE = 4  # parts of a lane that are under way together
# Each is read once, and was written by other multiprocessors: the first-level cache has nothing to give.
load_f32_global = instruction("ld.global.cg.f32 $0, [$1];", "f32", "u64", memory=True)
shuffle_from = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "f32", "f32 u32", volatile=True)


@functools.cache
def combine_parts_kernel(D: int, DEPENDENT: bool = False, SHARED_PERCENT: int | None = None):
    """The kernel for head_dim D; SHARED_PERCENT: as in decode.py."""
    COLUMNS = ceil_div(D, 32)
    PART = (D + STATISTICS) * 4

    @kernel(signature=("uint64",) * 3 + ("int32",) * 4, max_threads=32 * WARPS)
    def combine_parts(out, parts, seq_lens, part_keys, num_splits, num_heads, num_rows):
        """part_keys: keys a part. num_rows: requests times heads. Requests with one part are finished already."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        lane = lane_index()
        row = np.uint32(block_index_x() * WARPS + thread_index() // np.uint32(32))
        if row >= num_rows:
            return
        request = np.uint32(row) // np.uint32(num_heads)
        seq_len = load_i32(seq_lens + np.uint64(request) * np.uint64(4))
        if seq_len <= part_keys:
            return
        used = np.int32(np.uint32(seq_len + part_keys - 1) // np.uint32(part_keys))
        base = parts + np.uint64(row) * np.uint64(num_splits) * np.uint64(PART)
        m = np.float32(-np.inf)
        first = np.int32(lane)
        while first < used:
            m = maximum(m, load_f32_global(base + np.uint64(first) * np.uint64(PART) + np.uint64(D * 4)))
            first = np.int32(first + 32)
        for i in range(5):
            m = maximum(m, shuffle_xor(m, np.uint32(1 << i)))
        total = cuda.local.array(COLUMNS, np.float32)
        loaded = cuda.local.array((AT_ONCE, COLUMNS), np.float32)
        for c in range(COLUMNS):
            total[c] = np.float32(0)
        denominator = np.float32(0)
        first = np.int32(0)
        while first < used:
            weight = np.float32(0)  # of part first + lane
            if first + np.int32(lane) < used:
                at = base + np.uint64(first + np.int32(lane)) * np.uint64(PART) + np.uint64(D * 4)
                weight = exp2((load_f32_global(at) - m) * np.float32(LOG2_E))
                denominator = denominator + weight * load_f32_global(at + np.uint64(4))
            s = np.int32(first)
            while s < min(first + 32, used):
                for i in range(AT_ONCE):
                    at = base + np.uint64(min(np.int32(s + i), np.int32(used - 1))) * np.uint64(PART)
                    for c in range(COLUMNS):
                        if lane + c * 32 < D:
                            loaded[i, c] = load_f32_global(at + np.uint64(lane + c * 32) * np.uint64(4))
                for i in range(AT_ONCE):  # beyond the last part the weight is 0
                    factor = shuffle_from(weight, np.uint32(s + i - first))
                    for c in range(COLUMNS):
                        total[c] = total[c] + factor * loaded[i, c]
                s = np.int32(s + AT_ONCE)
            first = np.int32(first + 32)
        for i in range(5):
            denominator = denominator + shuffle_xor(denominator, np.uint32(1 << i))
        to = out + np.uint64(row) * np.uint64(2 * D)
        for c in range(COLUMNS):
            if lane + c * 32 < D:
                store_u16(to + np.uint64(lane + c * 32) * np.uint64(2), narrow_cuda(quotient(total[c], denominator)))

    combine_parts.shared_percent = SHARED_PERCENT
    return combine_parts
