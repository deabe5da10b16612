"""`linear` on the GPU: the kernel in use for each shape.

    1 to 8 rows                    gemv.py          bound by reading the weights
    more                           tensor_core.py   mma.sync, three tile shapes
    K not a multiple of 8          tiled.py         rows that do not start on 16 bytes; no real model has them
    any, in the simulator          tiled.py
"""

from tinyvllm.kernels.cuda_support import simulated
from tinyvllm.kernels.gemm.gemv import MAX_ROWS, linear_gemv_cuda
from tinyvllm.kernels.gemm.tensor_core import linear_tensor_core_cuda
from tinyvllm.kernels.gemm.tiled import linear_tiled_cuda

__all__ = ["linear_cuda"]


def linear_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays: out uint16 [T, N] = x [T, K] @ weight [N, K].T + bias ([N] or [0])."""
    if x.shape[0] == 0:
        return
    if x.shape[1] % 8 or simulated():
        linear_tiled_cuda(out, x, weight, bias)
    elif x.shape[0] <= MAX_ROWS:
        linear_gemv_cuda(out, x, weight, bias)
    else:
        linear_tensor_core_cuda(out, x, weight, bias)
