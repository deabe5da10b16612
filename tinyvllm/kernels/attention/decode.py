"""Decode attention: one query row a request, a long context, keys and values read through the block table.

There is almost no arithmetic here: each key and value is fetched, used by the few query heads that share it,
and not used again. The time is the time to read the cache, so enough blocks must be reading. One block a
(request, head) would leave a GPU idle at small batches, so the context is split, and each part is a block of
its own:

    part s:    keys s * SPLIT .. s * SPLIT + SPLIT - 1        ->  m_s, l_s, O_s      (as in softmax.py)
    combine:   m = max m_s,   l = sum exp(m_s - m) l_s,   out = sum exp(m_s - m) O_s / l

Parts are cut at fixed positions of the context, never at "context / number of multiprocessors", and combined
in ascending order: a row's result does not depend on the batch around it.

decode_simple.py does just this, a key a thread; read it first. Here the G query heads of a key head are the
rows of an mma, so that a key is fetched once for all of them; each warp walks over its own 16 keys of every
tile, and the warps' results are merged in shared memory at the end. decode_registers.py does it faster, where it
can run.

The grid is made for the longest context that the block tables have room for: blocks beyond a request's own
context return at once. Pass tables no wider than the longest request in the batch needs.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding" (2023); Kwon et al., PagedAttention (2023).
"""

import functools

import numpy as np

from tinyvllm.kernels.attention.decode_simple import STATISTICS, combine_kernel
from tinyvllm.kernels.attention.prefill import LOG2_E, key_tile
from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel, pointer, workspace
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    block_index_z,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    divide,
    dynamic_shared,
    exp2,
    lane_index,
    ldmatrix_x4,
    ldmatrix_x4_transposed,
    let_next_kernel_start,
    load_i32,
    load_shared_f32,
    load_u32,
    maximum,
    mma_m16n8k16,
    narrow_cuda,
    pack_bf16,
    shuffle_xor,
    store_f32,
    store_shared_f32,
    store_u16,
    thread_index,
    wait_for_previous_kernel,
    warp_barrier,
)

__all__ = ["decode_attention_cuda", "decode_kernel", "SPLIT"]

SPLIT = 256  # keys a part: a multiple of the key tile
SIGNATURE = ("uint64",) * 7 + ("int32", "int32", "float32", "int32", "int32", "int32")


