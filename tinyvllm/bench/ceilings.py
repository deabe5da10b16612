"""How fast this machine can read memory and multiply: the two roofs of a roofline, measured in about half a second.

    attainable flops a second = min(peak, bytes a second * flops a byte)

Measured with the means of our own kernels (kernels/roofs.py), since a roof that no kernel here could touch would
explain nothing:

    bandwidth        all threads read a large array
    cache bandwidth  the same with an array that stays in the cache: small models live there
    peak             the innermost step of the matrix product, on operands that stay near

Every figure is the best of several runs: what other programs take away is not the machine's limit. On a machine with
other work the roofs are lower than they could be all the same, and a kernel that runs in a quieter moment can show up
above them.

    python -m tinyvllm.bench.ceilings         (with "cuda": of the GPU)
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tinyvllm.bench.environment import processor_name
from tinyvllm.errors import ConfigError
from tinyvllm.kernels import roofs
from tinyvllm.kernels.cpu_backend import exclusive
from tinyvllm.kernels.gemm.tile import DPBF16, STEP

ROUND_S, ROUNDS = 0.02, 4  # a measured run takes at least so long; the best of so many counts


class Ceilings(NamedTuple):
    """The roofs of one device. bandwidth, cache_bandwidth: bytes a second; peak: floating-point operations a second."""

    device: str
    bandwidth: float
    cache_bandwidth: float
    peak: float
    arithmetic: str  # what the peak was measured with

    def attainable(self, flops: float, num_bytes: float) -> float:
        """Flops a second that an operation of so many flops and bytes could reach, from memory."""
        return min(self.peak, self.bandwidth * flops / num_bytes) if num_bytes else self.peak


@functools.cache
def ceilings(device: str = "cpu") -> Ceilings:
    """The roofs of "cpu" or "cuda": measured once, then remembered. Raises ConfigError; DeviceError without a GPU."""
    if device == "cpu":
        return _cpu_ceilings()
    if device == "cuda":
        return _cuda_ceilings()
    raise ConfigError(f'ceilings are measured of "cpu" or "cuda", got {device!r}')


def best_rate(work: float, run: Callable[[int], None]) -> float:
    """Most `work` a second that run(repetitions), which takes so many times as long, does in some rounds."""
    run(1)  # compiled, and in the cache as far as it fits
    repetitions, best = 1, 0.0
    for _ in range(ROUNDS):
        while True:
            start = time.perf_counter()
            run(repetitions)
            took = time.perf_counter() - start
            best = max(best, work * repetitions / took)
            if took >= ROUND_S:
                break
            repetitions = max(2 * repetitions, int(1.2 * repetitions * ROUND_S / took))
    return best


def _cpu_ceilings() -> Ceilings:
    with exclusive():
        large = np.ones((1 << 28) // 8, np.uint64)  # more than a last-level cache holds
        small = large[:(1 << 22) // 8]
        bandwidth, cache_bandwidth = (best_rate(array.nbytes, functools.partial(roofs.read_cpu, array))
                                      for array in (large, small))
        x, weight, flops = roofs.tile_operands()
        num_threads = roofs.multiply_cpu(x, weight, 1)
        peak = best_rate(num_threads * flops, functools.partial(roofs.multiply_cpu, x, weight))
    arithmetic = "bf16 dot product (avx512_bf16)" if STEP is DPBF16 else "float32 multiply-add"
    return Ceilings(processor_name(), bandwidth, max(bandwidth, cache_bandwidth), peak, arithmetic)


def _cuda_ceilings() -> Ceilings:
    from tinyvllm.kernels.cuda_support import cuda, device_name, pointer, require_cuda

    require_cuda()
    blocks = 8 * cuda.get_current_device().MULTIPROCESSOR_COUNT
    out = cuda.device_array(1, np.float32)
    large = cuda.device_array(min(1 << 30, cuda.current_context().get_memory_info().free // 4) >> 20 << 20, np.uint8)

    def read(num_bytes: int, repetitions: int) -> None:
        roofs.read_kernel[blocks, roofs.THREADS](pointer(out), pointer(large), num_bytes, repetitions)
        cuda.synchronize()

    def multiply(repetitions: int) -> None:
        roofs.multiply_kernel[blocks, roofs.THREADS](pointer(out), 1000 * repetitions)
        cuda.synchronize()

    bandwidth, cache_bandwidth = (best_rate(size, functools.partial(read, size)) for size in (large.nbytes, 1 << 24))
    peak = best_rate(1000 * blocks * roofs.MULTIPLY_FLOPS, multiply)
    return Ceilings(device_name(), bandwidth, max(bandwidth, cache_bandwidth), peak, "bf16 mma.sync")


def main() -> None:
    found = ceilings(*sys.argv[1:2])
    print(found.device)
    for what, rate, unit in (("memory", found.bandwidth, "GB/s"), ("cache", found.cache_bandwidth, "GB/s"),
                             ("peak", found.peak, f"GFLOP/s, {found.arithmetic}")):
        print(f"  {what:7}{rate / 1e9:12.1f} {unit}")


if __name__ == "__main__":
    main()
