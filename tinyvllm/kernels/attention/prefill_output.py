"""The way out of prefill_wgmma.py: a warp's 16 rows of outputs, from its registers to their places in global memory.

In registers a row is spread over four lanes, in pairs of values. So the rows go through shared memory, where the warp's
queries were, and come back 16 bytes a lane: eight lanes store the 128 bytes of a row's half one after the other.
"""

import numpy as np

from tinyvllm.kernels.attention.fragments import put_rows
from tinyvllm.kernels.attention.prefill_layout import Layout
from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.hopper import group_barrier, shared_to_engine
from tinyvllm.kernels.ptx import load_shared_16_bytes, store_16_bytes, warp_barrier

__all__ = ["make_store"]


def make_store(L: Layout):
    """store(out, queries, outputs, consumer, warp_row, lane, first_row, num_tokens, kv_head, num_heads), by a warp.

    out: address of bf16 [tokens, num_heads, D]. queries: address of the buffer of queries, in shared memory. outputs:
    float32 tuple, as multiply's. consumer, warp_row: the warpgroup, and the warp's first row among the buffer's. The
    tile begins in row first_row of out and has num_tokens; rows after those are not its own.
    """
    put = put_rows(L.HALVES, L.QUERY_HALF)

    @device_function
    def store_row(out, part, row, first_row, num_tokens, kv_head, num_heads, offset):
        token = np.uint32(row // np.uint32(L.GROUP))
        if token < num_tokens:
            head = np.uint32(kv_head * L.GROUP + row - token * L.GROUP)
            to = out + ((np.uint64(first_row + token) * np.uint64(num_heads) + np.uint64(head)) * np.uint64(2 * L.D)
                        + np.uint64(offset))
            store_16_bytes(to, part[0], part[1], part[2], part[3])

    @device_function
    def store(out, queries, outputs, consumer, warp_row, lane, first_row, num_tokens, kv_head, num_heads):
        group_barrier(np.uint32(consumer + 1))  # the warpgroup is done with its queries
        put(np.uint32(queries + (warp_row + lane % np.uint32(16)) * 128), np.uint32(lane // np.uint32(16)),
            np.uint32(lane % np.uint32(8)), outputs)
        # The copy engine writes there next. Said before the stores to global memory, for which it would wait too.
        shared_to_engine()
        warp_barrier()
        chunk, row = np.uint32(lane % np.uint32(8)), np.uint32(warp_row + lane // np.uint32(8))
        even = np.uint32(queries + row * 128 + (chunk ^ row % np.uint32(8)) * 16)
        odd = np.uint32(queries + (row + 4) * 128 + (chunk ^ (row + 4) % np.uint32(8)) * 16)
        for half in range(L.HALVES):
            a = load_shared_16_bytes(np.uint32(even + half * L.QUERY_HALF))  # all of them under way together
            b = load_shared_16_bytes(np.uint32(odd + half * L.QUERY_HALF))
            c = load_shared_16_bytes(np.uint32(even + half * L.QUERY_HALF + 8 * 128))
            d = load_shared_16_bytes(np.uint32(odd + half * L.QUERY_HALF + 8 * 128))
            offset = np.uint32(chunk * 16 + 128 * half)
            store_row(out, a, row, first_row, num_tokens, kv_head, num_heads, offset)
            store_row(out, b, np.uint32(row + 4), first_row, num_tokens, kv_head, num_heads, offset)
            store_row(out, c, np.uint32(row + 8), first_row, num_tokens, kv_head, num_heads, offset)
            store_row(out, d, np.uint32(row + 12), first_row, num_tokens, kv_head, num_heads, offset)
        warp_barrier()  # all have read

    return store
