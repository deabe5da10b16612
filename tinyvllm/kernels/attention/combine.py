"""Combine the parts of a split context (decode.py), as decode_simple.combine_kernel does, over addresses.

A warp takes one query head of one request: every lane reads the parts' maxima and sums, in ascending order like all
sums here, and adds its own columns.
"""

import functools

import numpy as np

from tinyvllm.kernels.attention.decode_simple import STATISTICS
from tinyvllm.kernels.attention.prefill import LOG2_E
from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    exp2,
    lane_index,
    let_next_kernel_start,
    load_f32,
    load_i32,
    maximum,
    narrow_cuda,
    store_u16,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["combine_parts_kernel", "WARPS"]

WARPS = 4  # a block


@functools.cache
def combine_parts_kernel(D: int, SPLIT: int, DEPENDENT: bool = False, SHARED_PERCENT: int | None = None):
    """The kernel for head_dim D and parts of SPLIT keys; SHARED_PERCENT: as in decode.py."""
    COLUMNS = ceil_div(D, 32)
    PART = D + STATISTICS

    @kernel(signature=("uint64",) * 3 + ("int32",) * 3, max_threads=32 * WARPS)
    def combine_parts(out, parts, seq_lens, num_splits, num_heads, num_rows):
        """num_rows: requests times heads. Requests with one part are finished already."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        lane = lane_index()
        row = np.uint32(block_index_x() * WARPS + thread_index() // np.uint32(32))
        if row >= num_rows:
            return
        request = np.uint32(row) // np.uint32(num_heads)
        used = (load_i32(seq_lens + np.uint64(request) * np.uint64(4)) + SPLIT - 1) // SPLIT
        if used < 2:
            return
        base = parts + np.uint64(row) * np.uint64(num_splits) * np.uint64(PART * 4)
        m = np.float32(-np.inf)
        for s in range(used):
            m = maximum(m, load_f32(base + np.uint64((s * PART + D) * 4)))
        total = cuda.local.array(COLUMNS, np.float32)
        denominator = np.float32(0)
        for c in range(COLUMNS):
            total[c] = np.float32(0)
        for s in range(used):
            part = base + np.uint64(s * (PART * 4))
            weight = exp2((load_f32(part + np.uint64(D * 4)) - m) * np.float32(LOG2_E))
            denominator = denominator + weight * load_f32(part + np.uint64(D * 4 + 4))
            for c in range(COLUMNS):
                if lane + c * 32 < D:
                    total[c] = total[c] + weight * load_f32(part + np.uint64(lane + c * 32) * np.uint64(4))
        for c in range(COLUMNS):
            if lane + c * 32 < D:
                store_u16(out + (np.uint64(row) * np.uint64(D) + np.uint64(lane + c * 32)) * np.uint64(2),
                          narrow_cuda(total[c] / denominator))

    combine_parts.shared_percent = SHARED_PERCENT
    return combine_parts
