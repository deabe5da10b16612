"""`attention` on the GPU: decode rows by decode.py, all other rows by prefill.py.

Both have a tensor-core kernel for head_dim 16, 32, ... 128 and up to 64 query heads a key head, and a simple
one for what is left, and for the simulator.
"""

from tinyvllm.kernels.attention.decode import decode_attention_cuda
from tinyvllm.kernels.attention.decode_simple import decode_attention_simple_cuda
from tinyvllm.kernels.attention.prefill import prefill_attention_cuda, tensor_core_can_run
from tinyvllm.kernels.attention.prefill_simple import prefill_attention_simple_cuda
from tinyvllm.kernels.cuda_support import simulated

__all__ = ["attention_cuda"]


def attention_cuda(out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                   num_heads, num_kv_heads, head_dim, block_size):
    """As attention_numpy, on device arrays."""
    arguments = (out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                 num_heads, num_kv_heads, head_dim, block_size)
    tensor_core = not simulated() and tensor_core_can_run(num_heads, num_kv_heads, head_dim)
    if num_decodes > 0:
        (decode_attention_cuda if tensor_core else decode_attention_simple_cuda)(*arguments)
    if num_decodes < seq_lens.shape[0]:
        (prefill_attention_cuda if tensor_core else prefill_attention_simple_cuda)(*arguments)
