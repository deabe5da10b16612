"""Prefill attention: many query rows of a request at once, keys and values read through the block table.

Materialising the scores of a prompt of n tokens takes n x n numbers a head. Instead a block of threads owns a
tile of query rows and walks over the keys in tiles, with the online softmax (softmax.py) holding each row's
running maximum m, running sum l and running output O:

    for each tile of keys, from position 0 up:
        S  = Q K^T * scale                masked where a key lies beyond the row's position
        m' = max(m, rowmax(S))            r = exp(m - m')          what the old sum is worth now
        P  = exp(S - m')
        l  = l * r + rowsum(P)            O = O * r + P V
    out = O / l

The scores never leave the chip. prefill_simple.py does just this, one score a thread; read it first. Here the
products run on tensor cores (mma.sync), and keys and values are copied asynchronously, one tile ahead of the
arithmetic.

Grouped-query attention: the G query heads that share a key and value head want the same keys. The kernel
therefore makes a row of (token, head of the group): a tile of 64 rows is 64 / G tokens with their G heads,
and each key tile is fetched once for all of them.

Chunks and prefix hits need no case of their own: a row knows its absolute position, keys come from the cache
whoever wrote them, and tiles start at position 0, so a row adds in the same order however its prompt was cut.
A tile that lies beyond a row's position changes nothing in that row, to the bit: P is 0 and r is 1.

Which request does a block belong to? The lengths are on the device, where the grid is not known. Request r's
tiles start at r + (its first row) // (tokens a tile): at least one number for every tile that can exist, in
ascending order. So a block finds its request by bisection, and those that get a number that no tile has
return at once.

Source: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023).
"""

import functools

import numpy as np

from tinyvllm.kernels.attention.prefill_simple import num_tiles
from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel, pointer
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    divide,
    dynamic_shared,
    exp2,
    grid_size_x,
    lane_index,
    ldmatrix_x4,
    ldmatrix_x4_transposed,
    load_i32,
    load_u32,
    maximum,
    mma_m16n8k16,
    pack_bf16,
    shuffle_xor,
    store_u32,
    thread_index,
)

__all__ = ["prefill_attention_cuda", "prefill_kernel", "tensor_core_can_run"]

LOG2_E = 1.4426950408889634

WARPS = 4
ROWS = 16 * WARPS  # (token, head) rows of a tile
THREADS = 32 * WARPS
SIGNATURE = ("uint64",) * 7 + ("int32", "int32", "int32", "float32", "int32", "int32", "int32")


