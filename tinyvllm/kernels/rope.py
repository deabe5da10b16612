"""Rotary position embedding (RoPE): turn pairs of features by an angle that grows with the position.

For a token at position p, pair i of a head is the point (x[i], x[i + D/2]), turned by the angle p *
frequency[i]:

    a = x1 * cos - x2 * sin        x1 = x[i]
    b = x2 * cos + x1 * sin        x2 = x[i + D/2]

The dot product of a turned query and a turned key depends on the difference of their positions only, which is
how attention sees distance. Pairs are half a head apart ("rotate-half", as in Hugging Face checkpoints), not
neighbours as in the paper; the two differ by a permutation of features that the checkpoint's weights already
contain.

The angles come as a table of cosines and sines in bf16, one row a position, because the reference rounds them
so. It also rounds each product before it adds: a = bf16(bf16(x1 * c) - bf16(x2 * s)). Queries and keys are
turned in place in the joint projection's row [q heads | k heads | v heads]; values are left alone.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16, narrow, round_to_bf16, widen
from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["rope_numpy", "rope_cpu", "rope_cuda"]


def rope_numpy(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim):
    """Turn the query and key heads of qkv (uint16 [T, (Hq + 2 Hkv) * D], in place).

    positions: int32 [T]; cos_sin: uint16 [P, D], cosines in the first half of a row, sines in the second.
    """
    half = head_dim // 2
    turned = num_heads + num_kv_heads
    heads = qkv[:, : turned * head_dim].reshape(-1, turned, head_dim)
    x1, x2 = bf16_to_float32(heads[..., :half]), bf16_to_float32(heads[..., half:])
    table = bf16_to_float32(cos_sin[positions])[:, None, :]
    cos, sin = table[..., :half], table[..., half:]
    a = float32_to_bf16(round_to_bf16(x1 * cos) - round_to_bf16(x2 * sin))
    b = float32_to_bf16(round_to_bf16(x2 * cos) + round_to_bf16(x1 * sin))
    qkv[:, : turned * head_dim] = np.concatenate([a, b], axis=-1).reshape(qkv.shape[0], -1)


@cpu_jit
def rope_cpu(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim):
    """As rope_numpy."""
    half = head_dim // 2
    for t in range(qkv.shape[0]):
        cos_row = cos_sin[positions[t], :half]
        sin_row = cos_sin[positions[t], half:]
        for head in range(num_heads + num_kv_heads):
            first = qkv[t, head * head_dim : head * head_dim + half]
            second = qkv[t, head * head_dim + half : (head + 1) * head_dim]
            for i in range(half):
                cos, sin = widen(cos_row[i]), widen(sin_row[i])
                x1, x2 = widen(first[i]), widen(second[i])
                first[i] = narrow(widen(narrow(x1 * cos)) - widen(narrow(x2 * sin)))
                second[i] = narrow(widen(narrow(x2 * cos)) + widen(narrow(x1 * sin)))


@kernel
def _rope_kernel(qkv, positions, cos_sin, turned_heads, head_dim):
    """One thread a pair of features."""
    half = head_dim // 2
    token, pair = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if pair < turned_heads * half:
        head = pair // half
        feature = pair - head * half
        cos = widen_cuda(cos_sin[positions[token], feature])
        sin = widen_cuda(cos_sin[positions[token], half + feature])
        column = head * head_dim + feature
        x1, x2 = widen_cuda(qkv[token, column]), widen_cuda(qkv[token, column + half])
        # Each product is rounded to bf16, so the compiler cannot merge it with the sum into one instruction.
        x1_cos, x2_sin = widen_cuda(narrow_cuda(x1 * cos)), widen_cuda(narrow_cuda(x2 * sin))
        x2_cos, x1_sin = widen_cuda(narrow_cuda(x2 * cos)), widen_cuda(narrow_cuda(x1 * sin))
        qkv[token, column] = narrow_cuda(x1_cos - x2_sin)
        qkv[token, column + half] = narrow_cuda(x2_cos + x1_sin)


def rope_cuda(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim):
    """As rope_numpy, on device arrays."""
    turned = num_heads + num_kv_heads
    _rope_kernel[row_grid(qkv.shape[0], turned * head_dim // 2)](qkv, positions, cos_sin, turned, head_dim)
