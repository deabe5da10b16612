"""Keeping rows of a step for whoever looks into the engine: the watched request's, at their positions.

    source (one step)    | other request's rows | w w w | other's |
    positions            | -1  -1  -1  -1  -1   | 4 5 6 | -1  -1  |       where each row is kept; -1: it is not
    kept[layer]          | .  .  .  .  w w w .  .  .  . |

    kept[layer, positions[t], :] = source[t, :width]         width = kept.shape[2]

While nothing is watched there are no positions, and then this is one comparison. No arithmetic: bits are copied.
(The fused forward pass of a GPU has the same in 16-byte pieces: fused/rows.py.)
"""

from tinyvllm.kernels.cuda_support import cuda, kernel, row_grid
from tinyvllm.kernels.jit import cpu_jit

__all__ = ["keep_rows_numpy", "keep_rows_cpu", "keep_rows_cuda"]


def keep_rows_numpy(kept, layer, source, positions):
    """kept uint16 [L, P, W] gets, in `layer`, rows of source (uint16 [T, at least W]) at positions (int32 [T] or [0]).

    A row whose position is negative is not kept.
    """
    for row, position in enumerate(positions):
        if position >= 0:
            kept[layer, position] = source[row, : kept.shape[2]]


@cpu_jit
def keep_rows_cpu(kept, layer, source, positions):
    """As keep_rows_numpy."""
    for row in range(positions.shape[0]):
        position = positions[row]
        if position >= 0:
            for i in range(kept.shape[2]):
                kept[layer, position, i] = source[row, i]


@kernel
def _keep_rows_kernel(kept, layer, source, positions):
    """One thread an element."""
    row, column = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column < kept.shape[2]:
        position = positions[row]
        if position >= 0:
            kept[layer, position, column] = source[row, column]


def keep_rows_cuda(kept, layer, source, positions):
    """As keep_rows_numpy, on device arrays; nothing is launched when there are no positions."""
    if positions.shape[0]:
        _keep_rows_kernel[row_grid(positions.shape[0], kept.shape[2])](kept, layer, source, positions)
