"""Drawing the next token: temperature, top-k, top-p, and a draw that depends on (seed, position, token id)
only.

    1. temperature   z = logit / T          (T = 0: the largest logit, no draw)
    2. top-k         keep the k largest     (0: keep all); ids that tie with the k-th stay too
    3. top-p         of the distribution softmax(z) over what is kept, keep the most likely ids until their
                     mass reaches p; at least one stays, and ids that tie with the last one stay too
    4. draw          argmax over kept ids of z + g,  g = -log(-log(u)),  u = Philox(seed; token id, position)

Step 4 is the Gumbel-max trick: adding Gumbel noise to log-probabilities and taking the largest draws from the
softmax, with no sum over the vocabulary and no search in a cumulative distribution.

No sort either. Flip the sign bit of a non-negative float and all bits of a negative one: the patterns now
order as the numbers do. So "the k largest" is a threshold on 16-bit integers, and bf16 has few enough of them
to count: the CPU fills a histogram over patterns, the GPU finds the threshold four bits at a time (radix
select), as counts for top-k and as probability mass for top-p.

All backends must draw the same token, so nothing here may depend on the order of a sum: probabilities are
integers, floor(2**40 * exp(z - z_max)), and integer sums are exact; exp and log run in float64, whose
last-bit differences between maths libraries are far below anything that could change a token.

NaN and -infinity are never kept. Where nothing is kept, or the largest logit is +infinity, the answer is the
argmax.

Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019) for top-p; Maddison, Tarlow and
Minka, "A* Sampling" (2014) for the Gumbel-max trick.
"""

import math

import numpy as np

from tinyvllm.kernels.argmax import argmax_numpy, block_argmax
from tinyvllm.kernels.bf16 import bf16_to_float32, widen
from tinyvllm.kernels.cuda_support import block_threads, cuda, device_function, kernel
from tinyvllm.kernels.jit import cpu_helper, cpu_jit
from tinyvllm.kernels.philox import uniform_cpu, uniform_cuda, uniform_numpy
from tinyvllm.kernels.ptx import widen_cuda

__all__ = ["sample_numpy", "sample_cpu", "sample_cuda"]

ONE = 2.0**40  # what probability 1 (of the most likely id) is in integer mass; 2**18 ids of it fit in int64
LOWEST_KEY = 0x80  # keys from here up are numbers above -infinity; NaN has key 0
INFINITE_KEY = 0xFF80  # +infinity


def ordered_keys_numpy(bits):
    """bf16 bits (uint16) -> int32 keys in the order of the numbers; NaN lowest; -0 and +0 alike."""
    bits = bits.astype(np.int32)
    keys = np.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    keys[bits == 0x8000] = 0x8000
    keys[(bits & 0x7FFF) > 0x7F80] = 0
    return keys


def sample_numpy(out_ids, logits, temperature, top_k, top_p, seed, position):
    """out_ids int32 [R] drawn from logits uint16 [R, V] (bf16 bits).

    temperature: float32 [R], >= 0; top_k: int32 [R], 0 = off; top_p: float32 [R], >= 1 = off; seed: uint64
    [R]; position: int64 [R], the position the drawn token will have.
    """
    vocab_size = logits.shape[1]
    argmax_numpy(out_ids, logits)
    keys = ordered_keys_numpy(logits)
    values = bf16_to_float32(logits).astype(np.float64)
    for r in range(logits.shape[0]):
        largest = keys[r].max()
        if temperature[r] == 0 or not LOWEST_KEY <= largest < INFINITE_KEY:
            continue
        z = values[r] / np.float64(temperature[r])
        threshold = LOWEST_KEY
        if 0 < top_k[r] < vocab_size:
            threshold = max(threshold, np.partition(keys[r], vocab_size - top_k[r])[vocab_size - top_k[r]])
        if top_p[r] < 1:
            kept = np.flatnonzero(keys[r] >= threshold)
            mass = np.floor(np.exp(z[kept] - z[out_ids[r]]) * ONE).astype(np.int64)
            distinct, group = np.unique(-keys[r][kept], return_inverse=True)  # largest key first
            mass_of_key = np.zeros(len(distinct), np.int64)
            np.add.at(mass_of_key, group, mass)
            reached = np.cumsum(mass_of_key) >= np.float64(top_p[r]) * np.float64(mass.sum())
            threshold = -distinct[np.argmax(reached)]
        kept = np.flatnonzero(keys[r] >= threshold)
        gumbel = -np.log(-np.log(uniform_numpy(seed[r], position[r], kept.astype(np.uint64))))
        out_ids[r] = kept[np.argmax(z[kept] + gumbel)]


