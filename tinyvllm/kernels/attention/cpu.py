"""Causal attention over the paged cache, on the CPU: online softmax, one pass over the keys.

Softmax needs the largest score before it can weigh a value, which asks for two passes, or for a row of scores
as long as the context. Online softmax instead keeps, for each query, what the keys so far would give:

    m = largest score,   l = sum of exp(score - m),   acc = sum of exp(score - m) * v

and when a tile of keys brings a larger score, scales l and acc by exp(m_old - m_new) and goes on. At the end
out = acc / l.

    keys       |<- tile 0: 0..63 ->|<- tile 1: 64..127 ->| ...   tiles start at position 0, whatever the chunk
    query 70    oooooooooooooooooo  ooooooo................      o: visible (position <= 70)   .: score -inf

A task is one key/value head and some query rows of a request, up to 64 queries with all query heads that
share the head (GQA). A tile's keys and values are read once for all of them, through the block table: keys
are packed like a weight, so that scores = q @ k.T is the linear layer's tile (gemm/tile.py), values are
widened to float32.

A query's result is the same sequence of operations whatever is computed beside it: tiles are those of
absolute key positions, keys and values are added in ascending order or in lanes that depend on the position
alone, and what a query must not see weighs exactly zero. So it has the same bits in a chunk, after a prefix
hit, in a batch, alone and with any number of threads.

Source: Dao et al., "FlashAttention" (2022); Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018).
"""

import numpy as np
from numba import prange

from tinyvllm.kernels.attention.vectors import make_value_tile, row_max, row_sum
from tinyvllm.kernels.bf16 import narrow, widen
from tinyvllm.kernels.exp import exp_cpu
from tinyvllm.kernels.gemm.cpu import TILES, WIDE
from tinyvllm.kernels.gemm.packing import PANEL
from tinyvllm.kernels.gemm.tile import STEP, make_tile, pack_block
from tinyvllm.kernels.jit import cpu_helper, cpu_jit, thread_count

__all__ = ["attention_cpu"]

TILE = 64  # keys
QUERIES = 64  # of a task: rows times query heads that share a key/value head
PARALLEL_WORK = 1 << 20  # (query, key, feature) triples from which on several threads pay
NEVER = np.float32(-np.inf)