@functools.cache
def decode_kernel(D: int, DEPENDENT: bool = False, STAGES: int = 2, BLOCK: int = 0,
                  SHARED_PERCENT: int | None = None):
    """The kernel for head_dim D (a constant in it).

    STAGES: tiles in shared memory, all but one on their way. BLOCK: the cache's block_size where it is known; if it is
    a multiple of 16, a warp's keys lie in one block, and one look into the block table does for all of them.
    SHARED_PERCENT: the division of fast memory that the kernels around it use (few_rows.py), if they have one.
    DEPENDENT: takes part in programmatic dependent launch. Keys before the newest one are those of earlier steps, so
    their copies begin before the kernel that writes the newest one has ended.
    """
    KEYS = key_tile(D)
    WARPS = KEYS // 16  # each warp has its own 16 keys of a tile
    CHUNKS = D // 8
    KEYS_A_PASS = 32 // CHUNKS  # that the lanes of a warp copy at once, a chunk each
    PASSES = ceil_div(16, KEYS_A_PASS)
    PITCH = 2 * D + 16  # as in prefill.py
    MATRIX = 16 * PITCH  # one warp's keys of a tile, or its values
    STAGE = WARPS * 2 * MATRIX
    STEPS, OUTPUTS = D // 16, D // 8
    PART = D + STATISTICS  # floats
    LN_2 = 1 / LOG2_E
    wait_for_oldest, wait_for_all = cp_async_wait[STAGES - 1], cp_async_wait[0]
    ALIGNED = BLOCK > 0 and BLOCK % 16 == 0
    MIN_BLOCKS = 6 if DEPENDENT and ALIGNED and D <= 64 and STAGES == 2 and SHARED_PERCENT is None else 1

    # As many blocks a multiprocessor as shared memory holds: while some begin or end, the others keep memory busy.
    @kernel(signature=SIGNATURE, max_threads=32 * WARPS, min_blocks=MIN_BLOCKS)
    def decode(out, parts, qkv, k_cache, v_cache, block_tables, seq_lens, max_blocks, num_splits, scale,
               num_heads, num_kv_heads, block_size):
        """scale: of the scores, times log2(e). Block y: a key head, and 16 of the query heads that share
        it."""
        thread, lane = thread_index(), lane_index()
        warp, g, q = thread // 32, lane // 4, lane % 4
        if DEPENDENT:
            let_next_kernel_start()
        split, request = block_index_x(), block_index_z()
        group = divide(num_heads, num_kv_heads)
        tiles_of_heads = (group + 15) // 16
        kv_head = divide(block_index_y(), tiles_of_heads)
        first_head = (block_index_y() - kv_head * tiles_of_heads) * 16
        heads = min(group - first_head, 16)
        seq_len = load_i32(seq_lens + np.uint64(request) * np.uint64(4))
        if split * SPLIT >= seq_len:
            if DEPENDENT:
                wait_for_previous_kernel()  # no kernel of a chain ends before the one ahead of it
            return
        end = min((split + 1) * SPLIT, seq_len)
        table = block_tables + np.uint64(request) * np.uint64(max_blocks) * np.uint64(4)
        shared = dynamic_shared()
        own = np.uint32(shared + warp * (2 * MATRIX))  # this warp's part of stage 0

        # ---- the query heads are the rows of A; rows past the last head repeat it ----
        q_row = (qkv + np.uint64(request) * np.uint64((num_heads + 2 * num_kv_heads) * D * 2)
                 + np.uint64((kv_head * group + first_head) * D * 2 + 4 * q))
        q_0 = q_row + np.uint64(min(g, heads - 1) * D * 2)
        q_1 = q_row + np.uint64(min(g + 8, heads - 1) * D * 2)
        queries = cuda.local.array((STEPS, 4), np.uint32)

        copy_key, chunk = lane // CHUNKS, lane % CHUNKS
        copy_to = np.uint32(own + copy_key * PITCH + chunk * 16)
        head_offset = np.uint64(kv_head) * np.uint64(block_size) * np.uint64(2 * D) + np.uint64(chunk * 16)
        block_bytes = np.uint64(num_kv_heads) * np.uint64(block_size) * np.uint64(2 * D)
        k_address = np.uint32(own + (lane % 8 + lane // 16 * 8) * PITCH + (lane // 8) % 2 * 16)
        v_address = np.uint32(own + MATRIX + lane % 16 * PITCH + lane // 16 * 16)
        scores = cuda.local.array((2, 4), np.float32)
        outputs = cuda.local.array((OUTPUTS, 4), np.float32)
        k = cuda.local.array((2, 2), np.uint32)
        v = cuda.local.array((2, 2), np.uint32)
        p = cuda.local.array(4, np.uint32)
        for j in range(OUTPUTS):
            for c in range(4):
                outputs[j, c] = np.float32(0)
        m_0, m_1 = np.float32(-np.inf), np.float32(-np.inf)
        l_0, l_1 = np.float32(0), np.float32(0)

        # No block-wide barrier: a warp copies its own keys, waits for its own copies, and uses them.
        tiles = (end - split * SPLIT + KEYS - 1) // KEYS
        next_block = np.uint32(0)
        if ALIGNED:
            next_block = load_u32(table + np.uint64(min(split * SPLIT + warp * 16, end - 1) // BLOCK) * np.uint64(4))
        for t in range(tiles + STAGES - 1):
            first_key = split * SPLIT + t * KEYS + warp * 16
            if DEPENDENT:
                if t == STAGES - 1 or first_key + 16 >= seq_len:
                    wait_for_previous_kernel()  # (a second wait costs nothing)
            if t == STAGES - 1:
                for s in range(STEPS):
                    queries[s, 0] = load_u32(q_0 + np.uint64(32 * s))
                    queries[s, 1] = load_u32(q_1 + np.uint64(32 * s))
                    queries[s, 2] = load_u32(q_0 + np.uint64(32 * s + 16))
                    queries[s, 3] = load_u32(q_1 + np.uint64(32 * s + 16))
            if ALIGNED and t < tiles and first_key < end:
                stage = np.uint32(copy_to + t % STAGES * STAGE)
                offset = (np.uint64(next_block) * block_bytes + head_offset
                          + np.uint64(first_key % BLOCK + copy_key) * np.uint64(2 * D))
                for i in range(PASSES):
                    key = np.int32(copy_key + i * KEYS_A_PASS)
                    if key < 16 and copy_key < KEYS_A_PASS:
                        size = 16 if first_key + key < end else 0  # zeros, not what the cache holds there
                        further = offset + np.uint64(i * KEYS_A_PASS * 2 * D)
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH, k_cache + further, size)
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH + MATRIX, v_cache + further, size)
                next_block = load_u32(table + np.uint64(min(first_key + KEYS, end - 1) // BLOCK) * np.uint64(4))
            elif t < tiles and first_key < end:
                stage = np.uint32(copy_to + t % STAGES * STAGE)
                for i in range(PASSES):
                    key = np.int32(copy_key + i * KEYS_A_PASS)
                    if key < 16 and copy_key < KEYS_A_PASS:
                        size = 16 if first_key + key < end else 0  # zeros, not what the cache holds there
                        position = np.uint32(min(first_key + key, end - 1))
                        column = divide(position, block_size)
                        block = np.uint64(load_u32(table + np.uint64(column) * np.uint64(4)))
                        offset = (block * block_bytes + head_offset
                                  + np.uint64(position - column * np.uint32(block_size)) * np.uint64(2 * D))
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH, k_cache + offset, size)
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH + MATRIX, v_cache + offset, size)
            cp_async_commit()
            first_key -= (STAGES - 1) * KEYS  # of the tile that is worked on now
            if t >= STAGES - 1 and first_key < end:
                wait_for_oldest()
                warp_barrier()  # the copies of the other lanes have arrived as well
                k_from = np.uint32(k_address + (t - (STAGES - 1)) % STAGES * STAGE)
                v_from = np.uint32(v_address + (t - (STAGES - 1)) % STAGES * STAGE)
                for j in range(2):
                    for c in range(4):
                        scores[j, c] = np.float32(0)
                for s in range(STEPS):
                    k[0, 0], k[0, 1], k[1, 0], k[1, 1] = ldmatrix_x4(k_from + s * 32)
                    for h in range(2):
                        scores[h, 0], scores[h, 1], scores[h, 2], scores[h, 3] = mma_m16n8k16(
                            scores[h, 0], scores[h, 1], scores[h, 2], scores[h, 3],
                            queries[s, 0], queries[s, 1], queries[s, 2], queries[s, 3], k[h, 0], k[h, 1])
                left = np.int32(end - first_key - 2 * q)  # keys from this lane's first on
                new_0, new_1 = m_0, m_1
                for j in range(2):
                    for c in range(2):
                        seen = j * 8 + c < left
                        scores[j, c] = scores[j, c] * scale if seen else np.float32(-np.inf)
                        scores[j, c + 2] = scores[j, c + 2] * scale if seen else np.float32(-np.inf)
                        new_0, new_1 = maximum(new_0, scores[j, c]), maximum(new_1, scores[j, c + 2])
                for lanes in (1, 2):
                    new_0 = maximum(new_0, shuffle_xor(new_0, lanes))
                    new_1 = maximum(new_1, shuffle_xor(new_1, lanes))
                r_0, r_1 = exp2(m_0 - new_0), exp2(m_1 - new_1)
                m_0, m_1 = new_0, new_1
                l_0, l_1 = l_0 * r_0, l_1 * r_1
                for j in range(2):
                    for c in range(2):
                        scores[j, c] = exp2(scores[j, c] - m_0)
                        scores[j, c + 2] = exp2(scores[j, c + 2] - m_1)
                        l_0, l_1 = l_0 + scores[j, c], l_1 + scores[j, c + 2]
                p[0], p[1] = pack_bf16(scores[0, 0], scores[0, 1]), pack_bf16(scores[0, 2], scores[0, 3])
                p[2], p[3] = pack_bf16(scores[1, 0], scores[1, 1]), pack_bf16(scores[1, 2], scores[1, 3])
                for j in range(0, OUTPUTS, 2):
                    v[0, 0], v[0, 1], v[1, 0], v[1, 1] = ldmatrix_x4_transposed(v_from + j * 16)
                    for h in range(2):
                        i = j + h
                        outputs[i, 0], outputs[i, 1] = outputs[i, 0] * r_0, outputs[i, 1] * r_0
                        outputs[i, 2], outputs[i, 3] = outputs[i, 2] * r_1, outputs[i, 3] * r_1
                        outputs[i, 0], outputs[i, 1], outputs[i, 2], outputs[i, 3] = mma_m16n8k16(
                            outputs[i, 0], outputs[i, 1], outputs[i, 2], outputs[i, 3],
                            p[0], p[1], p[2], p[3], v[h, 0], v[h, 1])
                warp_barrier()  # all lanes are done with this stage before any overwrites it

        # ---- merge the warps: each leaves 16 rows of (O, m, l) in shared memory, where its keys were ----
        for lanes in (1, 2):
            l_0, l_1 = l_0 + shuffle_xor(l_0, lanes), l_1 + shuffle_xor(l_1, lanes)
        wait_for_all()
        cuda.syncthreads()
        at_0, at_1 = shared + (warp * 16 + g) * (PART * 4), shared + (warp * 16 + g + 8) * (PART * 4)
        for j in range(OUTPUTS):
            for c in range(2):
                store_shared_f32(at_0 + (j * 8 + 2 * q + c) * 4, outputs[j, c])
                store_shared_f32(at_1 + (j * 8 + 2 * q + c) * 4, outputs[j, c + 2])
        if q == 0:
            store_shared_f32(at_0 + D * 4, m_0)
            store_shared_f32(at_0 + D * 4 + 4, l_0)
            store_shared_f32(at_1 + D * 4, m_1)
            store_shared_f32(at_1 + D * 4 + 4, l_1)
        cuda.syncthreads()
        index = np.int32(thread)
        while index < heads * D:
            row, column = index // D, index % D
            m = np.float32(-np.inf)
            for w in range(WARPS):
                m = maximum(m, load_shared_f32(shared + ((w * 16 + row) * PART + D) * 4))
            denominator, total = np.float32(0), np.float32(0)
            for w in range(WARPS):
                at = shared + (w * 16 + row) * (PART * 4)
                weight = exp2(load_shared_f32(at + D * 4) - m)  # a warp without keys has m = -inf, weight 0
                denominator = denominator + weight * load_shared_f32(at + D * 4 + 4)
                total = total + weight * load_shared_f32(at + column * 4)
            head = kv_head * group + first_head + row
            if seq_len <= SPLIT:  # the only part: finished
                store_u16(out + np.uint64((request * num_heads + head) * D + column) * np.uint64(2),
                          narrow_cuda(total / denominator))
            else:
                number = np.uint64(request * num_heads + head) * np.uint64(num_splits) + np.uint64(split)
                part = parts + number * np.uint64(PART * 4)
                store_f32(part + np.uint64(column * 4), total)
                if column == 0:
                    # the combine counts in powers of e
                    store_f32(part + np.uint64(D * 4), m * np.float32(LN_2))
                    store_f32(part + np.uint64(D * 4 + 4), denominator)
            index += np.int32(32 * WARPS)

    decode.threads = 32 * WARPS
    decode.shared_percent = SHARED_PERCENT
    decode.shared_bytes = max(STAGES * STAGE, WARPS * 16 * PART * 4)
    return decode


def decode_attention_cuda(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes,
                          scale, num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy for the first num_decodes requests, on device arrays (see
    prefill.tensor_core_can_run)."""
    splits = ceil_div(block_tables.shape[1] * block_size, SPLIT)
    parts = workspace(num_decodes * num_heads * splits * (head_dim + STATISTICS) if splits > 1 else 1)
    decode = decode_kernel(head_dim)
    grid = splits, num_kv_heads * ceil_div(num_heads // num_kv_heads, 16), num_decodes
    decode[grid, decode.threads, 0, decode.shared_bytes](
        pointer(out), pointer(parts), pointer(qkv), pointer(k_cache), pointer(v_cache), pointer(block_tables),
        pointer(seq_lens), block_tables.shape[1], splits, scale * LOG2_E, num_heads, num_kv_heads, block_size)
    if splits > 1:
        combine_kernel[(num_heads, num_decodes), 64](
            out, parts, seq_lens, splits, SPLIT, 2, num_heads, head_dim)