# ---- one source for CPU and CUDA ----


def _key_of_bits(bits):
    """ordered_keys_numpy for one bf16 pattern."""
    bits = np.int32(bits)
    if (bits & 0x7FFF) > 0x7F80:
        return np.int32(0)
    if bits > 0x8000:
        return np.int32(0xFFFF - bits)
    return np.int32((bits & 0x7FFF) + 0x8000)


_ordered_key = cpu_helper(_key_of_bits)
_ordered_key_cuda = device_function(_key_of_bits)


# ---- CPU ----


@cpu_helper
def _value_of_key(key):
    return widen(np.uint16(key - 0x8000 if key >= 0x8000 else 0xFFFF - key))


@cpu_jit(fastmath=False)
def sample_cpu(out_ids, logits, temperature, top_k, top_p, seed, position):
    """As sample_numpy."""
    vocab_size = logits.shape[1]
    counts = np.empty(0x10000, np.int32)  # ids a key
    for r in range(logits.shape[0]):
        largest, best_id = np.int32(0), 0
        for i in range(vocab_size):
            key = _ordered_key(logits[r, i])
            if key > largest and key >= LOWEST_KEY:
                largest, best_id = key, i
        out_ids[r] = best_id
        if temperature[r] == 0 or largest < LOWEST_KEY or largest >= INFINITE_KEY:
            continue
        heat = np.float64(temperature[r])
        z_max = np.float64(_value_of_key(largest)) / heat

        threshold = LOWEST_KEY
        if 0 < top_k[r] < vocab_size or top_p[r] < 1:
            counts[:] = 0
            for i in range(vocab_size):
                counts[_ordered_key(logits[r, i])] += 1
        if 0 < top_k[r] < vocab_size:
            seen, key = 0, largest
            while key > LOWEST_KEY:
                seen += counts[key]
                if seen >= top_k[r]:
                    break
                key -= 1
            threshold = key
        if top_p[r] < 1:
            total = np.int64(0)
            for key in range(threshold, largest + 1):
                if counts[key] > 0:
                    total += counts[key] * _mass(key, heat, z_max)
            target = np.float64(top_p[r]) * np.float64(total)
            reached, key = np.int64(0), largest
            while key > threshold:
                if counts[key] > 0:
                    reached += counts[key] * _mass(key, heat, z_max)
                    if np.float64(reached) >= target:
                        break
                key -= 1
            threshold = key

        best = -np.inf
        for i in range(vocab_size):
            if _ordered_key(logits[r, i]) >= threshold:
                u = uniform_cpu(np.uint64(seed[r]), np.uint64(position[r]), np.uint64(i))
                score = np.float64(widen(logits[r, i])) / heat - math.log(-math.log(u))
                if score > best:
                    best = score
                    out_ids[r] = i


@cpu_helper
def _mass(key, temperature, z_max):
    """exp(z - z_max) of a key, as an integer."""
    return np.int64(math.exp(np.float64(_value_of_key(key)) / temperature - z_max) * ONE)


# ---- CUDA ----

THREADS = 512  # one block a row


