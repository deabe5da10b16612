"""The residual stream: residual = bf16(residual + x), element by element.

`forward` uses it fused into the norm that follows (add_rms_norm in rms_norm.py), which saves a pass over
memory; here it stands alone. The sum is formed in float32 and rounded once, as adding two bf16 tensors does
in the reference.
"""

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16, narrow, widen
from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.ptx import narrow_cuda, widen_cuda

__all__ = ["residual_add_numpy", "residual_add_cpu", "residual_add_cuda"]


def residual_add_numpy(residual, x):
    """residual uint16 [T, H] (bf16 bits, in and out) += x uint16 [T, H]."""
    residual[...] = float32_to_bf16(bf16_to_float32(residual) + bf16_to_float32(x))


@cpu_jit
def residual_add_cpu(residual, x):
    """As residual_add_numpy."""
    for t in range(residual.shape[0]):
        for i in range(residual.shape[1]):
            residual[t, i] = narrow(widen(residual[t, i]) + widen(x[t, i]))


@kernel
def _residual_add_kernel(residual, x):
    row, column = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column < residual.shape[1]:
        residual[row, column] = narrow_cuda(widen_cuda(residual[row, column]) + widen_cuda(x[row, column]))


def residual_add_cuda(residual, x):
    """As residual_add_numpy, on device arrays."""
    _residual_add_kernel[row_grid(*residual.shape)](residual, x)
