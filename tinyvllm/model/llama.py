"""The Llama forward pass, written once.

`forward` reads like the architecture: embed, then per layer attention and feed-forward around a residual stream,
then a last norm and the logits of the rows that are asked for. It calls operations by bare names, and `bind`
gives it a set of operations:

    bind(numpy_backend.OPS)   the NumPy twins: slow, plain, the oracle of every test
    bind(cpu_backend.OPS)     numba.njit kernels, called one by one (enforce_eager: you can look between them)
    numba.njit of the latter  the same source compiled into ONE function, so that a small model spends its time
                              in arithmetic and not in Python
    bind(cuda_backend.OPS)    numba.cuda kernels

So there is one place to read, and no second one to drift. The price is a restriction: `forward` uses only what
numba can compile (arrays, tuples, loops, slices).
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Dims(NamedTuple):
    """The sizes and constants of a model that its forward pass needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens a KV-cache block
    scale: float  # of the attention scores: head_dim ** -0.5
    eps: float  # of RMSNorm


class Weights(NamedTuple):
    """Device or host arrays, bf16 bits (uint16), stacked over layers. `linear` weights are in the backend's layout."""

    embed: Any  # [V, H]
    lm_head: Any  # [V, H]; the very same array as `embed` when tied
    input_norm: Any  # [L, H]
    qkv: Any  # [L, (Hq + 2 Hkv) * D, H]
    qkv_bias: Any  # [L, (Hq + 2 Hkv) * D], or [L, 0]
    o: Any  # [L, H, Hq * D]
    o_bias: Any  # [L, H] or [L, 0]
    post_attention_norm: Any  # [L, H]
    gate_up: Any  # [L, 2 I, H]
    gate_up_bias: Any  # [L, 2 I] or [L, 0]
    down: Any  # [L, H, I]
    down_bias: Any  # [L, H] or [L, 0]
    final_norm: Any  # [H]
    no_bias: Any  # [0]: what `linear` gets where the architecture has no bias at all
    cos_sin: Any  # [max_model_len, D]: cos in the first half, sin in the second


class KVCache(NamedTuple):
    """The paged cache: uint16 [L, num_blocks, Hkv, block_size, D] for keys and for values."""

    k: Any
    v: Any


class Watch(NamedTuple):
    """Where to keep rows of this step for who looks into the engine (runner/watch.py)."""

    queries: Any  # [L, P, Hq * D]: query vectors after RoPE, by position
    residual: Any  # [L + 1, P, H]: the residual stream as it enters each layer, and as it leaves the last
    positions: Any  # int32 [T]: where each row is kept, -1 for a row that is not; [0] while nothing is watched


NOT_WATCHED = Watch(np.empty((0, 0, 0), np.uint16), np.empty((0, 0, 0), np.uint16), np.empty(0, np.int32))


class Batch(NamedTuple):
    """One step's inputs: T tokens of R requests, decode requests (one row each) first. int32 unless noted."""

    input_ids: Any  # [T]
    positions: Any  # [T]
    slot_mapping: Any  # [T]: block_id * block_size + offset, where this token's K and V go
    block_tables: Any  # [R, max_blocks]: physical block ids of each request, in order
    seq_lens: Any  # [R]: tokens in context after this step
    query_start_loc: Any  # [R + 1]: request r owns rows query_start_loc[r] : query_start_loc[r + 1]
    logits_indices: Any  # [S]: the rows whose next token is wanted
    num_decodes: int
    watch: Watch = NOT_WATCHED


class Buffers(NamedTuple):
    """Activations of the largest batch, allocated once: bf16 bits, first axis max_num_batched_tokens."""

    residual: Any  # [T, H]
    hidden: Any  # [T, H]
    qkv: Any  # [T, (Hq + 2 Hkv) * D]
    attn: Any  # [T, Hq * D]
    gate_up: Any  # [T, 2 I]
    act: Any  # [T, I]
    last: Any  # [S, H]
    logits: Any  # [S, V]


def forward(w, kv, batch, buf, dims):
    """Run one step: writes K and V into the cache and the logits of `logits_indices` into buf.logits[:S].

    w: Weights; kv: KVCache; batch: Batch; buf: Buffers; dims: Dims.
    """
    num_tokens = batch.input_ids.shape[0]
    num_logits = batch.logits_indices.shape[0]
    residual = buf.residual[:num_tokens]
    hidden = buf.hidden[:num_tokens]
    qkv = buf.qkv[:num_tokens]
    attn = buf.attn[:num_tokens]
    gate_up = buf.gate_up[:num_tokens]
    act = buf.act[:num_tokens]
    watch = batch.watch

    embedding(residual, batch.input_ids, w.embed)
    rms_norm(hidden, residual, w.input_norm[0], dims.eps)
    for layer in range(dims.num_layers):
        keep_rows(watch.residual, layer, residual, watch.positions)
        # Attention: every token looks back over its own request's cached keys, itself included.
        linear(qkv, hidden, w.qkv[layer], w.qkv_bias[layer])
        rope(qkv, batch.positions, w.cos_sin, dims.num_heads, dims.num_kv_heads, dims.head_dim)
        keep_rows(watch.queries, layer, qkv, watch.positions)
        write_kv(kv.k[layer], kv.v[layer], qkv, batch.slot_mapping,
                 dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.block_size)
        attention(attn, qkv, kv.k[layer], kv.v[layer], batch.block_tables, batch.seq_lens, batch.query_start_loc,
                  batch.num_decodes, dims.scale, dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.block_size)
        linear(hidden, attn, w.o[layer], w.o_bias[layer])
        add_rms_norm(hidden, residual, hidden, w.post_attention_norm[layer], dims.eps)
        # Feed-forward (SwiGLU): each token on its own.
        linear(gate_up, hidden, w.gate_up[layer], w.gate_up_bias[layer])
        silu_mul(act, gate_up)
        linear(hidden, act, w.down[layer], w.down_bias[layer])
        if layer + 1 < dims.num_layers:  # the residual add belongs to the norm that follows it
            add_rms_norm(hidden, residual, hidden, w.input_norm[layer + 1], dims.eps)
        else:
            add_rms_norm(hidden, residual, hidden, w.final_norm, dims.eps)
    keep_rows(watch.residual, dims.num_layers, residual, watch.positions)

    # Only the rows that are sampled from need logits: the vocabulary is by far the widest matrix.
    last = buf.last[:num_logits]
    gather_rows(last, hidden, batch.logits_indices)
    linear(buf.logits[:num_logits], last, w.lm_head, w.no_bias)


OP_NAMES = ("embedding", "rms_norm", "add_rms_norm", "linear", "rope", "write_kv", "attention", "silu_mul",
            "gather_rows", "keep_rows")


def bind(ops: Mapping[str, Callable]) -> Callable:
    """A copy of `forward` whose operations are `ops` (a mapping with every name in OP_NAMES)."""
    missing = [name for name in OP_NAMES if name not in ops]
    if missing:
        raise ValueError(f"this backend lacks the operation(s) {', '.join(missing)}")
    namespace = {**globals(), **{name: ops[name] for name in OP_NAMES}}
    bound = types.FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__)
    bound.__module__, bound.__qualname__, bound.__doc__ = forward.__module__, forward.__qualname__, forward.__doc__
    return bound
