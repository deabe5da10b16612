"""Tokens that only the GPU knows yet, put into the next step's inputs.

    input_ids   [ 11 | -1 | 42 | -3 ]        a number below zero, -1 - row: what was sampled for that row
    sampled     [ 70 | 71 | 72 ]             by the step before
    afterwards  [ 11 | 70 | 42 | 72 ]

So a step can be queued before the host has read what the one before it sampled (engine/pipeline.py).
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    let_next_kernel_start,
    load_i32,
    load_u32,
    store_u32,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["take_sampled_numpy", "take_sampled_kernel", "THREADS"]

THREADS = 256


def take_sampled_numpy(input_ids: np.ndarray, sampled: np.ndarray) -> None:
    """input_ids int32 [T], changed in place; sampled int32, at least as long as the rows that are named."""
    rows = input_ids < 0
    input_ids[rows] = sampled[-1 - input_ids[rows]]


@functools.cache
def take_sampled_kernel(DEPENDENT: bool = False):
    @kernel(signature=("uint64", "uint64", "uint32"), max_threads=THREADS)
    def take_sampled(input_ids, sampled, count):
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        i = np.uint32(block_index_x() * THREADS + thread_index())
        if i < count:
            place = input_ids + np.uint64(i) * np.uint64(4)
            number = load_i32(place)
            if number < 0:
                store_u32(place, load_u32(sampled + np.uint64(np.int32(-1) - number) * np.uint64(4)))

    return take_sampled
