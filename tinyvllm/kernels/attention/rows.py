"""Rows of the attention matrix, to be looked at: softmax(scale * q K^T) for some queries, before it meets V.

Attention itself never has such a row: it walks over the keys in tiles and keeps two numbers a query (see cpu.py).
To show one, it is computed again, from queries that were kept (keep_rows.py) and the keys in the paged cache:

    dot       q[0] k[0] + q[1] k[1] + ...            float32, ascending; products of bf16 numbers are exact in it
    score     dot * scale
    weight    exp(score - m) / l                     m = largest score the query sees, l = sum of exp(score - m)

A query at position p sees the keys 0 .. p; what it must not see has weight 0. One query and head at a time, in
plain float32, since only some rows are asked for, and only while somebody looks.
"""

import math

import numpy as np
from numba import prange

from tinyvllm.kernels.bf16 import bf16_to_float32, widen
from tinyvllm.kernels.cuda_support import block_threads, cuda, kernel
from tinyvllm.kernels.exp import exp_cpu
from tinyvllm.kernels.jit import cpu_helper, cpu_jit, thread_count
from tinyvllm.kernels.ptx import widen_cuda

__all__ = ["attention_rows_numpy", "attention_rows_cpu", "attention_rows_cuda"]

TILE = 64  # keys that the CPU kernel scores side by side
THREADS = 128  # a block of the CUDA kernel, for one row of one head


