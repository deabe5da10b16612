"""The gate of the feed-forward layer (SwiGLU): out = silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

gate and up come out of one matrix product, side by side in a row: [gate (I) | up (I)]. Rounding points of the
reference: silu is computed in float32 and rounded to bf16, then the product is rounded again.

Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

import math

import numpy as np
from numba import prange

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16, narrow, round_to_bf16, widen
from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.exp import exp_cpu
from tinyvllm.kernels.jit import PARALLEL_ELEMENTS, cpu_helper, cpu_jit, thread_count
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["silu_mul_numpy", "silu_mul_cpu", "silu_mul_cuda"]


def silu_mul_numpy(out, gate_up):
    """out uint16 [T, I] from gate_up uint16 [T, 2 I], both bf16 bits."""
    intermediate = out.shape[1]
    gate = bf16_to_float32(gate_up[:, :intermediate])
    up = bf16_to_float32(gate_up[:, intermediate:])
    # exp(-g) is infinite for very negative g: g / inf = -0
    with np.errstate(over="ignore", invalid="ignore"):
        silu = round_to_bf16(gate / (np.float32(1) + np.exp(-gate)))
        out[...] = float32_to_bf16(silu * up)


@cpu_helper
def _silu_mul_rows(out, gate_up, first, last):
    intermediate = out.shape[1]
    one = np.float32(1)
    for t in range(first, last):
        for i in range(intermediate):
            gate = widen(gate_up[t, i])
            silu = widen(narrow(gate / (one + exp_cpu(-gate))))
            out[t, i] = narrow(silu * widen(gate_up[t, intermediate + i]))


@cpu_jit(parallel=True)
def silu_mul_cpu(out, gate_up):
    """As silu_mul_numpy."""
    num_tokens, num_threads = out.shape[0], thread_count()
    if num_threads == 1 or out.size < PARALLEL_ELEMENTS:
        _silu_mul_rows(out, gate_up, np.int64(0), num_tokens)
    else:
        for i in prange(num_threads):
            thread = np.int64(i)
            _silu_mul_rows(out, gate_up, num_tokens * thread // num_threads,
                           num_tokens * (thread + 1) // num_threads)


@kernel
def _silu_mul_kernel(out, gate_up):
    row, column = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    intermediate = out.shape[1]
    if column < intermediate:
        gate = widen_cuda(gate_up[row, column])
        # exp(88.8) is infinite in float32 already; the clamp is for the simulator, whose math.exp raises
        # above 709.
        exp = np.float32(math.exp(min(-gate, np.float32(700))))
        silu = widen_cuda(narrow_cuda(np.float32(gate / (np.float32(1) + exp))))
        out[row, column] = narrow_cuda(np.float32(silu * widen_cuda(gate_up[row, intermediate + column])))


def silu_mul_cuda(out, gate_up):
    """As silu_mul_numpy, on device arrays."""
    _silu_mul_kernel[row_grid(*out.shape)](out, gate_up)
