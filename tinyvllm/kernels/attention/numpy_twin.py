"""Causal attention over the paged cache, in NumPy: the oracle of the kernels beside it.

For each request, gather its keys and values through the block table, then for each query head (several share
one key and value head: grouped-query attention, GQA)

    scores = scale * q @ k.T        a query at position p sees the keys at positions 0 .. p
    out    = softmax(scores) @ v

A chunk of a prompt, a prefix-cache hit and a decode step are one case: the request's last query row sits at
position seq_len - 1, and the mask is a rectangle whose diagonal is offset by what was in the cache before.
All in float32, with one rounding to bf16 at the end.
"""

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16

__all__ = ["attention_numpy"]


def attention_numpy(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                    num_heads, num_kv_heads, head_dim, block_size):
    """out uint16 [T, Hq * D] from qkv uint16 [T, (Hq + 2 Hkv) * D], whose k and v are in the cache already.

    k_cache, v_cache: uint16 [num_blocks, Hkv, block_size, D]; block_tables: int32 [R, max_blocks]; seq_lens:
    int32 [R], tokens in context after this step; query_start_loc: int32 [R + 1], request r owns the rows from
    its entry to the next. num_decodes is for kernels that treat one-row requests apart; the result does not
    depend on it.
    """
    group = num_heads // num_kv_heads
    for r in range(seq_lens.shape[0]):
        first, last, length = query_start_loc[r], query_start_loc[r + 1], seq_lens[r]
        rows = last - first
        blocks = block_tables[r, : -(-length // block_size)]
        # [blocks, Hkv, block_size, D] -> [Hkv, 1, length, D]: the 1 broadcasts over the group of query heads
        k, v = (bf16_to_float32(cache[blocks]).transpose(1, 0, 2, 3).reshape(num_kv_heads, 1, -1, head_dim)
                for cache in (k_cache, v_cache))
        k, v = k[:, :, :length], v[:, :, :length]
        q = bf16_to_float32(qkv[first:last, : num_heads * head_dim])
        q = q.reshape(rows, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        scores = q @ k.swapaxes(-1, -2) * np.float32(scale)
        positions = length - rows + np.arange(rows)
        scores[..., np.arange(length)[None, :] > positions[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads = (weights @ v) / weights.sum(axis=-1, keepdims=True)
        out[first:last] = float32_to_bf16(heads.transpose(2, 0, 1, 3).reshape(rows, num_heads * head_dim))