def attention_rows_numpy(out, statistics, queries, k_cache, block_table, layers, heads, rows, scale):
    """out float32 [layers, heads, rows, C] = attention weights of some queries over the first C keys.

    statistics: float32 [layers, heads, rows, 2], gets m and l (see above). queries: uint16 [L, P, Hq * D], by layer
    and position; k_cache: uint16 [L, num_blocks, Hkv, block_size, D]; block_table: int32, the request's blocks;
    layers, heads: int32, which of them; rows: int32, positions of the queries, all below C and P.
    """
    context, head_dim = out.shape[3], k_cache.shape[4]
    group = queries.shape[2] // head_dim // k_cache.shape[2]
    hidden = np.arange(context) > rows[:, None]
    for i, layer in enumerate(layers):
        keys = bf16_to_float32(k_cache[layer][block_table]).transpose(1, 0, 2, 3)
        keys = keys.reshape(k_cache.shape[2], -1, head_dim)[:, :context]
        for j, head in enumerate(heads):
            q = bf16_to_float32(queries[layer, rows, head * head_dim : (head + 1) * head_dim])
            scores = q @ keys[head // group].T * np.float32(scale)
            scores[hidden] = -np.inf
            m = scores.max(axis=1, initial=-np.inf)
            out[i, j] = np.exp(scores - m[:, None])
            total = out[i, j].sum(axis=1)
            statistics[i, j, :, 0], statistics[i, j, :, 1] = m, total
            out[i, j] /= total[:, None]


# ---- CPU ----


@cpu_jit(parallel=True)
def attention_rows_cpu(out, statistics, queries, k_cache, block_table, layers, heads, rows, scale):
    """As attention_rows_numpy; the heads are shared out among the threads."""
    num_heads, num_threads = heads.shape[0], thread_count()
    for i in prange(num_threads):
        for task in range(np.int64(i), layers.shape[0] * num_heads, num_threads):
            layer, head = task // num_heads, task % num_heads
            _head_rows(out[layer, head], statistics[layer, head], queries[layers[layer]], k_cache[layers[layer]],
                       block_table, heads[head], rows, np.float32(scale))


@cpu_helper
def _head_rows(out, statistics, queries, k_cache, block_table, head, rows, scale):
    """One head of one layer."""
    context, block_size, head_dim = out.shape[1], k_cache.shape[2], k_cache.shape[3]
    kv_head = head // (queries.shape[1] // head_dim // k_cache.shape[1])
    keys = np.zeros((head_dim, TILE), np.float32)  # transposed: one feature of all keys side by side
    dots = np.empty(TILE, np.float32)
    for start in range(0, context, TILE):
        count = min(TILE, context - start)
        for j in range(count):
            block, offset = block_table[(start + j) // block_size], (start + j) % block_size
            for d in range(head_dim):
                keys[d, j] = widen(k_cache[block, kv_head, offset, d])
        for r in range(rows.shape[0]):
            if start <= rows[r]:
                dots[:] = 0
                for d in range(head_dim):
                    q = widen(queries[rows[r], head * head_dim + d])
                    for j in range(TILE):
                        dots[j] += q * keys[d, j]
                for j in range(count):
                    out[r, start + j] = dots[j] * scale
    for r in range(rows.shape[0]):
        _softmax(out[r], statistics[r], rows[r] + 1)


@cpu_helper
def _softmax(row, statistics, visible):
    """Scores to weights, in place; 0 from `visible` on."""
    largest, total = np.float32(-np.inf), np.float32(0)
    for j in range(visible):
        largest = max(largest, row[j])
    for j in range(visible):
        row[j] = exp_cpu(row[j] - largest)
    for j in range(visible):
        total += row[j]
    for j in range(visible):
        row[j] /= total
    for j in range(visible, row.shape[0]):
        row[j] = 0
    statistics[0], statistics[1] = largest, total


# ---- CUDA ----


@kernel
def _attention_rows_kernel(out, statistics, queries, k_cache, block_table, layers, heads, rows, scale):
    """A block: one row of one head of one layer; a thread takes every THREADS-th key."""
    shared = cuda.shared.array(THREADS, np.float32)
    r, j, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    layer, head, row = layers[i], heads[j], rows[r]
    block_size, head_dim, context = k_cache.shape[3], k_cache.shape[4], out.shape[3]
    kv_head = head // (queries.shape[2] // head_dim // k_cache.shape[2])
    visible = row + 1

    # 1. Scores, and each thread's largest.
    value = np.float32(-np.inf)
    for column in range(thread, visible, threads):
        block, offset = block_table[column // block_size], column % block_size
        dot = np.float32(0)
        for d in range(head_dim):
            dot += (widen_cuda(queries[layer, row, head * head_dim + d])
                    * widen_cuda(k_cache[layer, block, kv_head, offset, d]))
        score = np.float32(dot * scale)
        out[i, j, r, column] = score
        value = max(value, score)
    shared[thread] = value
    cuda.syncthreads()
    stride = threads // 2
    while stride > 0:
        if thread < stride:
            shared[thread] = max(shared[thread], shared[thread + stride])
        cuda.syncthreads()
        stride //= 2
    largest = shared[0]
    cuda.syncthreads()  # everyone has the maximum before its place is used again

    # 2. exp, and the sum. A thread reads again only what it wrote itself.
    value = np.float32(0)
    for column in range(thread, visible, threads):
        weight = np.float32(math.exp(out[i, j, r, column] - largest))
        out[i, j, r, column] = weight
        value += weight
    shared[thread] = value
    cuda.syncthreads()
    stride = threads // 2
    while stride > 0:
        if thread < stride:
            shared[thread] += shared[thread + stride]
        cuda.syncthreads()
        stride //= 2
    total = shared[0]

    # 3. Weights.
    for column in range(thread, context, threads):
        out[i, j, r, column] = out[i, j, r, column] / total if column < visible else np.float32(0)
    if thread == 0:
        statistics[i, j, r, 0] = largest
        statistics[i, j, r, 1] = total


def attention_rows_cuda(out, statistics, queries, k_cache, block_table, layers, heads, rows, scale):
    """As attention_rows_numpy, on device arrays."""
    if out.size:
        grid = rows.shape[0], heads.shape[0], layers.shape[0]
        _attention_rows_kernel[grid, block_threads(THREADS)](
            out, statistics, queries, k_cache, block_table, layers, heads, rows, np.float32(scale))
