"""The same matrix product by cuBLAS, NVIDIA's library: for comparison only, never part of a forward pass
unless asked for.

cuBLAS comes from Fortran's world, where matrices are stored by columns. Ours are stored by rows. No copy is
needed, because the same bytes read the other way round are the transpose:

    row-major [R, C] with rows of length C   =   column-major [C, R] with leading dimension C

    wanted, by rows         out   [T, N] = x [T, K] @ weight [N, K].T
    transpose both sides    out.T [N, T] = weight [N, K] @ x.T [K, T]
    as cuBLAS sees it       C = op(A) @ op(B),  m = N, n = T, k = K
        C: the bytes of out, column-major [N, T], ldc = N
        A: the bytes of weight, column-major [K, N], lda = K: wants transposing
        B: the bytes of x, column-major [K, T], ldb = K: as it is

So the operands swap places and only the weight is flagged as transposed. The bias is written into out first
and added by cuBLAS with beta = 1, in float32 before the one rounding.

The binding is nvmath-python (nvmath.bindings.cublas.gemm_ex): pip install "nvmath-python[cu13]".
"""

import functools

import numpy as np

from tinyvllm.errors import DeviceError
from tinyvllm.kernels.cuda_support import cuda, kernel, pointer, require_cuda, row_grid

__all__ = ["linear_cublas_cuda"]


@functools.cache
def _binding():
    """(nvmath.bindings.cublas, a handle)."""
    require_cuda()
    try:
        from nvmath.bindings import cublas
    except Exception as error:  # not installed, or installed without the library itself
        raise DeviceError(f"comparing with cuBLAS needs nvmath-python and the cuBLAS library, which cannot "
                          f'be loaded ({error}). Install them with pip install "nvmath-python[cu13]", or '
                          f"leave cuBLAS out of the comparison.") from error
    cuda.current_context()  # cuBLAS attaches itself to the context that is current, and to the default stream
    return cublas, cublas.create()


@kernel
def _fill_rows_kernel(out, row):
    i, column = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column < out.shape[1]:
        out[i, column] = row[column]


def linear_cublas_cuda(out, x, weight, bias):
    """As linear_numpy, on device arrays, by cublasGemmEx. Raises DeviceError where the binding is missing."""
    cublas, handle = _binding()
    (num_rows, depth), num_outputs = x.shape, weight.shape[0]
    if bias.shape[0]:
        _fill_rows_kernel[row_grid(*out.shape)](out, bias)
    alpha, beta = np.float32(1), np.float32(1 if bias.shape[0] else 0)
    alpha, beta = np.atleast_1d(alpha), np.atleast_1d(beta)  # cuBLAS reads them at host addresses
    bf16 = 14  # cudaDataType_t: CUDA_R_16BF
    cublas.gemm_ex(handle, cublas.Operation.T, cublas.Operation.N, num_outputs, num_rows, depth,
                   alpha.ctypes.data, pointer(weight), bf16, depth, pointer(x), bf16, depth, beta.ctypes.data,
                   pointer(out), bf16, num_outputs, cublas.ComputeType.COMPUTE_32F, cublas.GemmAlgo.DEFAULT)
