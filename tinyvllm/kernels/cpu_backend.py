"""proto"""
import functools
from tinyvllm.kernels.argmax import argmax_cpu
from tinyvllm.kernels.attention.cpu import attention_cpu
from tinyvllm.kernels.embedding import embedding_cpu, gather_rows_cpu
from tinyvllm.kernels.gemm.cpu import linear_cpu
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.kv_cache import write_kv_cpu
from tinyvllm.kernels.residual_add import residual_add_cpu
from tinyvllm.kernels.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from tinyvllm.kernels.rope import rope_cpu
from tinyvllm.kernels.sampling import sample_cpu
from tinyvllm.kernels.silu_mul import silu_mul_cpu
from tinyvllm.model import llama

OPS = {
    "embedding": embedding_cpu,
    "rms_norm": rms_norm_cpu,
    "add_rms_norm": add_rms_norm_cpu,
    "residual_add": residual_add_cpu,
    "linear": linear_cpu,
    "rope": rope_cpu,
    "write_kv": write_kv_cpu,
    "attention": attention_cpu,
    "silu_mul": silu_mul_cpu,
    "gather_rows": gather_rows_cpu,
    "argmax": argmax_cpu,
    "sample": sample_cpu,
}


@functools.cache
def compiled_forward():
    """tinyvllm.model.llama.forward compiled into one function over the kernels above (from the cache if it is there)."""
    return cpu_jit(llama.bind(OPS))
