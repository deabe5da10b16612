"""The CUDA set of operations, for model.llama.bind: every one is a numba.cuda kernel behind a launch wrapper.

Weights are plain [N, K] matrices here (the packed layout is the CPU's), activations and the cache are device
arrays of bf16 bits. In numba's simulator the same names run the lesson-grade kernels, so that a whole forward
pass of a toy model can be stepped through without a GPU.

Kernels are compiled at their first launch, or loaded from disk. gemm/gemv.py has one kernel for each number
of rows from 1 to 8, so a server that wants no hiccup runs one step at each of those batch sizes before it
takes requests.

TINYVLLM_CUDA_LINEAR = tinyvllm | cublas chooses who multiplies matrices: our kernels, the default, or NVIDIA's library,
for comparison.
"""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from tinyvllm.errors import ConfigError
from tinyvllm.kernels.argmax import argmax_cuda
from tinyvllm.kernels.attention.cuda import attention_cuda
from tinyvllm.kernels.attention.pool import pool_uint8_cuda
from tinyvllm.kernels.attention.rows import attention_rows_cuda
from tinyvllm.kernels.embedding import embedding_cuda, gather_rows_cuda
from tinyvllm.kernels.gemm.cublas import linear_cublas_cuda
from tinyvllm.kernels.gemm.cuda import linear_cuda
from tinyvllm.kernels.keep_rows import keep_rows_cuda
from tinyvllm.kernels.kv_cache import write_kv_cuda
from tinyvllm.kernels.residual_add import residual_add_cuda
from tinyvllm.kernels.rms_norm import add_rms_norm_cuda, rms_norm_cuda
from tinyvllm.kernels.rope import rope_cuda
from tinyvllm.kernels.sampling import sample_cuda
from tinyvllm.kernels.silu_mul import silu_mul_cuda

__all__ = ["OPS", "chosen_operations", "linear_was_chosen"]

OPS = MappingProxyType({
    "embedding": embedding_cuda,
    "rms_norm": rms_norm_cuda,
    "add_rms_norm": add_rms_norm_cuda,
    "residual_add": residual_add_cuda,
    "linear": linear_cuda,
    "rope": rope_cuda,
    "write_kv": write_kv_cuda,
    "attention": attention_cuda,
    "silu_mul": silu_mul_cuda,
    "gather_rows": gather_rows_cuda,
    "keep_rows": keep_rows_cuda,
    "attention_rows": attention_rows_cuda,
    "pool_uint8": pool_uint8_cuda,
    "argmax": argmax_cuda,
    "sample": sample_cuda,
})

LINEARS = MappingProxyType({"tinyvllm": linear_cuda, "cublas": linear_cublas_cuda})


def chosen_operations() -> Mapping[str, Callable]:
    """OPS, with the `linear` that TINYVLLM_CUDA_LINEAR names. Raises ConfigError for a name that is none."""
    wanted = os.environ.get("TINYVLLM_CUDA_LINEAR", "tinyvllm")
    if wanted not in LINEARS:
        raise ConfigError(f"TINYVLLM_CUDA_LINEAR is {wanted!r}; it can be {' or '.join(LINEARS)}")
    return {**OPS, "linear": LINEARS[wanted]}


def linear_was_chosen() -> bool:
    """Whether TINYVLLM_CUDA_LINEAR asks for another `linear` than ours: the fused operations have only ours."""
    return os.environ.get("TINYVLLM_CUDA_LINEAR", "tinyvllm") != "tinyvllm"
