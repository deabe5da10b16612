"""Two kernels that are wrong on purpose, to see that compute-sanitizer would say so.

    compute-sanitizer --tool memcheck python -m tests.gpu.faulty memcheck     # one write behind the end of an array
    compute-sanitizer --tool racecheck python -m tests.gpu.faulty racecheck   # shared memory read without a barrier
"""

import sys

import numpy as np
from numba import cuda, float32

THREADS = 64  # two warps: within one a race might go unnoticed


@cuda.jit
def writes_behind_the_end(out):
    out[cuda.threadIdx.x + 1] = 1.0


@cuda.jit
def reads_without_a_barrier(out):
    shared = cuda.shared.array(THREADS, float32)
    thread = cuda.threadIdx.x
    shared[thread] = thread
    out[thread] = shared[THREADS - 1 - thread]


FAULTY = {"memcheck": writes_behind_the_end, "racecheck": reads_without_a_barrier}


if __name__ == "__main__":
    FAULTY[sys.argv[1]][1, THREADS](cuda.to_device(np.zeros(THREADS, np.float32)))
    cuda.synchronize()
