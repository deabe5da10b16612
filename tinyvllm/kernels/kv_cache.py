"""Writing the step's keys and values into the paged cache.

The cache is cut into blocks of `block_size` tokens; a request owns any blocks, in any order, and its block
table says which. The scheduler turns that into one number a token, its slot:

    slot = block_id * block_size + offset       cache[block_id, head, offset, :] = the token's key (or value)

so this kernel knows nothing of requests. A negative slot marks a padding row, which is skipped.

    k_cache, v_cache   [num_blocks, Hkv, block_size, D]: within a block one head's tokens are adjacent,
                       because attention walks over the tokens of one head

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(2023).
"""

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit

__all__ = ["write_kv_numpy", "write_kv_cpu", "write_kv_cuda"]


def write_kv_numpy(k_cache, v_cache, qkv, slot_mapping, num_heads, num_kv_heads, head_dim, block_size):
    """Copy the k and v heads of qkv (uint16 [T, (Hq + 2 Hkv) * D]) to the slots slot_mapping (int32 [T])."""
    rows = np.flatnonzero(slot_mapping >= 0)
    blocks, offsets = np.divmod(slot_mapping[rows], block_size)
    first = num_heads * head_dim
    size = num_kv_heads * head_dim
    k_cache[blocks, :, offsets] = qkv[rows, first : first + size].reshape(-1, num_kv_heads, head_dim)
    first += size
    v_cache[blocks, :, offsets] = qkv[rows, first : first + size].reshape(-1, num_kv_heads, head_dim)


@cpu_jit
def write_kv_cpu(k_cache, v_cache, qkv, slot_mapping, num_heads, num_kv_heads, head_dim, block_size):
    """As write_kv_numpy."""
    for t in range(qkv.shape[0]):
        slot = slot_mapping[t]
        if slot >= 0:
            block, offset = slot // block_size, slot % block_size
            for head in range(num_kv_heads):
                k_first = (num_heads + head) * head_dim
                v_first = k_first + num_kv_heads * head_dim
                for i in range(head_dim):
                    k_cache[block, head, offset, i] = qkv[t, k_first + i]
                    v_cache[block, head, offset, i] = qkv[t, v_first + i]


@kernel
def _write_kv_kernel(k_cache, v_cache, qkv, slot_mapping, num_heads, num_kv_heads, head_dim, block_size):
    """One thread an element of one token's keys, and the element of its values at the same place."""
    token, element = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    size = num_kv_heads * head_dim
    if element < size:
        slot = slot_mapping[token]
        if slot >= 0:
            head = element // head_dim
            feature = element - head * head_dim
            block = slot // block_size
            offset = slot - block * block_size
            k_cache[block, head, offset, feature] = qkv[token, num_heads * head_dim + element]
            v_cache[block, head, offset, feature] = qkv[token, num_heads * head_dim + size + element]


def write_kv_cuda(k_cache, v_cache, qkv, slot_mapping, num_heads, num_kv_heads, head_dim, block_size):
    """As write_kv_numpy, on device arrays."""
    _write_kv_kernel[row_grid(qkv.shape[0], num_kv_heads * head_dim)](
        k_cache, v_cache, qkv, slot_mapping, num_heads, num_kv_heads, head_dim, block_size)
