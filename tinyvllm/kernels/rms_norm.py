"""RMSNorm: scale each row to unit root mean square, then by a learned weight.

    y = weight * x / sqrt(mean(x ** 2) + eps)

LayerNorm without its mean and bias. Rounding points of the reference: the sum runs in float32, the normalised
row is rounded to bf16 *before* the weight multiply, and the product is rounded again. Leave out the first
rounding and one value in ten or so is one bf16 step off.

`add_rms_norm` first adds x to the residual stream. The two are always neighbours in the model, and fused they
read the residual once instead of twice.

On the GPU one block takes one row, and the sum of squares is a *parallel reduction*. Two are here:

    tree    256 partial sums in shared memory, halved 8 times with a barrier between the halvings; also runs
            in the simulator
    shuffle each warp adds its 32 partial sums in registers (5 exchanges, no barrier), then warp 0 adds the
    warps';
            the one in use

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Harris, "Optimizing Parallel
Reduction in CUDA" (NVIDIA, 2007) for the reductions.
"""

import math

import numba
import numpy as np
from numba import prange

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16, narrow, round_to_bf16, widen
from tinyvllm.kernels.cuda_support import block_threads, cuda, device_function, kernel, simulated
from tinyvllm.kernels.jit import PARALLEL_ELEMENTS, cpu_helper, cpu_jit, thread_count
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda
from tinyvllm.kernels.residual_add import residual_add_cuda

__all__ = ["rms_norm_numpy", "rms_norm_cpu", "rms_norm_cuda", "rms_norm_tree_cuda",
           "add_rms_norm_numpy", "add_rms_norm_cpu", "add_rms_norm_cuda"]

THREADS = 256  # a block: 8 warps


def rms_norm_numpy(out, x, weight, eps):
    """out uint16 [T, H] from x uint16 [T, H], weight uint16 [H] (all bf16 bits) and eps (float)."""
    x = bf16_to_float32(x)
    mean_square = np.mean(x * x, axis=1, dtype=np.float32, keepdims=True)
    normalised = round_to_bf16(x * (np.float32(1) / np.sqrt(mean_square + np.float32(eps))))
    out[...] = float32_to_bf16(bf16_to_float32(weight) * normalised)


def add_rms_norm_numpy(out, residual, x, weight, eps):
    """residual uint16 [T, H] += x; out = rms_norm(residual). `out` may be `x` itself."""
    residual[...] = float32_to_bf16(bf16_to_float32(residual) + bf16_to_float32(x))
    rms_norm_numpy(out, residual, weight, eps)


# ---- CPU ----


# "reassoc" lets the sum run in several vector lanes. Their number depends on H and the processor alone, so a
# row's result is the same whatever the batch.
@numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy", nogil=True)
def _sum_of_squares(row):
    total = np.float32(0)
    for i in range(row.shape[0]):
        value = widen(row[i])
        total += value * value
    return total


@cpu_jit
def rms_norm_cpu(out, x, weight, eps):
    """As rms_norm_numpy."""
    hidden = x.shape[1]
    for t in range(x.shape[0]):
        mean_square = _sum_of_squares(x[t]) / np.float32(hidden)
        scale = np.float32(1) / np.sqrt(mean_square + np.float32(eps))
        for i in range(hidden):
            out[t, i] = narrow(widen(weight[i]) * widen(narrow(widen(x[t, i]) * scale)))


@cpu_helper
def _add_rms_norm_rows(out, residual, x, weight, eps, first, last):
    hidden = x.shape[1]
    for t in range(first, last):
        for i in range(hidden):
            residual[t, i] = narrow(widen(residual[t, i]) + widen(x[t, i]))
        mean_square = _sum_of_squares(residual[t]) / np.float32(hidden)
        scale = np.float32(1) / np.sqrt(mean_square + np.float32(eps))
        for i in range(hidden):
            out[t, i] = narrow(widen(weight[i]) * widen(narrow(widen(residual[t, i]) * scale)))


