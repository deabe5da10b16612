"""The same forward pass as llama.py in fewer, larger operations: what a GPU runs.

Read llama.py first: it is the definition, and tests hold this one to it. Here the neighbours of each matrix product
belong to the product, so that a layer is five operations instead of ten:

    llama.py                                     here
    rms_norm, linear (qkv), rope, write_kv       norm_qkv_rope_write
    attention                                    attention
    linear (o), add of add_rms_norm              linear_add
    norm of it, linear (gate, up), silu_mul      norm_gate_up
    linear (down), add of add_rms_norm           linear_add
    keep_rows                                    keep_rows, at the same three places

`bind(operations)` as there. Biases have no place here: models that have them take the other way.
"""

import types
from collections.abc import Callable, Mapping

OP_NAMES = ("embedding", "norm_qkv_rope_write", "attention", "linear_add", "norm_gate_up", "norm_logits", "keep_rows")


def forward(w, kv, batch, buf, dims):
    """As llama.forward: one step's keys and values into the cache, logits of `logits_indices` into buf.logits[:S]."""
    num_tokens = batch.input_ids.shape[0]
    num_logits = batch.logits_indices.shape[0]
    residual, hidden = buf.residual[:num_tokens], buf.hidden[:num_tokens]
    qkv, attn = buf.qkv[:num_tokens], buf.attn[:num_tokens]
    gate_up, act = buf.gate_up[:num_tokens], buf.act[:num_tokens]
    watch = batch.watch

    embedding(residual, batch.input_ids, w.embed)
    for layer in range(dims.num_layers):
        keep_rows(watch.residual, layer, residual, watch.positions)
        norm_qkv_rope_write(qkv, kv.k[layer], kv.v[layer], hidden, residual, w.input_norm[layer], w.qkv[layer],
                            batch.positions, batch.slot_mapping, w.cos_sin, dims.eps, dims.num_heads,
                            dims.num_kv_heads, dims.head_dim, dims.block_size)
        keep_rows(watch.queries, layer, qkv, watch.positions)
        attention(attn, qkv, kv.k[layer], kv.v[layer], batch.block_tables, batch.seq_lens, batch.query_start_loc,
                  batch.num_decodes, dims.scale, dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.block_size)
        linear_add(residual, hidden, attn, w.o[layer])
        norm_gate_up(act, gate_up, hidden, residual, w.post_attention_norm[layer], w.gate_up[layer], dims.eps)
        linear_add(residual, hidden, act, w.down[layer])
    keep_rows(watch.residual, dims.num_layers, residual, watch.positions)
    norm_logits(buf.logits[:num_logits], buf.last[:num_logits], residual, batch.logits_indices, w.final_norm,
                w.lm_head, dims.eps)


def bind(ops: Mapping[str, Callable]) -> Callable:
    """A copy of `forward` whose operations are `ops` (a mapping with every name in OP_NAMES)."""
    missing = [name for name in OP_NAMES if name not in ops]
    if missing:
        raise ValueError(f"this backend lacks the operation(s) {', '.join(missing)}")
    return types.FunctionType(forward.__code__, {**globals(), **{name: ops[name] for name in OP_NAMES}})
