"""The CPU kernels as a backend: the table of operations, and the forward pass as one compiled function.

A small model's step is over in a third of a millisecond. Calling its hundred operations from Python would
take as long again, so by default the whole forward pass is one compiled function. `eager_forward` calls them
one by one: the same kernels and the same bits, but one can look between them.

Weights of linear layers, and the embedding table, are packed (gemm/packing.py).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

from tinyvllm.kernels.argmax import argmax_cpu
from tinyvllm.kernels.attention.cpu import attention_cpu
from tinyvllm.kernels.attention.pool import pool_uint8_cpu
from tinyvllm.kernels.attention.rows import attention_rows_cpu
from tinyvllm.kernels.embedding import embedding_cpu, gather_rows_cpu
from tinyvllm.kernels.gemm.cpu import linear_cpu
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.kernels.keep_rows import keep_rows_cpu
from tinyvllm.kernels.kv_cache import write_kv_cpu
from tinyvllm.kernels.residual_add import residual_add_cpu
from tinyvllm.kernels.rms_norm import add_rms_norm_cpu, rms_norm_cpu
from tinyvllm.kernels.rope import rope_cpu
from tinyvllm.kernels.sampling import sample_cpu
from tinyvllm.kernels.silu_mul import silu_mul_cpu
from tinyvllm.kernels.threads import KERNEL_LOCK, configure_threads
from tinyvllm.model import llama

__all__ = ["OPS", "compiled_forward", "eager_forward", "exclusive"]

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
    "keep_rows": keep_rows_cpu,
    "attention_rows": attention_rows_cpu,
    "pool_uint8": pool_uint8_cpu,
    "argmax": argmax_cpu,
    "sample": sample_cpu,
}


@functools.cache
def compiled_forward() -> Callable:
    """model.llama.forward as one compiled function; its first call compiles it or loads it from the cache."""
    return _guarded(cpu_jit(llama.bind(OPS)))


@functools.cache
def eager_forward() -> Callable:
    """model.llama.forward, calling the same kernels one by one from Python."""
    return _guarded(llama.bind(OPS))


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Kernels called in here have the threads to themselves, as many as are set up."""
    with KERNEL_LOCK:
        configure_threads()
        yield


def _guarded(forward: Callable) -> Callable:
    """`forward` with its threads set up, one call at a time."""

    @functools.wraps(forward)
    def guarded(w, kv, batch, buf, dims):
        with KERNEL_LOCK:
            configure_threads()
            forward(w, kv, batch, buf, dims)

    return guarded
