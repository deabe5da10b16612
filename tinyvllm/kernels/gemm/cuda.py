"""`linear` on the GPU: the kernel in use for each shape.

    1 or 2 rows, or up to 8      gemv.py          bound by reading the weights; with many outputs and more
      with few outputs                            rows its arithmetic begins to cost more than the reading
    more                         tensor_core.py   mma.sync, three tile shapes
    K not a multiple of 8        tiled.py         rows that do not start on 16 bytes; no real model has them
    any, in the simulator        tiled.py

A row's result is the same to the bit whatever the other rows are, within each of these kernels. gemv.py and
tensor_core.py add in different orders, so the last bits change where the number of rows crosses from one to
the other.
"""

from tinyvllm.kernels.cuda_support import simulated
from tinyvllm.kernels.gemm.gemv import MAX_ROWS, linear_gemv_cuda
from tinyvllm.kernels.gemm.tensor_core import linear_tensor_core_cuda
from tinyvllm.kernels.gemm.tiled import linear_tiled_cuda

__all__ = ["linear_cuda"]

# Measured on an H200, microseconds by gemv / tensor_core for 2, 4 and 8 rows:
#   16384 x 2048   19.5/19.6  24/20  37/20        3072 x 2048   6.4/13  7.3/13  9.4/13
MANY_OUTPUTS = 8192


def linear_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays: out uint16 [T, N] = x [T, K] @ weight [N, K].T + bias ([N] or
    [0])."""
    if x.shape[0] == 0:
        return
    if x.shape[1] % 8 or simulated():
        linear_tiled_cuda(out, x, weight, bias)
    elif x.shape[0] <= (2 if weight.shape[0] >= MANY_OUTPUTS else MAX_ROWS):
        linear_gemv_cuda(out, x, weight, bias)
    else:
        linear_tensor_core_cuda(out, x, weight, bias)
