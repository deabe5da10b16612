"""A tiny random model and batch for running `model.llama.forward` over any backend, for kernel tests."""

import numpy as np

from tests.kernel_cases import POISON, random_bf16
from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.model.llama import Batch, Buffers, Dims, KVCache, Weights, bind


def forward_case(rng, num_heads, num_kv_heads, head_dim, *, layers=2, hidden=96, intermediate=160,
                 vocab_size=203, block_size=4, rows=(1, 1, 9, 3), contexts=(6, 11, 9, 7)):
    """(Weights, k_cache, Batch, Dims) as NumPy arrays, plain [N, K] weights. The cache of older tokens is
    random."""
    qkv_width, attn_width = (num_heads + 2 * num_kv_heads) * head_dim, num_heads * head_dim

    def matrix(*shape):
        return random_bf16(rng, *shape, scale=shape[-1] ** -0.5)

    angles = rng.uniform(0, 6, (64, head_dim // 2)).astype(np.float32)
    weights = Weights(
        embed=random_bf16(rng, vocab_size, hidden), lm_head=matrix(vocab_size, hidden),
        input_norm=random_bf16(rng, layers, hidden), qkv=matrix(layers, qkv_width, hidden),
        qkv_bias=random_bf16(rng, layers, qkv_width), o=matrix(layers, hidden, attn_width),
        o_bias=random_bf16(rng, layers, 0), post_attention_norm=random_bf16(rng, layers, hidden),
        gate_up=matrix(layers, 2 * intermediate, hidden), gate_up_bias=random_bf16(rng, layers, 0),
        down=matrix(layers, hidden, intermediate), down_bias=random_bf16(rng, layers, 0),
        final_norm=random_bf16(rng, hidden), no_bias=random_bf16(rng, 0),
        cos_sin=float32_to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)))
    tokens = sum(rows)
    blocks = [-(-c // block_size) for c in contexts]
    order = rng.permutation(sum(blocks)).astype(np.int32)
    tables = np.zeros((len(rows), max(blocks)), np.int32)
    positions, slots, used = [], [], 0
    for r, (count, context) in enumerate(zip(rows, contexts, strict=True)):
        tables[r, : blocks[r]] = order[used : used + blocks[r]]
        used += blocks[r]
        for position in range(context - count, context):
            positions.append(position)
            slots.append(tables[r, position // block_size] * block_size + position % block_size)
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    batch = Batch(input_ids=rng.integers(0, vocab_size, tokens).astype(np.int32),
                  positions=np.array(positions, np.int32), slot_mapping=np.array(slots, np.int32),
                  block_tables=tables, seq_lens=np.array(contexts, np.int32), query_start_loc=starts,
                  logits_indices=starts[1:] - 1, num_decodes=_leading_ones(rows))
    cache = random_bf16(rng, layers, sum(blocks), num_kv_heads, block_size, head_dim)
    dims = Dims(layers, num_heads, num_kv_heads, head_dim, block_size, head_dim**-0.5, 1e-5)
    return weights, cache, batch, dims


def _leading_ones(rows):
    count = 0
    while count < len(rows) and rows[count] == 1:
        count += 1
    return count


def run_forward(case, ops, to_backend, to_host, bind=bind):
    """(logits [S, V], k cache) after one step. to_backend copies an array to where `ops` works; bind: llama's, or
    llama_fused's."""
    weights, cache, batch, dims = case
    tokens, hidden, intermediate = len(batch.input_ids), weights.embed.shape[1], weights.down.shape[2]
    qkv_width, attn_width = weights.qkv.shape[1], weights.o.shape[2]
    w = Weights(*(to_backend(x) for x in weights))
    kv = KVCache(to_backend(cache), to_backend(np.ascontiguousarray(cache[:, ::-1])))
    fields = {name: to_backend(x) if isinstance(x, np.ndarray) else x for name, x in batch._asdict().items()}
    sizes = Buffers(residual=(tokens, hidden), hidden=(tokens, hidden), qkv=(tokens, qkv_width),
                    attn=(tokens, attn_width), gate_up=(tokens, 2 * intermediate), act=(tokens, intermediate),
                    last=(tokens, hidden), logits=(tokens, weights.lm_head.shape[0]))
    buf = Buffers(*(to_backend(np.full(size, POISON, np.uint16)) for size in sizes))
    bind(ops)(w, kv, Batch(**fields), buf, dims)
    return to_host(buf.logits)[: len(batch.logits_indices)], to_host(kv.k)
