"""The arithmetic: one file an operation, with its definition in NumPy and its CPU and CUDA kernels side by
side."""

import os

# numba.cuda warns of every launch that leaves multiprocessors idle, which with one request in flight is all
# of them. It reads this when it is imported.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")
