"""Decode attention on compute capability 9.0: keys and values straight from memory into registers. decode.py explains
the algorithm, and is what runs elsewhere.

A block has one part of a request's context and one key head, with the query heads that share it. Each of its warps
walks over its own tiles of 16 keys (of the part's tiles the first, then every WARPS-th after it), and has two of them
on their way: as soon as a tile's keys have been multiplied, those of the tile after the next are asked for, and the
same with the values. No shared memory, no barrier until the end; and where nothing passes shared memory the first-level
cache can be large, which is where loads on their way are kept.

What makes it possible is that a product does not care in which order its sums are taken, or how its rows are numbered.
With g = lane // 4 and q = lane % 4 (see decode_tile.py) a lane loads

    of keys g and g + 8                      16-byte chunks q, q + 4, ...: whichever features these are, the queries'
                                             chunks of the same numbers are multiplied with them
    of values 2q, 2q + 1, 2q + 8, 2q + 9     chunk g (and g + 8): whole rows of 128 bytes. Neighbours in a register
                                             must be two keys of one feature, which a byte permutation of the
                                             registers of two keys gives; rows of the outputs then are features
                                             8g to 8g + 7

choose_shape says how many warps a block has and how long a part is. Who knows how long the contexts are can say so
(see Hints): blocks begin in the order of their numbers, and where the longest context's begin last, they end last, and
alone. On compute capability 8.0 the assembler has not enough registers for this (0.6 KB of each thread's would be in
memory).

Sources: as of decode.py; NVIDIA, "Parallel Thread Execution ISA".
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from tinyvllm.kernels.attention.decode_tile import head_pitch, head_tiles, make_finish, make_leave, make_weights
from tinyvllm.kernels.cuda_support import ceil_div, cuda, device_function, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    block_index_z,
    dynamic_shared,
    instruction,
    lane_index,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_i32,
    load_u32,
    mma_m16n8k16,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["decode_registers_kernel", "can_run", "choose_shape", "unevenness", "warps_at_once", "Hints", "NO_HINTS",
           "INVARIANT_SHAPE", "SHARED_PERCENT"]

# Not "nc": the newest key may be written by a kernel that has not ended when this one begins.
load_16_bytes_once = instruction("ld.global.L1::no_allocate.L2::128B.v4.b32 {$0,$1,$2,$3}, [$4];",
                                 "u32 u32 u32 u32", "u64", memory=True)
shuffle_from_u32 = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "u32", "u32 u32", volatile=True)
low_halves = instruction("prmt.b32 $0, $1, $2, 0x5410;", "u32", "u32 u32")
high_halves = instruction("prmt.b32 $0, $1, $2, 0x7632;", "u32", "u32 u32")

# out, parts, qkv, k_cache, v_cache, block_tables, seq_lens, order; sizes
SIGNATURE = ("uint64",) * 8 + ("int32",) * 3 + ("float32",) + ("int32",) * 2


SHORTEST_PART, LONGEST_PART = 512, 8192  # keys; see choose_shape
# (warps, keys a part) whatever the batch, in microseconds for 8 x 256, 1 x 8192, 256 x 256 and 64 x 4096: 4.1, 11.6, 34
# and 130. With 8 warps 3.7, 10.1, 38 and 145; with 2 warps 6.3, 13.4, 33 and 129.
INVARIANT_SHAPE = (4, 256)
# Fast memory: mostly cache. With the driver's own choice 16 x 8192 took 88 us between its neighbours of a step, so 75.
SHARED_PERCENT = 25


class Hints(NamedTuple):
    """What the host knows of a batch, and the kernels would have to find out. They give the same attention without.

    order: int32 [requests] on the device, whoever has the longest context first; None: as they come. in_parts: whether
    the longest contexts are to be cut. See `unevenness`.
    """

    order: Any = None
    in_parts: bool = False


NO_HINTS = Hints()


def can_run(head_dim: int, group: int, block_size: int) -> bool:
    """Whether heads are whole rows of the loads, the registers suffice, and a tile of keys is never in two blocks."""
    return (head_dim == 64 or head_dim == 128 and group <= 8) and block_size % 16 == 0


def warps_at_once(head_dim: int, group: int) -> int:
    """Warps on a multiprocessor, by the registers that they need."""
    return 16 if head_dim == 64 and head_tiles(group) == 1 else 8


def unevenness(longest: int, total: int, num_requests: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """What to do about contexts of different lengths: 0, nothing; 1, the longest first; 2, and that in parts.
    longest, total: keys of the longest context, and of all together.

    1 is for a context that, begun last, would keep a block busy when most others have ended: 64 requests of 100 to
    4,096 keys, a step of 2.10 ms takes 2.00 in that order. Where each multiprocessor has many contexts to do it gains
    nothing, and to look who is next costs something: 256 of 200 to 2,048 keys, 0.8% (of the run).
    2 is for one that would do so even if it began first, and is long enough to be worth a kernel that combines parts:
    one of 4,000 among 63 of 200 keys, 1.44 ms as they come, 1.29 in order, 1.16 in parts. (One of 1,000 among 63 of
    100: 1.08, 1.05, 1.11.)
    """
    mean = total / max(1, num_requests)
    load = total * num_kv_heads / num_multiprocessors  # keys that a multiprocessor has to look at
    if longest > max(4 * SHORTEST_PART, 1.5 * max(mean, load)):
        return 2
    return int(num_requests * num_kv_heads > num_multiprocessors and longest > max(1.25 * mean, load / 4))


def choose_shape(num_contexts: int, width: int, num_multiprocessors: int, at_once: int,
                 in_parts: bool = False) -> tuple[int, int]:
    """(warps a block, keys a part). num_contexts: requests times key heads, times blocks for one; width: keys that the
    block tables have room for (requests may be shorter); at_once: see warps_at_once; in_parts: see Hints.

    A kernel that combines parts costs 1 to 2 us, and a block begins and ends slowly: 64 x 4096 (requests x keys, 8 key
    heads, 132 multiprocessors) take 122 us whole, 125 in parts of 1024, 145 in parts of 256. So contexts are whole
    where they keep the GPU busy, and the warps make up for their number:

        one a multiprocessor at most   as many warps as fit, and parts if need be: 16 x 8192 whole 62 us with 16 warps,
                                       71 with 8; 8 x 256 2.8 us, 3.7 with 8; 1 x 8192 in parts of 512 9.1 us
        all at once                    as many warps as that leaves them: 32 x 512 9.1 us with 8, 11.5 with 16 (two
                                       rounds) and 11.3 with 4
        more                           a warp has to have something to do while others begin: 8 tiles of 16 keys. 128
                                       and 256 x 256: 16.5 and 32.7 us with 2 warps, 21.0 and 38.4 with 8. But 8 warps
                                       for long contexts: 256 of 100 to 1500 keys 98 us, 102 with 4, 109 with 2
        in parts                       as many warps as otherwise, and four parts of the longest context
    """
    longest = min(LONGEST_PART, max(SHORTEST_PART, ceil_div(width, 4 * 256) * 256)) if in_parts else LONGEST_PART
    if num_contexts <= num_multiprocessors:
        parts = num_multiprocessors // num_contexts
        part_keys = max(SHORTEST_PART, ceil_div(ceil_div(width, parts), 256) * 256)
        return at_once, min(part_keys, longest)
    warps = next(warps for warps in (8, 4, 2) if warps == 2 or 128 * warps <= width
                 or num_contexts * warps <= num_multiprocessors * at_once)
    return warps, longest


@functools.cache
def decode_registers_kernel(D: int, GROUP: int, BLOCK: int, WARPS: int, SHARED_PERCENT: int | None = None):
    """The kernel for head_dim D, GROUP query heads a key head and blocks of BLOCK tokens (see can_run).

    Grid: (key heads, times ceil(GROUP / 16); parts; requests). SHARED_PERCENT: as in decode.py. It takes part in
    programmatic dependent launch: older keys are asked for before the wait for the kernel that writes the newest one.
    """
    HALVES, STEPS, TILES = D // 64, D // 16, head_tiles(GROUP)
    LOADS = D // 32  # 16-byte loads of a lane and key
    HEAD_BLOCKS = ceil_div(GROUP, 16)
    WARP_BYTES = min(GROUP, 16) * head_pitch(D) * 4
    soften, leave = make_weights(TILES), make_leave(D, TILES)
    finish = make_finish(D, WARPS, WARP_BYTES)

    @device_function
    def load_keys(k, cache, place):
        for i in range(2):  # keys g and g + 8
            for j in range(LOADS):
                k[i, j, 0], k[i, j, 1], k[i, j, 2], k[i, j, 3] = load_16_bytes_once(
                    cache + place + np.uint64(i * (16 * D) + j * 64))

    @device_function
    def load_values(v, cache, place):
        for i in range(4):  # keys 2q, 2q + 1, 2q + 8, 2q + 9
            for j in range(HALVES):
                v[i, j, 0], v[i, j, 1], v[i, j, 2], v[i, j, 3] = load_16_bytes_once(
                    cache + place + np.uint64((i % 2 + i // 2 * 8) * (2 * D) + j * 128))

    @device_function
    def multiply_keys(scores, k, queries):
        for h in range(TILES):
            for c in range(4):
                scores[h, c] = np.float32(0)
            for j in range(LOADS):
                for e in range(2):
                    scores[h, 0], scores[h, 1], scores[h, 2], scores[h, 3] = mma_m16n8k16(
                        scores[h, 0], scores[h, 1], scores[h, 2], scores[h, 3],
                        k[0, j, 2 * e], k[1, j, 2 * e], k[0, j, 2 * e + 1], k[1, j, 2 * e + 1],
                        queries[h, j, 2 * e], queries[h, j, 2 * e + 1])

    @device_function
    def add_values(outputs, v, r, weights):
        for j in range(HALVES):
            for i in range(4):
                a, b = low_halves(v[0, j, i], v[1, j, i]), high_halves(v[0, j, i], v[1, j, i])
                c, d = low_halves(v[2, j, i], v[3, j, i]), high_halves(v[2, j, i], v[3, j, i])
                for h in range(TILES):
                    t = j * 4 + i
                    outputs[h, t, 0], outputs[h, t, 2] = outputs[h, t, 0] * r[h, 0], outputs[h, t, 2] * r[h, 0]
                    outputs[h, t, 1], outputs[h, t, 3] = outputs[h, t, 1] * r[h, 1], outputs[h, t, 3] * r[h, 1]
                    outputs[h, t, 0], outputs[h, t, 1], outputs[h, t, 2], outputs[h, t, 3] = mma_m16n8k16(
                        outputs[h, t, 0], outputs[h, t, 1], outputs[h, t, 2], outputs[h, t, 3], a, b, c, d,
                        weights[h, 0], weights[h, 1])

    @device_function
    def clear_values(v, left, q):
        """Zeros, not what the cache holds after the last key: 0 * NaN would be NaN."""
        for i in range(4):
            if np.int32(2 * q) + (i % 2 + i // 2 * 8) >= left:
                for j in range(HALVES):
                    for c in range(4):
                        v[i, j, c] = np.uint32(0)

    @kernel(signature=SIGNATURE, max_threads=32 * WARPS, min_blocks=max(1, warps_at_once(D, GROUP) // WARPS))
    def decode(out, parts, qkv, k_cache, v_cache, block_tables, seq_lens, order, max_blocks, part_keys, num_splits,
               scale, num_heads, num_kv_heads):
        """order: see Hints; 0: none. part_keys: keys a part, a multiple of 16. scale: of the scores, times log2(e)."""
        thread, lane = thread_index(), lane_index()
        warp, g, q = np.uint32(thread // np.uint32(32)), np.uint32(lane // np.uint32(4)), np.uint32(lane % np.uint32(4))
        let_next_kernel_start()
        kv_head, first_head, heads = np.uint32(block_index_x()), np.uint32(0), np.uint32(GROUP)
        if HEAD_BLOCKS > 1:
            kv_head = np.uint32(block_index_x() // np.uint32(HEAD_BLOCKS))
            first_head = np.uint32((block_index_x() - kv_head * HEAD_BLOCKS) * 16)
            heads = np.uint32(min(np.uint32(GROUP - first_head), np.uint32(16)))
        split, request = np.uint32(block_index_y()), np.uint32(block_index_z())
        start = np.int32(split * np.uint32(part_keys))
        if order != 0:
            request = load_u32(order + np.uint64(request) * np.uint64(4))
        # The first look into the block table does not wait for the request's length: at worst a column is of no use.
        table = block_tables + np.uint64(request) * np.uint64(max_blocks) * np.uint64(4)
        own_key = np.uint32(start + (warp + lane * WARPS) * 16)  # where tile `lane` of this warp begins
        blocks = load_u32(table + np.uint64(min(np.uint32(own_key // np.uint32(BLOCK)), np.uint32(max_blocks - 1)))
                          * np.uint64(4))
        seq_len = load_i32(seq_lens + np.uint64(request) * np.uint64(4))
        if start >= seq_len:
            wait_for_previous_kernel()  # no kernel of a chain ends before the one ahead of it
            return
        end = np.int32(min(start + part_keys, seq_len))
        tiles = np.uint32(np.uint32(end - start + 15) // np.uint32(16))
        own = np.uint32(np.uint32(tiles + (WARPS - 1) - warp) // np.uint32(WARPS))  # tiles of this warp
        key_size = np.uint64(2 * D)
        block_size = np.uint64(num_kv_heads) * np.uint64(BLOCK * 2 * D)
        first = np.uint64(kv_head) * np.uint64(BLOCK * 2 * D)
        k_from = k_cache + first + np.uint64(g) * key_size + np.uint64(16 * q)
        v_from = v_cache + first + np.uint64(2 * q) * key_size + np.uint64(16 * g)
        k_0 = cuda.local.array((2, LOADS, 4), np.uint32)
        k_1 = cuda.local.array((2, LOADS, 4), np.uint32)
        v_0 = cuda.local.array((4, HALVES, 4), np.uint32)
        v_1 = cuda.local.array((4, HALVES, 4), np.uint32)

        # ---- two tiles on their way; the queries meanwhile ----
        if end == seq_len and own <= 2 and (tiles - 1) % np.uint32(WARPS) == warp:
            wait_for_previous_kernel()  # the request's newest key may not be written yet
        if own > 0:
            place = (np.uint64(shuffle_from_u32(blocks, np.uint32(0))) * block_size
                     + np.uint64(np.uint32(start + warp * 16) % np.uint32(BLOCK)) * key_size)
            load_keys(k_0, k_from, place)
            load_values(v_0, v_from, place)
        if own > 1:
            place = (np.uint64(shuffle_from_u32(blocks, np.uint32(1))) * block_size
                     + np.uint64(np.uint32(start + (warp + WARPS) * 16) % np.uint32(BLOCK)) * key_size)
            load_keys(k_1, k_from, place)
            load_values(v_1, v_from, place)
        next_blocks = np.uint32(0)
        if own > 32:
            next_key = np.uint32(own_key + 32 * WARPS * 16)
            next_blocks = load_u32(table + np.uint64(min(np.uint32(next_key // np.uint32(BLOCK)),
                                                         np.uint32(max_blocks - 1))) * np.uint64(4))
        wait_for_previous_kernel()  # (a second wait costs nothing)
        queries = cuda.local.array((TILES, LOADS, 4), np.uint32)  # the heads are the columns of B
        for h in range(TILES):
            head = np.uint32(kv_head * GROUP + first_head + min(np.uint32(h * 8 + g), np.uint32(heads - 1)))
            row = (qkv + np.uint64(request) * np.uint64((num_heads + 2 * num_kv_heads) * (2 * D))
                   + np.uint64(head * (2 * D) + 16 * q))
            for j in range(LOADS):
                queries[h, j, 0], queries[h, j, 1], queries[h, j, 2], queries[h, j, 3] = load_16_bytes_cached(
                    row + np.uint64(64 * j))

        scores = cuda.local.array((TILES, 4), np.float32)
        outputs = cuda.local.array((TILES, STEPS, 4), np.float32)
        m = cuda.local.array((TILES, 2), np.float32)
        l = cuda.local.array((TILES, 2), np.float32)  # noqa: E741
        r = cuda.local.array((TILES, 2), np.float32)
        weights = cuda.local.array((TILES, 2), np.uint32)
        for h in range(TILES):
            for c in range(2):
                m[h, c], l[h, c] = np.float32(-np.inf), np.float32(0)
            for j in range(STEPS):
                for c in range(4):
                    outputs[h, j, c] = np.float32(0)
        left = np.int32(end - start - np.int32(warp * 16))  # keys from the tile's first on
        t = np.uint32(0)
        while t < own:
            if t % np.uint32(32) == 30:  # tiles t + 2 and t + 3 begin the next round of looks into the block table
                blocks = next_blocks
                if t + 34 < own:
                    next_key = np.uint32(own_key + (t + 34) * (WARPS * 16))
                    next_blocks = load_u32(table + np.uint64(min(np.uint32(next_key // np.uint32(BLOCK)),
                                                                 np.uint32(max_blocks - 1))) * np.uint64(4))
            # ---- an even tile ----
            ahead = np.uint32(t + 2)
            place = (np.uint64(shuffle_from_u32(blocks, np.uint32(ahead % np.uint32(32)))) * block_size
                     + np.uint64(np.uint32(start + (warp + ahead * WARPS) * 16) % np.uint32(BLOCK)) * key_size)
            multiply_keys(scores, k_0, queries)
            if ahead < own:
                load_keys(k_0, k_from, place)
            soften(scores, m, l, r, weights, left, scale)
            if left < 16:
                clear_values(v_0, left, q)
            add_values(outputs, v_0, r, weights)
            if ahead < own:
                load_values(v_0, v_from, place)
            left = np.int32(left - 16 * WARPS)
            t = np.uint32(t + 1)
            # ---- an odd one ----
            if t < own:
                ahead = np.uint32(t + 2)
                place = (np.uint64(shuffle_from_u32(blocks, np.uint32(ahead % np.uint32(32)))) * block_size
                         + np.uint64(np.uint32(start + (warp + ahead * WARPS) * 16) % np.uint32(BLOCK)) * key_size)
                multiply_keys(scores, k_1, queries)
                if ahead < own:
                    load_keys(k_1, k_from, place)
                soften(scores, m, l, r, weights, left, scale)
                if left < 16:
                    clear_values(v_1, left, q)
                add_values(outputs, v_1, r, weights)
                if ahead < own:
                    load_values(v_1, v_from, place)
                left = np.int32(left - 16 * WARPS)
                t = np.uint32(t + 1)

        shared = dynamic_shared()
        leave(np.uint32(shared + warp * WARP_BYTES), outputs, m, l, heads)
        finish(shared, out, parts, np.uint32(request * num_heads + kv_head * GROUP + first_head), heads, split,
               num_splits, seq_len, part_keys)

    decode.threads, decode.shared_percent = 32 * WARPS, SHARED_PERCENT
    decode.shared_bytes = WARPS * WARP_BYTES
    decode.head_blocks = HEAD_BLOCKS
    return decode
