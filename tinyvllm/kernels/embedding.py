"""Row gathers: token embedding, and picking the rows whose logits are wanted.

    embedding:   out[t] = table[input_ids[t]]
    gather_rows: out[i] = x[indices[i]]

No arithmetic: bits are copied. The CPU backend keeps the table in the packed layout of its matrix kernel,
because a tied embedding is also the output projection and is stored once (see gemm/packing.py). There,
element (v, h) of the table is at [v // 16, h // 2, 2 * (v % 16) + h % 2].
"""

from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit

__all__ = ["embedding_numpy", "embedding_cpu", "embedding_cuda",
           "gather_rows_numpy", "gather_rows_cpu", "gather_rows_cuda"]


def embedding_numpy(out, input_ids, table):
    """out uint16 [T, H] = rows input_ids (int32 [T]) of table (uint16 [V, H])."""
    out[...] = table[input_ids]


def gather_rows_numpy(out, x, indices):
    """out uint16 [R, H] = rows indices (int32 [R]) of x (uint16 [T, H])."""
    out[...] = x[indices]


@cpu_jit
def embedding_cpu(out, input_ids, table):
    """As embedding_numpy, from a packed table: uint16 [ceil(V / 16), ceil(H / 2), 32]."""
    hidden = out.shape[1]
    for t in range(out.shape[0]):
        panel, lane = input_ids[t] // 16, input_ids[t] % 16
        for j in range(hidden // 2):
            out[t, 2 * j] = table[panel, j, 2 * lane]
            out[t, 2 * j + 1] = table[panel, j, 2 * lane + 1]
        if hidden % 2:
            out[t, hidden - 1] = table[panel, hidden // 2, 2 * lane]


@cpu_jit
def gather_rows_cpu(out, x, indices):
    """As gather_rows_numpy."""
    for i in range(out.shape[0]):
        row = indices[i]
        for j in range(out.shape[1]):
            out[i, j] = x[row, j]


@kernel
def _gather_kernel(out, table, indices):
    """One thread an element: neighbours in a warp copy neighbours in a row, so loads and stores are
    coalesced."""
    row, column = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column < out.shape[1]:
        out[row, column] = table[indices[row], column]


def embedding_cuda(out, input_ids, table):
    """As embedding_numpy, on device arrays."""
    if out.size:
        _gather_kernel[row_grid(*out.shape)](out, table, input_ids)


def gather_rows_cuda(out, x, indices):
    """As gather_rows_numpy, on device arrays."""
    if out.size:  # a step in which no request is sampled from asks for no rows
        _gather_kernel[row_grid(*out.shape)](out, x, indices)