def tensor_core_can_run(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whole mma steps along head_dim, and at least one token a tile."""
    return head_dim % 16 == 0 and head_dim <= 128 and num_heads // num_kv_heads <= ROWS


def key_tile(head_dim: int) -> int:
    """Keys a tile: two stages of keys and values fit in 48 KiB."""
    return 64 if head_dim <= 80 else 32


@functools.cache
def prefill_kernel(D: int):
    """The kernel for head_dim D (a constant in it)."""
    KEYS = key_tile(D)
    CHUNKS = D // 8  # 16-byte pieces of a key
    # that all threads copy at once, a chunk each; some threads may be left over
    KEYS_A_PASS = THREADS // CHUNKS
    PASSES = ceil_div(KEYS, KEYS_A_PASS)
    # bytes a key takes in shared memory: an odd number of chunks, so 8 rows hit 8 different banks
    PITCH = 2 * D + 16
    MATRIX = KEYS * PITCH  # one tile of keys or of values
    STAGE = 2 * MATRIX
    # mma steps of Q K^T; mma tiles along keys; along head_dim
    STEPS, SCORES, OUTPUTS = D // 16, KEYS // 8, D // 8
    wait_for_all_but_one = cp_async_wait[1]

    @kernel(signature=SIGNATURE, max_threads=THREADS)
    def prefill(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes,
                num_requests, max_blocks, scale, num_heads, num_kv_heads, block_size):
        """scale: of the scores, times log2(e), because exp2 is what the hardware has."""
        thread, lane = thread_index(), lane_index()
        warp, g, q = thread // 32, lane // 4, lane % 4
        kv_head = block_index_y()
        group = divide(num_heads, num_kv_heads)
        tokens = divide(ROWS, group)  # a tile; rows past tokens * group are idle
        shared = dynamic_shared()

        # ---- which request, which of its tiles; the last tiles have the most keys and start first ----
        number = grid_size_x() - 1 - block_index_x()
        low, high = num_decodes, num_requests - 1
        while low < high:
            middle = (low + high + 1) >> 1
            start = load_i32(query_start_loc + np.uint64(middle) * np.uint64(4))
            if divide(start - num_decodes, tokens) + middle - num_decodes <= number:
                low = middle
            else:
                high = middle - 1
        first_row = load_i32(query_start_loc + np.uint64(low) * np.uint64(4))
        rows = load_i32(query_start_loc + np.uint64(low + 1) * np.uint64(4)) - first_row
        first_token = (number - (divide(first_row - num_decodes, tokens) + low - num_decodes)) * tokens
        if first_token >= rows:
            return
        seq_len = load_i32(seq_lens + np.uint64(low) * np.uint64(4))
        context = seq_len - rows  # position of the request's first query row
        table = block_tables + np.uint64(low) * np.uint64(max_blocks) * np.uint64(4)
        num_keys = context + min(first_token + tokens, rows)  # that the tile's last row sees

        # ---- the two rows of this lane, g and g + 8 of its warp's 16; idle rows repeat the last token ----
        row_stride = np.uint64((num_heads + 2 * num_kv_heads) * D * 2)
        row_0, row_1 = warp * 16 + g, warp * 16 + g + 8
        group_0, group_1 = divide(row_0, group), divide(row_1, group)
        token_0, token_1 = first_token + group_0, first_token + group_1
        position_0, position_1 = context + min(token_0, rows - 1), context + min(token_1, rows - 1)
        head_0, head_1 = kv_head * group + row_0 - group_0 * group, kv_head * group + row_1 - group_1 * group
        q_0 = qkv + np.uint64(first_row + min(token_0, rows - 1)) * row_stride
        q_1 = qkv + np.uint64(first_row + min(token_1, rows - 1)) * row_stride
        q_0, q_1 = q_0 + np.uint64((head_0 * D + 2 * q) * 2), q_1 + np.uint64((head_1 * D + 2 * q) * 2)
        queries = cuda.local.array((STEPS, 4), np.uint32)
        for s in range(STEPS):
            queries[s, 0] = load_u32(q_0 + np.uint64(32 * s))
            queries[s, 1] = load_u32(q_1 + np.uint64(32 * s))
            queries[s, 2] = load_u32(q_0 + np.uint64(32 * s + 16))
            queries[s, 3] = load_u32(q_1 + np.uint64(32 * s + 16))

        # ---- what this thread copies of each tile: one chunk of every KEYS_A_PASS-th key ----
        copy_key, chunk = thread // CHUNKS, thread % CHUNKS
        copy_to = np.uint32(shared + copy_key * PITCH + chunk * 16)
        head_offset = np.uint64(kv_head) * np.uint64(block_size) * np.uint64(2 * D) + np.uint64(chunk * 16)
        block_bytes = np.uint64(num_kv_heads) * np.uint64(block_size) * np.uint64(2 * D)

        # ---- where this lane's ldmatrix rows are in a tile of keys, and of values ----
        k_address = np.uint32(shared + (lane % 8 + lane // 16 * 8) * PITCH + (lane // 8) % 2 * 16)
        v_address = np.uint32(shared + MATRIX + lane % 16 * PITCH + lane // 16 * 16)

        scores = cuda.local.array((SCORES, 4), np.float32)
        outputs = cuda.local.array((OUTPUTS, 4), np.float32)
        k = cuda.local.array((2, 2), np.uint32)
        v = cuda.local.array((2, 2), np.uint32)
        p = cuda.local.array(4, np.uint32)
        for j in range(OUTPUTS):
            for c in range(4):
                outputs[j, c] = np.float32(0)
        m_0, m_1 = np.float32(-np.inf), np.float32(-np.inf)
        l_0, l_1 = np.float32(0), np.float32(0)

        # Tile t is copied while tile t - 1 is worked on; the loop runs once more than there are tiles.
        tiles = (num_keys + KEYS - 1) // KEYS
        for t in range(tiles + 1):
            if t < tiles:
                stage = np.uint32(copy_to + t % 2 * STAGE)
                for i in range(PASSES):
                    key = np.int32(copy_key + i * KEYS_A_PASS)
                    if key < KEYS and copy_key < KEYS_A_PASS:
                        # Keys beyond the context are zeros, not what the cache holds there: 0 * NaN would be
                        # NaN.
                        size = 16 if t * KEYS + key < seq_len else 0
                        position = np.uint32(min(t * KEYS + key, seq_len - 1))
                        column = divide(position, block_size)
                        block = np.uint64(load_u32(table + np.uint64(column) * np.uint64(4)))
                        offset = (block * block_bytes + head_offset
                                  + np.uint64(position - column * np.uint32(block_size)) * np.uint64(2 * D))
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH, k_cache + offset, size)
                        cp_async_16(stage + i * KEYS_A_PASS * PITCH + MATRIX, v_cache + offset, size)
            cp_async_commit()
            if t > 0:
                wait_for_all_but_one()
                cuda.syncthreads()
                k_from = np.uint32(k_address + (t - 1) % 2 * STAGE)
                v_from = np.uint32(v_address + (t - 1) % 2 * STAGE)

                # ---- S = Q K^T: 16 rows x KEYS keys a warp ----
                for j in range(SCORES):
                    for c in range(4):
                        scores[j, c] = np.float32(0)
                for s in range(STEPS):
                    for j in range(0, SCORES, 2):
                        k[0, 0], k[0, 1], k[1, 0], k[1, 1] = ldmatrix_x4(k_from + j * 8 * PITCH + s * 32)
                        for h in range(2):
                            i = j + h
                            scores[i, 0], scores[i, 1], scores[i, 2], scores[i, 3] = mma_m16n8k16(
                                scores[i, 0], scores[i, 1], scores[i, 2], scores[i, 3],
                                queries[s, 0], queries[s, 1], queries[s, 2], queries[s, 3], k[h, 0], k[h, 1])

                # ---- causal mask, in the tiles that reach beyond a row's position ----
                # this lane's first score has key 0 here
                last_0 = np.int32(position_0 - (t - 1) * KEYS - 2 * q)
                last_1 = np.int32(position_1 - (t - 1) * KEYS - 2 * q)
                if min(last_0, last_1) < KEYS:
                    for j in range(SCORES):
                        for c in range(2):
                            if j * 8 + c > last_0:
                                scores[j, c] = np.float32(-np.inf)
                            if j * 8 + c > last_1:
                                scores[j, c + 2] = np.float32(-np.inf)

                # ---- the four lanes of a row exchange their maxima ----
                new_0, new_1 = m_0, m_1
                for j in range(SCORES):
                    for c in range(2):
                        new_0, new_1 = maximum(new_0, scores[j, c]), maximum(new_1, scores[j, c + 2])
                for lanes in (1, 2):
                    new_0 = maximum(new_0, shuffle_xor(new_0, lanes))
                    new_1 = maximum(new_1, shuffle_xor(new_1, lanes))

                # ---- P = exp(S - m); the sums stay per lane until the end ----
                r_0, r_1 = exp2((m_0 - new_0) * scale), exp2((m_1 - new_1) * scale)
                m_0, m_1 = new_0, new_1
                m_scaled_0, m_scaled_1 = m_0 * scale, m_1 * scale
                l_0, l_1 = l_0 * r_0, l_1 * r_1
                for j in range(SCORES):
                    for c in range(2):
                        scores[j, c] = exp2(scores[j, c] * scale - m_scaled_0)
                        scores[j, c + 2] = exp2(scores[j, c + 2] * scale - m_scaled_1)
                        l_0, l_1 = l_0 + scores[j, c], l_1 + scores[j, c + 2]

                # ---- O = O * r + P V. P comes out of one mma just as the next one wants it ----
                for j in range(OUTPUTS):
                    outputs[j, 0], outputs[j, 1] = outputs[j, 0] * r_0, outputs[j, 1] * r_0
                    outputs[j, 2], outputs[j, 3] = outputs[j, 2] * r_1, outputs[j, 3] * r_1
                for s in range(KEYS // 16):
                    p[0] = pack_bf16(scores[2 * s, 0], scores[2 * s, 1])
                    p[1] = pack_bf16(scores[2 * s, 2], scores[2 * s, 3])
                    p[2] = pack_bf16(scores[2 * s + 1, 0], scores[2 * s + 1, 1])
                    p[3] = pack_bf16(scores[2 * s + 1, 2], scores[2 * s + 1, 3])
                    for j in range(0, OUTPUTS, 2):
                        v[0, 0], v[0, 1], v[1, 0], v[1, 1] = ldmatrix_x4_transposed(
                            v_from + s * 16 * PITCH + j * 16)
                        for h in range(2):
                            i = j + h
                            outputs[i, 0], outputs[i, 1], outputs[i, 2], outputs[i, 3] = mma_m16n8k16(
                                outputs[i, 0], outputs[i, 1], outputs[i, 2], outputs[i, 3],
                                p[0], p[1], p[2], p[3], v[h, 0], v[h, 1])
                cuda.syncthreads()  # all are done with this stage; the next round of the loop overwrites it

        for lanes in (1, 2):
            l_0, l_1 = l_0 + shuffle_xor(l_0, lanes), l_1 + shuffle_xor(l_1, lanes)
        l_0, l_1 = np.float32(1) / l_0, np.float32(1) / l_1
        out_stride = np.uint64(num_heads * D * 2)
        out_0 = out + np.uint64(first_row + token_0) * out_stride + np.uint64((head_0 * D + 2 * q) * 2)
        out_1 = out + np.uint64(first_row + token_1) * out_stride + np.uint64((head_1 * D + 2 * q) * 2)
        used = tokens * group
        for j in range(OUTPUTS):
            if row_0 < used and token_0 < rows:
                store_u32(out_0 + np.uint64(16 * j), pack_bf16(outputs[j, 0] * l_0, outputs[j, 1] * l_0))
            if row_1 < used and token_1 < rows:
                store_u32(out_1 + np.uint64(16 * j), pack_bf16(outputs[j, 2] * l_1, outputs[j, 3] * l_1))

    prefill.shared_bytes = 2 * STAGE
    return prefill


def prefill_attention_cuda(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes,
                           scale, num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy for the requests after the first num_decodes, on device arrays (see
    tensor_core_can_run)."""
    tokens = ROWS // (num_heads // num_kv_heads)
    tiles = num_tiles(out.shape[0], num_decodes, seq_lens.shape[0], tokens)
    prefill = prefill_kernel(head_dim)
    prefill[(tiles, num_kv_heads), THREADS, 0, prefill.shared_bytes](
        pointer(out), pointer(qkv), pointer(k_cache), pointer(v_cache), pointer(block_tables),
        pointer(seq_lens), pointer(query_start_loc), num_decodes, seq_lens.shape[0], block_tables.shape[1],
        scale * LOG2_E, num_heads, num_kv_heads, block_size)
