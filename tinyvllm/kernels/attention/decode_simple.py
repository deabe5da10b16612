"""Decode attention, the simple version, and the kernel that combines the parts of a split context.

The idea is described in decode.py. Here a block is one part of 32 keys for one query head, and each of its 32
threads computes one key's score; float32 throughout, any head_dim, and it runs in the simulator.
"""

import math

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel, workspace
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["decode_attention_simple_cuda", "combine_kernel", "STATISTICS"]

# A part's result in the workspace: O (head_dim floats, not divided by l), then m, then l.
STATISTICS = 2

SIMPLE_SPLIT = 32  # keys a part, and threads a block


@kernel
def _decode_simple_kernel(parts, qkv, k_cache, v_cache, block_tables, seq_lens, num_splits, scale, num_heads,
                          num_kv_heads, head_dim, block_size):
    """A block: one part of one request's context, for one query head."""
    weights = cuda.shared.array(SIMPLE_SPLIT, np.float32)
    split, head, request = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    thread = cuda.threadIdx.x
    kv_head = head // (num_heads // num_kv_heads)
    first_key = split * SIMPLE_SPLIT
    if first_key >= seq_lens[request]:
        return
    keys = min(SIMPLE_SPLIT, seq_lens[request] - first_key)

    if thread < keys:  # one key's score a thread
        position = first_key + thread
        block = block_tables[request, position // block_size]
        score = np.float32(0)
        for i in range(head_dim):
            score += (widen_cuda(qkv[request, head * head_dim + i])
                      * widen_cuda(k_cache[block, kv_head, position % block_size, i]))
        weights[thread] = np.float32(score * scale)
    cuda.syncthreads()

    m, denominator = np.float32(-np.inf), np.float32(0)
    for j in range(keys):
        m = max(m, weights[j])
    cuda.syncthreads()  # everyone has the maximum before scores turn into weights
    if thread < keys:
        weights[thread] = np.float32(math.exp(weights[thread] - m))
    cuda.syncthreads()
    for j in range(keys):
        denominator += weights[j]

    at = ((request * num_heads + head) * num_splits + split) * (head_dim + STATISTICS)
    for i in range(thread, head_dim, SIMPLE_SPLIT):  # one column of the values a thread
        total = np.float32(0)
        for j in range(keys):
            position = first_key + j
            block = block_tables[request, position // block_size]
            total += weights[j] * widen_cuda(v_cache[block, kv_head, position % block_size, i])
        parts[at + i] = total
    if thread == 0:
        parts[at + head_dim] = m
        parts[at + head_dim + 1] = denominator


@kernel
def combine_kernel(out, parts, seq_lens, num_splits, split_size, from_parts, num_heads, head_dim):
    """A block: one query head of one request. Requests with fewer than `from_parts` parts are finished
    already."""
    head, request = cuda.blockIdx.x, cuda.blockIdx.y
    used = (seq_lens[request] + split_size - 1) // split_size
    if used < from_parts:
        return
    size = head_dim + STATISTICS
    base = (request * num_heads + head) * num_splits * size
    m, denominator = np.float32(-np.inf), np.float32(0)
    for s in range(used):
        m = max(m, parts[base + s * size + head_dim])
    for s in range(used):
        part = base + s * size
        denominator += np.float32(math.exp(parts[part + head_dim] - m)) * parts[part + head_dim + 1]
    for i in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
        total = np.float32(0)
        for s in range(used):
            part = base + s * size
            total += np.float32(math.exp(parts[part + head_dim] - m)) * parts[part + i]
        out[request, head * head_dim + i] = narrow_cuda(np.float32(total / denominator))


def decode_attention_simple_cuda(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc,
                                 num_decodes, scale, num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy for the first num_decodes requests, on device arrays; any head_dim."""
    splits = ceil_div(block_tables.shape[1] * block_size, SIMPLE_SPLIT)
    parts = workspace(num_decodes * num_heads * splits * (head_dim + STATISTICS))
    _decode_simple_kernel[(splits, num_heads, num_decodes), SIMPLE_SPLIT](
        parts, qkv, k_cache, v_cache, block_tables, seq_lens, splits, np.float32(scale), num_heads,
        num_kv_heads, head_dim, block_size)
    combine_kernel[(num_heads, num_decodes), 32](
        out, parts, seq_lens, splits, SIMPLE_SPLIT, 1, num_heads, head_dim)
