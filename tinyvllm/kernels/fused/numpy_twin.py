"""The fused operations in NumPy: compositions of the twins of their parts; `hidden`, `gate_up`, `last` are scratch."""

import numpy as np

from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.embedding import embedding_numpy
from tinyvllm.kernels.gemm.numpy_twin import linear_numpy
from tinyvllm.kernels.keep_rows import keep_rows_numpy
from tinyvllm.kernels.kv_cache import write_kv_numpy
from tinyvllm.kernels.residual_add import residual_add_numpy
from tinyvllm.kernels.rms_norm import rms_norm_numpy
from tinyvllm.kernels.rope import rope_numpy
from tinyvllm.kernels.silu_mul import silu_mul_numpy

__all__ = ["OPS"]

NO_BIAS = np.zeros(0, np.uint16)


def norm_qkv_rope_write_numpy(qkv, k_cache, v_cache, hidden, residual, norm_weight, weight, positions, slots, cos_sin,
                              eps, num_heads, num_kv_heads, head_dim, block_size):
    """qkv [T, (Hq + 2 Hkv) D]: query heads turned; keys, turned, and values go to the cache.

    What qkv holds in its key and value columns afterwards is not promised.
    """
    rms_norm_numpy(hidden, residual, norm_weight, eps)
    linear_numpy(qkv, hidden, weight, NO_BIAS)
    rope_numpy(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim)
    write_kv_numpy(k_cache, v_cache, qkv, slots, num_heads, num_kv_heads, head_dim, block_size)


def linear_add_numpy(residual, hidden, x, weight):
    """residual [T, N] += bf16(x [T, K] @ weight [N, K].T)."""
    linear_numpy(hidden, x, weight, NO_BIAS)
    residual_add_numpy(residual, hidden)


def norm_gate_up_numpy(act, gate_up, hidden, residual, norm_weight, weight, eps):
    """act [T, I] = silu(gate) * up, with [gate | up] = rms_norm(residual) @ weight [2 I, H].T."""
    rms_norm_numpy(hidden, residual, norm_weight, eps)
    linear_numpy(gate_up, hidden, weight, NO_BIAS)
    silu_mul_numpy(act, gate_up)


def norm_logits_numpy(logits, last, residual, indices, norm_weight, weight, eps):
    """logits [S, V] = rms_norm(residual[indices]) @ weight [V, H].T."""
    rms_norm_numpy(last, residual[indices], norm_weight, eps)
    linear_numpy(logits, last, weight, NO_BIAS)


OPS = {"embedding": embedding_numpy, "norm_qkv_rope_write": norm_qkv_rope_write_numpy, "attention": attention_numpy,
       "linear_add": linear_add_numpy, "norm_gate_up": norm_gate_up_numpy, "norm_logits": norm_logits_numpy,
       "keep_rows": keep_rows_numpy}
