"""Prefill attention, the simple version: tiles and online softmax in float32, one score a thread.

The algorithm is the one described in prefill.py, without tensor cores, asynchronous copies or grouped heads:
a block owns 8 query rows of one head and walks over the keys in tiles of 16, all in shared memory. It takes
any head_dim up to 256 and any block size, and it runs in the simulator, so that it can be read with a
debugger.
"""

import math

import numpy as np

from tinyvllm.errors import DeviceError
from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["prefill_attention_simple_cuda", "num_tiles"]

QUERIES, KEYS, MAX_HEAD_DIM = 8, 16, 256  # a tile; head_dim at most (shared memory)


@device_function
def _find_request(block, query_start_loc, num_decodes, num_requests, tokens):
    """(request, index of its tile) for a block number; see prefill.py."""
    low, high = num_decodes, num_requests - 1
    while low < high:  # the last request that starts at or before `block`
        middle = (low + high + 1) // 2
        if (query_start_loc[middle] - num_decodes) // tokens + middle - num_decodes <= block:
            low = middle
        else:
            high = middle - 1
    return low, block - ((query_start_loc[low] - num_decodes) // tokens + low - num_decodes)


@kernel
def _prefill_simple_kernel(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes,
                           scale, num_heads, num_kv_heads, head_dim, block_size):
    """A block: 8 query rows of one head. Its 8 x 16 threads hold one score each."""
    q_tile = cuda.shared.array((QUERIES, MAX_HEAD_DIM), np.float32)
    o_tile = cuda.shared.array((QUERIES, MAX_HEAD_DIM), np.float32)
    k_tile = cuda.shared.array((KEYS, MAX_HEAD_DIM), np.uint16)
    v_tile = cuda.shared.array((KEYS, MAX_HEAD_DIM), np.uint16)
    p_tile = cuda.shared.array((QUERIES, KEYS), np.float32)
    column, row = cuda.threadIdx.x, cuda.threadIdx.y
    head = cuda.blockIdx.y
    kv_head = head // (num_heads // num_kv_heads)
    request, tile = _find_request(cuda.blockIdx.x, query_start_loc, num_decodes, seq_lens.shape[0], QUERIES)
    rows = query_start_loc[request + 1] - query_start_loc[request]
    if tile * QUERIES >= rows:
        return

    # Rows past the end repeat the last one, so that every thread has something finite to work on.
    token = query_start_loc[request] + min(tile * QUERIES + row, rows - 1)
    position = seq_lens[request] - rows + min(tile * QUERIES + row, rows - 1)
    last_position = seq_lens[request] - rows + min(tile * QUERIES + QUERIES - 1, rows - 1)
    for i in range(column, head_dim, KEYS):
        q_tile[row, i] = widen_cuda(qkv[token, head * head_dim + i])
        o_tile[row, i] = np.float32(0)

    m, denominator = np.float32(-np.inf), np.float32(0)  # each of a row's 16 threads keeps its own copy
    for k0 in range(0, last_position + 1, KEYS):
        cuda.syncthreads()  # all are done with the last tile
        if k0 + row < seq_lens[request]:  # 8 rows of threads fetch 16 keys in two goes
            block = block_tables[request, (k0 + row) // block_size]
            for i in range(column, head_dim, KEYS):
                k_tile[row, i] = k_cache[block, kv_head, (k0 + row) % block_size, i]
                v_tile[row, i] = v_cache[block, kv_head, (k0 + row) % block_size, i]
        else:
            for i in range(column, head_dim, KEYS):
                k_tile[row, i] = 0
                v_tile[row, i] = 0
        if k0 + row + QUERIES < seq_lens[request]:
            block = block_tables[request, (k0 + row + QUERIES) // block_size]
            for i in range(column, head_dim, KEYS):
                k_tile[row + QUERIES, i] = k_cache[block, kv_head, (k0 + row + QUERIES) % block_size, i]
                v_tile[row + QUERIES, i] = v_cache[block, kv_head, (k0 + row + QUERIES) % block_size, i]
        else:
            for i in range(column, head_dim, KEYS):
                k_tile[row + QUERIES, i] = 0
                v_tile[row + QUERIES, i] = 0
        cuda.syncthreads()

        score = np.float32(0)
        for i in range(head_dim):
            score += q_tile[row, i] * widen_cuda(k_tile[column, i])
        p_tile[row, column] = np.float32(score * scale) if k0 + column <= position else np.float32(-np.inf)
        cuda.syncthreads()

        new_m = m
        for j in range(KEYS):
            new_m = max(new_m, p_tile[row, j])
        # the first tile holds key 0, which every row sees: new_m is finite
        r = np.float32(math.exp(m - new_m))
        denominator = np.float32(denominator * r)
        for j in range(KEYS):
            denominator += np.float32(math.exp(p_tile[row, j] - new_m))
        for i in range(column, head_dim, KEYS):
            total = np.float32(o_tile[row, i] * r)
            for j in range(KEYS):
                total += np.float32(math.exp(p_tile[row, j] - new_m)) * widen_cuda(v_tile[j, i])
            o_tile[row, i] = total
        m = new_m

    if tile * QUERIES + row < rows:
        for i in range(column, head_dim, KEYS):
            out[token, head * head_dim + i] = narrow_cuda(np.float32(o_tile[row, i] / denominator))


def num_tiles(num_tokens: int, num_decodes: int, num_requests: int, tokens: int) -> int:
    """Blocks that can find a tile: see prefill.py."""
    return (num_tokens - num_decodes) // tokens + num_requests - num_decodes


def prefill_attention_simple_cuda(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc,
                                  num_decodes, scale, num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy for the requests after the first num_decodes, on device arrays; head_dim at most
    256."""
    if head_dim > MAX_HEAD_DIM:
        raise DeviceError(f"head_dim {head_dim} is more than attention on the GPU can take ({MAX_HEAD_DIM}); "
                          'use device="cpu"')
    tiles = num_tiles(out.shape[0], num_decodes, seq_lens.shape[0], QUERIES)
    _prefill_simple_kernel[(tiles, num_heads), (KEYS, QUERIES)](
        out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, np.float32(scale),
        num_heads, num_kv_heads, head_dim, block_size)
