"""Greedy decoding: the id of the largest logit.

Ties go to the lowest id, NaN never wins (every comparison with NaN is false), and a row without any number
above -infinity gives id 0. With those rules the answer does not depend on the order in which a parallel
reduction looks.
"""

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32, widen
from tinyvllm.kernels.cuda_support import block_threads, cuda, device_function, kernel
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.ptx import widen_cuda

__all__ = ["argmax_numpy", "argmax_cpu", "argmax_cuda"]

THREADS = 512


def argmax_numpy(out_ids, logits):
    """out_ids int32 [R] from logits uint16 [R, V] (bf16 bits)."""
    values = bf16_to_float32(logits)
    out_ids[...] = np.argmax(np.where(np.isnan(values), -np.inf, values), axis=1)


@cpu_jit
def argmax_cpu(out_ids, logits):
    """As argmax_numpy."""
    for r in range(logits.shape[0]):
        best, best_id = np.float32(-np.inf), 0
        for i in range(logits.shape[1]):
            value = widen(logits[r, i])
            if value > best:
                best, best_id = value, i
        out_ids[r] = best_id


@device_function
def block_argmax(value, index, values, indices):
    """The (value, index) of the block's largest value, lowest index among equals, given to every thread.

    values, indices: shared arrays, one entry a thread; the number of threads is a power of two. A tree, as in
    rms_norm.py, with "the better of two" in place of addition.
    """
    thread = cuda.threadIdx.x
    values[thread] = value
    indices[thread] = index
    cuda.syncthreads()
    stride = cuda.blockDim.x // 2
    while stride > 0:
        if thread < stride:
            other, other_index = values[thread + stride], indices[thread + stride]
            if other > values[thread] or (other == values[thread] and other_index < indices[thread]):
                values[thread] = other
                indices[thread] = other_index
        cuda.syncthreads()
        stride //= 2
    return values[0], indices[0]


@kernel(max_threads=THREADS)
def _argmax_kernel(out_ids, logits):
    """One block a row: each thread keeps the best of every 512th column, then the block's tree decides."""
    values = cuda.shared.array(THREADS, np.float32)
    indices = cuda.shared.array(THREADS, np.int32)
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    best, best_id = np.float32(-np.inf), 0
    for i in range(thread, logits.shape[1], cuda.blockDim.x):
        value = widen_cuda(logits[row, i])
        if value > best:
            best, best_id = value, i
    best, best_id = block_argmax(best, best_id, values, indices)
    if thread == 0:
        out_ids[row] = best_id


def argmax_cuda(out_ids, logits):
    """As argmax_numpy, on device arrays."""
    if logits.shape[0]:
        _argmax_kernel[logits.shape[0], block_threads(THREADS)](out_ids, logits)
