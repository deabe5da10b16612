"""Philox-4x32-10: random numbers as a pure function of (key, counter). There is no state to keep.

A sampler's draw must not depend on who else is in the batch, on the order of requests, or on a preemption. So
each number is computed from what it belongs to: key = the request's seed, counter = (token id, position). Ask
again, on any device and in any order, and the same bits come back.

The function is ten rounds of a block cipher made of two 32 x 32 -> 64 bit multiplications, exclusive ors and
a key that steps by a constant; it passes the usual statistical batteries. One source serves NumPy arrays,
numba on the CPU and numba.cuda: all words are uint64 that hold 32 bits, so that nothing can be promoted to
something else on the way.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import numpy as np

from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.jit import cpu_helper

__all__ = ["philox_numpy", "philox_cpu", "philox_cuda", "uniform_numpy", "uniform_cpu", "uniform_cuda"]

MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEP_0, KEY_STEP_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # golden ratio, sqrt(3) - 1
LOW, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
SHIFT = np.uint64(12)


def _philox(c0, c1, c2, c3, k0, k1):
    """Four random 32-bit words for the counter (c0, c1, c2, c3) under the key (k0, k1); uint64 below
    2**32."""
    for _ in range(10):
        product_0, product_1 = MULTIPLIER_0 * c0, MULTIPLIER_1 * c2
        c0, c2 = (product_1 >> WORD) ^ c1 ^ k0, (product_0 >> WORD) ^ c3 ^ k1
        c1, c3 = product_1 & LOW, product_0 & LOW
        k0, k1 = (k0 + KEY_STEP_0) & LOW, (k1 + KEY_STEP_1) & LOW
    return c0, c1, c2, c3


philox_numpy, philox_cpu, philox_cuda = _philox, cpu_helper(_philox), device_function(_philox)


def _bits_to_uniform(w0, w1):
    """52 random bits as a float64 strictly between 0 and 1: the middles of 2**52 equal intervals."""
    return (((w1 << WORD | w0) >> SHIFT) + 0.5) * 2.0**-52


def uniform_numpy(seed, position, token_id):
    """The number in (0, 1) that belongs to these three (uint64; any of them may be an array), float64."""
    seed, position, token_id = np.uint64(seed), np.uint64(position), np.uint64(token_id)
    counter = token_id, position & LOW, position >> WORD, np.uint64(0)
    w0, w1, _, _ = philox_numpy(*counter, seed & LOW, seed >> WORD)
    return _bits_to_uniform(w0, w1)


def _scalar(philox):
    """The same for one number inside compiled code, over that backend's philox."""

    def uniform(seed, position, token_id):
        w0, w1, _, _ = philox(token_id, position & LOW, position >> WORD, np.uint64(0), seed & LOW,
                              seed >> WORD)
        return (np.float64((w1 << WORD | w0) >> SHIFT) + 0.5) * 2.0**-52

    return uniform


uniform_cpu, uniform_cuda = cpu_helper(_scalar(philox_cpu)), device_function(_scalar(philox_cuda))