@cpu_jit(parallel=True)
def add_rms_norm_cpu(out, residual, x, weight, eps):
    """As add_rms_norm_numpy."""
    num_tokens, num_threads = x.shape[0], thread_count()
    if num_threads == 1 or x.size < PARALLEL_ELEMENTS:
        _add_rms_norm_rows(out, residual, x, weight, eps, np.int64(0), num_tokens)
    else:
        for i in prange(num_threads):
            thread = np.int64(i)
            _add_rms_norm_rows(out, residual, x, weight, eps, num_tokens * thread // num_threads,
                               num_tokens * (thread + 1) // num_threads)


# ---- CUDA ----


@device_function
def _normalise(value, scale, weight):
    """One element of the output, with the reference's two roundings."""
    normalised = widen_cuda(narrow_cuda(np.float32(value * scale)))
    return narrow_cuda(np.float32(widen_cuda(weight) * normalised))


@kernel
def _rms_norm_tree_kernel(out, x, weight, eps):
    """One block a row; the sum of squares by a tree in shared memory."""
    partial = cuda.shared.array(THREADS, np.float32)
    row, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    hidden = x.shape[1]

    # 1. Each thread adds every 256th element: neighbours in a warp read neighbours in memory.
    total = np.float32(0)
    for i in range(thread, hidden, threads):
        value = widen_cuda(x[row, i])
        total = np.float32(total + value * value)
    partial[thread] = total
    cuda.syncthreads()

    # 2. 256 sums become 128, 64, ... 1. The barrier is outside the `if`: every thread has to reach it.
    stride = threads // 2
    while stride > 0:
        if thread < stride:
            partial[thread] += partial[thread + stride]
        cuda.syncthreads()
        stride //= 2

    # 3. Everyone reads the one sum and scales its own elements.
    scale = np.float32(np.float32(1) / np.float32(math.sqrt(partial[0] / np.float32(hidden) + eps)))
    for i in range(thread, hidden, threads):
        out[row, i] = _normalise(widen_cuda(x[row, i]), scale, weight[i])


@device_function
def _block_sum(value, partial):
    """Sum of `value` over the block's threads, given to all of them; partial: float32 [32] of shared
    memory."""
    lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
    for offset in (16, 8, 4, 2, 1):  # after the last exchange every lane holds the warp's sum
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, offset)
    if lane == 0:
        partial[warp] = value
    cuda.syncthreads()
    value = partial[lane] if lane < cuda.blockDim.x // 32 else np.float32(0)
    # every warp adds the warps' sums: no second barrier to hand the result round
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, offset)
    return value


@kernel(max_threads=THREADS)
def _rms_norm_kernel(out, x, weight, eps):
    """One block a row; the sum of squares by warp shuffles."""
    partial = cuda.shared.array(32, np.float32)
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    hidden = x.shape[1]
    total = np.float32(0)
    for i in range(thread, hidden, THREADS):
        value = widen_cuda(x[row, i])
        total += value * value
    mean_square = _block_sum(total, partial) / np.float32(hidden)
    scale = np.float32(1) / np.float32(math.sqrt(mean_square + eps))
    for i in range(thread, hidden, THREADS):
        out[row, i] = _normalise(widen_cuda(x[row, i]), scale, weight[i])


@kernel(max_threads=THREADS)
def _add_rms_norm_kernel(out, residual, x, weight, eps):
    """As above with x added to the residual first. A thread reads again only what it wrote itself: no
    barrier."""
    partial = cuda.shared.array(32, np.float32)
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    hidden = x.shape[1]
    total = np.float32(0)
    for i in range(thread, hidden, THREADS):
        added = narrow_cuda(widen_cuda(residual[row, i]) + widen_cuda(x[row, i]))
        residual[row, i] = added
        value = widen_cuda(added)
        total += value * value
    mean_square = _block_sum(total, partial) / np.float32(hidden)
    scale = np.float32(1) / np.float32(math.sqrt(mean_square + eps))
    for i in range(thread, hidden, THREADS):
        out[row, i] = _normalise(widen_cuda(residual[row, i]), scale, weight[i])


def rms_norm_tree_cuda(out, x, weight, eps):
    """As rms_norm_numpy, on device arrays, by the tree reduction."""
    _rms_norm_tree_kernel[x.shape[0], block_threads(THREADS)](out, x, weight, np.float32(eps))


def rms_norm_cuda(out, x, weight, eps):
    """As rms_norm_numpy, on device arrays."""
    if simulated():  # no warp shuffles there
        rms_norm_tree_cuda(out, x, weight, eps)
    else:
        _rms_norm_kernel[x.shape[0], THREADS](out, x, weight, np.float32(eps))


def add_rms_norm_cuda(out, residual, x, weight, eps):
    """As add_rms_norm_numpy, on device arrays."""
    if simulated():
        residual_add_cuda(residual, x)
        rms_norm_tree_cuda(out, residual, weight, eps)
    else:
        _add_rms_norm_kernel[x.shape[0], THREADS](out, residual, x, weight, np.float32(eps))
