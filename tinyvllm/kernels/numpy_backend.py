"""The NumPy twins as a backend: slow and plain, the oracle that every other backend is tested against.

`model.llama.bind(OPS)` gives the forward pass over them. `linear` and `embedding` take weights as the
checkpoint has them, [outputs, inputs].
"""

from tinyvllm.kernels.argmax import argmax_numpy
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.attention.pool import pool_uint8_numpy
from tinyvllm.kernels.attention.rows import attention_rows_numpy
from tinyvllm.kernels.embedding import embedding_numpy, gather_rows_numpy
from tinyvllm.kernels.gemm.numpy_twin import linear_numpy
from tinyvllm.kernels.keep_rows import keep_rows_numpy
from tinyvllm.kernels.kv_cache import write_kv_numpy
from tinyvllm.kernels.residual_add import residual_add_numpy
from tinyvllm.kernels.rms_norm import add_rms_norm_numpy, rms_norm_numpy
from tinyvllm.kernels.rope import rope_numpy
from tinyvllm.kernels.sampling import sample_numpy
from tinyvllm.kernels.silu_mul import silu_mul_numpy

__all__ = ["OPS"]

OPS = {
    "embedding": embedding_numpy,
    "rms_norm": rms_norm_numpy,
    "add_rms_norm": add_rms_norm_numpy,
    "residual_add": residual_add_numpy,
    "linear": linear_numpy,
    "rope": rope_numpy,
    "write_kv": write_kv_numpy,
    "attention": attention_numpy,
    "silu_mul": silu_mul_numpy,
    "gather_rows": gather_rows_numpy,
    "keep_rows": keep_rows_numpy,
    "attention_rows": attention_rows_numpy,
    "pool_uint8": pool_uint8_numpy,
    "argmax": argmax_numpy,
    "sample": sample_numpy,
}