SCORE_ROWS, SCORE_PANELS = TILES.few
_score_tile = make_tile(SCORE_ROWS, SCORE_PANELS, STEP)
VALUE_ROWS, VALUE_COLUMNS = 4, 2 * PANEL if TILES is WIDE else PANEL
_value_tile = make_value_tile(VALUE_ROWS, VALUE_COLUMNS // PANEL)
_value_tile_one_row = make_value_tile(1, VALUE_COLUMNS // PANEL)


@cpu_jit(parallel=True)
def attention_cpu(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                  num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy."""
    rows_per_task = max(1, QUERIES // (num_heads // num_kv_heads))
    num_groups, work = 0, 0
    for r in range(seq_lens.shape[0]):
        rows = query_start_loc[r + 1] - query_start_loc[r]
        num_groups += (rows + rows_per_task - 1) // rows_per_task
        work += rows * seq_lens[r] * num_heads * head_dim
    groups = np.empty((num_groups, 2), np.int64)  # request, first row
    i = 0
    for r in range(seq_lens.shape[0]):
        for row in range(query_start_loc[r], query_start_loc[r + 1], rows_per_task):
            groups[i, 0], groups[i, 1] = r, row
            i += 1

    num_threads = thread_count()
    if num_threads == 1 or work < PARALLEL_WORK:
        _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, np.float32(scale),
                   num_heads, num_kv_heads, head_dim, block_size, groups, rows_per_task,
                   np.int64(0), np.int64(1))
    else:
        for i in prange(num_threads):
            thread = np.int64(i)
            _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, np.float32(scale),
                       num_heads, num_kv_heads, head_dim, block_size, groups, rows_per_task,
                       thread, num_threads)


@cpu_helper
def _run_tasks(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale,
               num_heads, num_kv_heads, head_dim, block_size, groups, rows_per_task, thread, num_threads):
    """Every num_threads-th task from number `thread` on, so that all get both short and long contexts."""
    heads_per_kv = num_heads // num_kv_heads
    max_queries = rows_per_task * heads_per_kv
    q = np.empty((max_queries, head_dim), np.uint16)
    width = (head_dim + VALUE_COLUMNS - 1) // VALUE_COLUMNS * VALUE_COLUMNS
    acc = np.empty((max_queries, width), np.float32)
    largest = np.empty(max_queries, np.float32)
    total = np.empty(max_queries, np.float32)
    keys = np.empty((TILE, head_dim), np.uint16)
    packed_keys = np.empty((TILE // PANEL, head_dim // 2, 2 * PANEL), np.uint16)
    values = np.zeros((TILE, width), np.float32)
    scores = np.empty((max_queries + SCORE_ROWS, TILE), np.float32)

    for task in range(thread, groups.shape[0] * num_kv_heads, num_threads):
        group, kv_head = task // num_kv_heads, task % num_kv_heads
        r, first_row = groups[group, 0], groups[group, 1]
        end_row = np.int64(query_start_loc[r + 1])
        num_rows = min(rows_per_task, end_row - first_row)
        num_queries = num_rows * heads_per_kv
        first_position = seq_lens[r] - end_row + first_row
        for i in range(num_queries):
            row, head = first_row + i // heads_per_kv, kv_head * heads_per_kv + i % heads_per_kv
            for d in range(head_dim):
                q[i, d] = qkv[row, head * head_dim + d]
            for d in range(width):
                acc[i, d] = 0
            largest[i], total[i] = NEVER, 0

        end = first_position + num_rows  # keys that the last of these rows sees
        for start in range(0, end, TILE):
            count = min(TILE, end - start)
            for j in range(count):
                block = block_tables[r, (start + j) // block_size]
                offset = (start + j) % block_size
                for d in range(head_dim):
                    keys[j, d] = k_cache[block, kv_head, offset, d]
                for d in range(head_dim):
                    values[j, d] = widen(v_cache[block, kv_head, offset, d])
            _pack_keys(packed_keys, keys, count)
            for i in range(0, num_queries, SCORE_ROWS):
                for panel in range(0, (count + PANEL - 1) // PANEL, SCORE_PANELS):
                    _score_tile(scores, q, packed_keys, i, panel, i, panel * PANEL)
            _weigh(scores, largest, total, acc, num_queries, first_position + 1 - start, heads_per_kv, scale)
            _add_values(acc, scores, values, num_queries, first_position + 1 - start, heads_per_kv)

        for i in range(num_queries):
            row, head = first_row + i // heads_per_kv, kv_head * heads_per_kv + i % heads_per_kv
            inverse = np.float32(1) / total[i]
            for d in range(head_dim):
                out[row, head * head_dim + d] = narrow(acc[i, d] * inverse)


@cpu_helper
def _pack_keys(packed, keys, count):
    """keys uint16 [64, D] -> packed uint16 [4, D / 2, 32], as many whole panels as `count` keys touch."""
    num_pairs = packed.shape[1]
    in_blocks = num_pairs // 8 * 8
    for panel in range((count + PANEL - 1) // PANEL):
        for pair in range(0, in_blocks, 8):
            pack_block(packed, keys, panel, pair)
        for pair in range(in_blocks, num_pairs):
            for n in range(PANEL):
                packed[panel, pair, 2 * n] = keys[panel * PANEL + n, 2 * pair]
                packed[panel, pair, 2 * n + 1] = keys[panel * PANEL + n, 2 * pair + 1]


@cpu_helper
def _weigh(scores, largest, total, acc, num_queries, first_visible, heads_per_kv, scale):
    """Turn a tile's scores into weights exp(score - m) with the new m; rescale what was summed before.

    Query i sees the first first_visible + i // heads_per_kv of the tile's keys; that may be none, or more
    than all.
    """
    for i in range(num_queries):
        visible = first_visible + i // heads_per_kv
        if visible > 0:
            for j in range(TILE):
                scores[i, j] = scores[i, j] * scale if j < visible else NEVER
            old, new = largest[i], row_max(scores, i)
            if new > old:
                rescale = exp_cpu(old - new)  # 0 at the first tile
                for d in range(acc.shape[1]):
                    acc[i, d] *= rescale
                total[i] *= rescale
                largest[i] = new
            for j in range(TILE):
                scores[i, j] = exp_cpu(scores[i, j] - largest[i])
            total[i] += row_sum(scores, i)


@cpu_helper
def _add_values(acc, weights, values, num_queries, first_visible, heads_per_kv):
    """acc += weights @ values over the keys that each query sees (as in _weigh), in ascending order.

    Four queries at a time over the keys that all of them see; then each over what is left to it.
    """
    for i in range(0, num_queries, VALUE_ROWS):
        common = min(TILE, first_visible + i // heads_per_kv)
        if common > 0:
            for column in range(0, acc.shape[1], VALUE_COLUMNS):
                _value_tile(acc, weights, values, i, num_queries - 1, 0, common, column)
        for row in range(i, min(i + VALUE_ROWS, num_queries)):
            visible = min(TILE, first_visible + row // heads_per_kv)
            if visible > max(common, 0):
                for column in range(0, acc.shape[1], VALUE_COLUMNS):
                    _value_tile_one_row(acc, weights, values, row, row, max(common, 0), visible, column)
