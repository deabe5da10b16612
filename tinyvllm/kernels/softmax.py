"""Softmax along the rows of a matrix, twice: the naive way and the online way.

    p[i] = exp(x[i] - m) / l        m = max(x),  l = sum(exp(x - m))

Subtracting the maximum changes nothing in exact arithmetic and keeps exp from overflowing. The naive way
walks over a row three times: for m, for l, for the division. The *online* way finds m and l in one walk, by
keeping them right for the part of the row seen so far: when a larger maximum m' shows up, the old sum is
worth exp(m - m') of its value.

    m' = max(m, x)        l' = l * exp(m - m') + exp(x - m')

The same rule merges two parts of a row, (m1, l1) and (m2, l2), in any order, and that is what lets attention
walk over keys in tiles and never hold a whole row of scores (see attention/). The forward pass uses it there;
the kernels here are for reading, float32 in and out, any number of columns.

A row that holds +infinity or NaN, or nothing but -infinity, gives NaN, as 0/0 and inf/inf do.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import math

import numpy as np

from tinyvllm.kernels.cuda_support import block_threads, cuda, device_function, kernel
from tinyvllm.kernels.jit import cpu_jit

__all__ = ["softmax_numpy", "softmax_naive_cpu", "softmax_online_cpu", "softmax_naive_cuda",
           "softmax_online_cuda"]

THREADS = 128  # a block, for one row


def softmax_numpy(out, x):
    """out float32 [R, C] = softmax of the rows of x float32 [R, C]."""
    with np.errstate(invalid="ignore"):
        exp = np.exp(x - x.max(axis=1, keepdims=True))
        out[...] = exp / exp.sum(axis=1, keepdims=True)


@cpu_jit
def softmax_naive_cpu(out, x):
    """As softmax_numpy, in three walks."""
    for r in range(x.shape[0]):
        largest = np.float32(-np.inf)
        for i in range(x.shape[1]):
            largest = max(largest, x[r, i])
        total = np.float32(0)
        for i in range(x.shape[1]):
            out[r, i] = math.exp(x[r, i] - largest)
            total += out[r, i]
        for i in range(x.shape[1]):
            out[r, i] /= total


@cpu_jit
def softmax_online_cpu(out, x):
    """As softmax_numpy, in two walks: one for maximum and sum together, one for the result."""
    for r in range(x.shape[0]):
        largest, total = np.float32(-np.inf), np.float32(0)
        for i in range(x.shape[1]):
            if x[r, i] > largest:
                total = total * math.exp(largest - x[r, i]) + np.float32(1)
                largest = x[r, i]
            else:
                total += math.exp(x[r, i] - largest)
        for i in range(x.shape[1]):
            out[r, i] = math.exp(x[r, i] - largest) / total


@kernel
def _softmax_naive_kernel(out, x):
    """One block a row; two tree reductions, for the maximum and for the sum."""
    shared = cuda.shared.array(THREADS, np.float32)
    row, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    columns = x.shape[1]

    value = np.float32(-np.inf)
    for i in range(thread, columns, threads):
        value = max(value, x[row, i])
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

    value = np.float32(0)
    for i in range(thread, columns, threads):
        value += np.float32(math.exp(x[row, i] - largest))
    shared[thread] = value
    cuda.syncthreads()
    stride = threads // 2
    while stride > 0:
        if thread < stride:
            shared[thread] += shared[thread + stride]
        cuda.syncthreads()
        stride //= 2
    total = shared[0]

    for i in range(thread, columns, threads):
        out[row, i] = np.float32(math.exp(x[row, i] - largest)) / total


@device_function
def _weight(part, whole):
    """What a sum taken against the maximum `part` is worth against `whole`; an empty part (-inf) is worth
    nothing."""
    return np.float32(0) if part == np.float32(-np.inf) else np.float32(math.exp(part - whole))


@kernel
def _softmax_online_kernel(out, x):
    """One block a row; each thread runs the online rule on its columns, then a tree merges the threads'
    pairs."""
    maxima = cuda.shared.array(THREADS, np.float32)
    sums = cuda.shared.array(THREADS, np.float32)
    row, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    columns = x.shape[1]

    largest, total = np.float32(-np.inf), np.float32(0)
    for i in range(thread, columns, threads):
        value = x[row, i]
        merged = max(largest, value)
        total = np.float32(total * _weight(largest, merged) + _weight(value, merged))
        largest = merged
    maxima[thread] = largest
    sums[thread] = total
    cuda.syncthreads()
    stride = threads // 2
    while stride > 0:
        if thread < stride:
            merged = max(maxima[thread], maxima[thread + stride])
            sums[thread] = np.float32(sums[thread] * _weight(maxima[thread], merged)
                                      + sums[thread + stride] * _weight(maxima[thread + stride], merged))
            maxima[thread] = merged
        cuda.syncthreads()
        stride //= 2
    largest, total = maxima[0], sums[0]

    for i in range(thread, columns, threads):
        out[row, i] = np.float32(math.exp(x[row, i] - largest)) / total


def softmax_naive_cuda(out, x):
    """As softmax_numpy, on device arrays."""
    _softmax_naive_kernel[x.shape[0], block_threads(THREADS)](out, x)


def softmax_online_cuda(out, x):
    """As softmax_numpy, on device arrays."""
    _softmax_online_kernel[x.shape[0], block_threads(THREADS)](out, x)
