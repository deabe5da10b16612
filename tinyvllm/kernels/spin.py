"""Keeping the GPU waiting for a while, so that what is launched meanwhile queues up behind it.

A measuring aid (probe/profiler.py): kernels that wait in the queue then run one right after the other, and the time
between two events is the time of the kernels between them. In the simulator, which has no queue, nothing happens.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import kernel, simulated
from tinyvllm.kernels.ptx import instruction

__all__ = ["spin_cuda"]

nanoseconds = instruction("mov.u64 $0, %globaltimer;", "u64", "", volatile=True)


@kernel(signature=("uint64",), max_threads=32)
def _spin_kernel(duration):
    """One thread watches the clock."""
    end = nanoseconds() + np.uint64(duration)
    while nanoseconds() < end:
        pass


def spin_cuda(seconds: float) -> None:
    """Launch a kernel that runs for so long. Returns at once."""
    if not simulated():
        _spin_kernel[1, 1](int(seconds * 1e9))
