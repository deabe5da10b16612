"""Causal attention over the paged cache, on the CPU: flash attention's online softmax, one pass over the keys.

Softmax needs the largest score before it can weigh a value, which asks for two passes, or for a row of scores as long
as the context. Online softmax instead keeps, for each query, what the keys so far would give:

    m = largest score,   l = sum of exp(score - m),   acc = sum of exp(score - m) * v

and when a tile of keys brings a larger score, scales l and acc by exp(m_old - m_new) and goes on. At the end
out = acc / l.

    keys       |<- tile 0: 0..63 ->|<- tile 1: 64..127 ->| ...          tiles start at position 0, whatever the chunk
    query 70    oooooooooooooooooo  ooooooo................             o: visible (position <= 70)   .: not looked at

A task is one key/value head and up to 16 query rows of a request. Its keys and values are read through the block table
and widened to float32 a tile at a time, once for all its rows and for all query heads that share the head (GQA).

A query's result is the same sequence of operations whatever is computed beside it: the tiles are those of absolute key
positions, keys and values are added in ascending order, and a key behind the query is never touched. So it has the
same bits in a chunk, after a prefix hit, in a batch, alone and with any number of threads.

Source: Dao et al., "FlashAttention" (2022); Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import numba
import numpy as np
from numba import prange

from tinyvllm.kernels.bf16 import narrow, widen
from tinyvllm.kernels.exp import exp_cpu
from tinyvllm.kernels.jit import cpu_helper, cpu_jit, thread_count

__all__ = ["attention_cpu"]

TILE = 64  # keys
ROWS = 16  # query rows of a task
SERIAL_WORK = 1 << 18  # (query, key, feature) triples below which one thread does it all


@cpu_jit(parallel=True)
def attention_cpu(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                  num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy."""
    num_requests = seq_lens.shape[0]
    row_groups, work = 0, 0
    for r in range(num_requests):
        rows = query_start_loc[r + 1] - query_start_loc[r]
        row_groups += (rows + ROWS - 1) // ROWS
        work += rows * seq_lens[r] * num_heads * head_dim
    group_request = np.empty(row_groups, np.int64)
    group_row = np.empty(row_groups, np.int64)
    i = 0
    for r in range(num_requests):
        for row in range(query_start_loc[r], query_start_loc[r + 1], ROWS):
            group_request[i], group_row[i] = r, row
            i += 1

    num_threads = thread_count() if work >= SERIAL_WORK else 1
    if num_threads == 1:
        _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, num_heads, num_kv_heads,
                   head_dim, block_size, group_request, group_row, 0, 1)
    else:
        for thread in prange(num_threads):
            _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, num_heads,
                       num_kv_heads, head_dim, block_size, group_request, group_row, thread, num_threads)


@cpu_helper
def _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, num_heads, num_kv_heads,
               head_dim, block_size, group_request, group_row, thread, num_threads):
    """Every num_threads-th task from number `thread` on, so that all get both short and long contexts."""
    heads_per_kv = num_heads // num_kv_heads
    queries = ROWS * heads_per_kv
    q = np.empty((queries, head_dim), np.float32)
    acc = np.empty((queries, head_dim), np.float32)
    largest = np.empty(queries, np.float32)
    total = np.empty(queries, np.float32)
    k = np.empty((TILE, head_dim), np.float32)
    v = np.empty((TILE, head_dim), np.float32)
    weights = np.empty(TILE, np.float32)
    for task in range(thread, group_request.shape[0] * num_kv_heads, num_threads):
        group, kv_head = task // num_kv_heads, task % num_kv_heads
        r, first_row = group_request[group], group_row[group]
        end_row = query_start_loc[r + 1]
        num_rows = min(ROWS, end_row - first_row)
        first_position = seq_lens[r] - end_row + first_row
        for i in range(num_rows * heads_per_kv):
            row, head = first_row + i // heads_per_kv, kv_head * heads_per_kv + i % heads_per_kv
            for d in range(head_dim):
                q[i, d] = widen(qkv[row, head * head_dim + d])
                acc[i, d] = 0
            largest[i], total[i] = -np.inf, 0
        end = first_position + num_rows  # keys that the last of these rows sees
        for start in range(0, end, TILE):
            for j in range(min(TILE, end - start)):
                block = block_tables[r, (start + j) // block_size]
                offset = (start + j) % block_size
                for d in range(head_dim):
                    k[j, d] = widen(k_cache[block, kv_head, offset, d])
                    v[j, d] = widen(v_cache[block, kv_head, offset, d])
            for i in range(num_rows * heads_per_kv):
                visible = min(TILE, first_position + i // heads_per_kv + 1 - start)
                if visible > 0:
                    _add_tile(acc[i], largest, total, i, q[i], k, v, visible, scale, weights)
        for i in range(num_rows * heads_per_kv):
            row, head = first_row + i // heads_per_kv, kv_head * heads_per_kv + i % heads_per_kv
            inverse = np.float32(1) / total[i]
            for d in range(head_dim):
                out[row, head * head_dim + d] = narrow(acc[i, d] * inverse)


# "reassoc" lets the sum run in vector lanes; how they are added up depends on head_dim and the processor alone.
@numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy", nogil=True)
def _dot(a, b):
    total = np.float32(0)
    for d in range(a.shape[0]):
        total += a[d] * b[d]
    return total


@cpu_helper
def _add_tile(acc, largest, total, i, q, k, v, visible, scale, weights):
    """Let query i see the first `visible` keys and values of a tile."""
    old = largest[i]
    new = old
    for j in range(visible):
        weights[j] = _dot(q, k[j]) * np.float32(scale)
        new = weights[j] if weights[j] > new else new
    rescale = exp_cpu(old - new)  # 0 at the first tile
    for j in range(visible):
        weights[j] = exp_cpu(weights[j] - new)
    tile_total = np.float32(0)
    for j in range(visible):
        tile_total += weights[j]
    total[i] = total[i] * rescale + tile_total
    largest[i] = new
    for d in range(acc.shape[0]):
        acc[d] *= rescale
    # Four values at a time, so that acc is loaded and stored once for four; added in ascending order all the same.
    whole = visible // 4 * 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        v0, v1, v2, v3 = v[j], v[j + 1], v[j + 2], v[j + 3]
        for d in range(acc.shape[0]):
            acc[d] = acc[d] + w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
    for j in range(whole, visible):
        weight, value = weights[j], v[j]
        for d in range(acc.shape[0]):
            acc[d] = acc[d] + weight * value[d]