@device_function
def _threshold(logits, row, lowest, target, by_mass, temperature, z_max, bins):
    """The largest key t such that the ids with key >= max(t, lowest) reach `target`: as a count, or as mass.

    Radix select: four times, histogram the next four bits of those keys that agree with what is known so far,
    add up from the top until the target is reached, and that bin is the next digit. bins: shared int64 [17].
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    own = cuda.local.array(16, np.int64)
    known, above = np.int32(0), np.int64(0)  # the digits so far; what lies above them
    for digit in range(4):
        shift = np.int32(12 - 4 * digit)
        for j in range(16):
            own[j] = 0
        if thread < 16:
            bins[thread] = 0
        cuda.syncthreads()
        for i in range(thread, logits.shape[1], threads):
            key = _ordered_key_cuda(logits[row, i])
            if key >= lowest and (key >> (shift + 4)) == known:
                weight = np.int64(1)
                if by_mass:
                    z = np.float64(widen_cuda(logits[row, i])) / temperature
                    weight = np.int64(math.exp(z - z_max) * ONE)
                own[(key >> shift) & 15] += weight
        for j in range(16):  # each lane starts at another bin, so that a warp's atomics rarely collide
            k = (j + thread) & 15
            if own[k] != 0:
                cuda.atomic.add(bins, k, own[k])
        cuda.syncthreads()
        chosen = 15
        reached = above + bins[15]
        while chosen > 0 and np.float64(reached) < target:
            chosen -= 1
            reached += bins[chosen]
        above = reached - bins[chosen]
        known = np.int32(known * 16 + chosen)
        cuda.syncthreads()  # everyone has read the bins before they are cleared
    return max(known, lowest)


@device_function
def _total_mass(logits, row, lowest, temperature, z_max, bins):
    """Mass of all ids with key >= lowest. bins: shared int64 [17], of which the last is used."""
    own = np.int64(0)
    if cuda.threadIdx.x == 0:
        bins[16] = 0
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, logits.shape[1], cuda.blockDim.x):
        if _ordered_key_cuda(logits[row, i]) >= lowest:
            own += np.int64(math.exp(np.float64(widen_cuda(logits[row, i])) / temperature - z_max) * ONE)
    cuda.atomic.add(bins, 16, own)
    cuda.syncthreads()
    return bins[16]


@kernel(max_threads=THREADS)
def _sample_kernel(out_ids, logits, temperature, top_k, top_p, seed, position):
    """One block a row, in the order of the docstring above. Every branch around a barrier is taken by whole
    blocks."""
    values = cuda.shared.array(THREADS, np.float64)
    indices = cuda.shared.array(THREADS, np.int32)
    bins = cuda.shared.array(17, np.int64)
    row, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    vocab_size = logits.shape[1]

    best, best_id = np.float64(-np.inf), np.int32(0)
    for i in range(thread, vocab_size, threads):
        value = np.float64(widen_cuda(logits[row, i]))
        if value > best:
            best, best_id = value, np.int32(i)
    best, best_id = block_argmax(best, best_id, values, indices)
    cuda.syncthreads()  # the shared arrays are used again below

    if temperature[row] > 0 and np.float64(-np.inf) < best and best < np.float64(np.inf):
        heat = np.float64(temperature[row])
        z_max = best / heat
        threshold = np.int32(LOWEST_KEY)
        if 0 < top_k[row] and top_k[row] < vocab_size:
            threshold = _threshold(logits, row, threshold, np.float64(top_k[row]), False, heat, z_max, bins)
        if top_p[row] < 1:
            total = _total_mass(logits, row, threshold, heat, z_max, bins)
            target = np.float64(top_p[row]) * np.float64(total)
            # A target of 0 is reached by nothing at all; the most likely id is always kept.
            target = max(target, np.float64(1))
            threshold = _threshold(logits, row, threshold, target, True, heat, z_max, bins)
        best, best_id = np.float64(-np.inf), np.int32(0)
        for i in range(thread, vocab_size, threads):
            if _ordered_key_cuda(logits[row, i]) >= threshold:
                u = uniform_cuda(np.uint64(seed[row]), np.uint64(position[row]), np.uint64(i))
                score = np.float64(widen_cuda(logits[row, i])) / heat - math.log(-math.log(u))
                if score > best:
                    best, best_id = score, np.int32(i)
        best, best_id = block_argmax(best, best_id, values, indices)
    if thread == 0:
        out_ids[row] = best_id


def sample_cuda(out_ids, logits, temperature, top_k, top_p, seed, position):
    """As sample_numpy, on device arrays."""
    if logits.shape[0]:
        _sample_kernel[logits.shape[0], block_threads(THREADS)](
            out_ids, logits, temperature, top_k, top_p, seed, position)
