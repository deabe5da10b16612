"""What every CUDA kernel here shares: is there a GPU, how a kernel is compiled, how it is launched.

`import tinyvllm.kernels.rms_norm` has to work where no CUDA package is installed, so nothing is compiled on
import: `@kernel` keeps the Python function and hands it to numba.cuda on its first launch.

Two kinds of kernels live in this package:

    lesson-grade  arrays in, plain Python arithmetic; they also run in numba's CUDA simulator
                  (NUMBA_ENABLE_CUDASIM=1), where a kernel can be stepped through with a debugger
    PTX-grade     raw addresses (uint64) and inline PTX from ptx.py: tensor cores, 16-byte loads, asynchronous
                  copies; they need a GPU to run, but not to be compiled

Launch wrappers take numba device arrays, or anything with `__cuda_array_interface__`, and launch on the
default stream.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvllm.errors import DeviceError

try:
    import numba_cuda  # noqa: F401  (numba has an older numba.cuda of its own, which lacks what ptx.py needs)
    from numba import cuda
except Exception as error:  # not installed, or broken by a mismatch of versions
    cuda, _IMPORT_ERROR = None, error
else:
    _IMPORT_ERROR = None

__all__ = ["cuda", "simulated", "cuda_available", "require_cuda", "compute_capability", "device_name",
           "kernel", "device_function", "pointer",
           "workspace", "ceil_div", "block_threads", "row_grid", "array_or_empty"]

MINIMUM_COMPUTE_CAPABILITY = (8, 0)  # Ampere: the first with bf16 tensor cores and asynchronous copies
THREADS = 256  # a block, for kernels that have one thread an element


# ---- is there a GPU ----


def simulated() -> bool:
    """True when numba.cuda is its simulator: kernels run as Python threads on the CPU."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def cuda_available() -> bool:
    """True when `require_cuda` would pass."""
    try:
        require_cuda()
    except DeviceError:
        return False
    return True


def require_cuda() -> None:
    """Raise DeviceError, saying what is missing, unless a GPU that can run these kernels is there."""
    advice = 'Use device="cpu", which needs no GPU.'
    if cuda is None:
        raise DeviceError(f'device="cuda" needs the package numba-cuda, which cannot be imported '
                          f'({_IMPORT_ERROR}). In the folder of tinyvllm: pip install -e ".[cuda]". {advice}')
    if simulated():
        return
    try:
        found = cuda.is_available()
        reason = "" if found else f" ({cuda.cuda_error()})" if getattr(cuda, "cuda_error", None) else ""
        capability = tuple(cuda.get_current_device().compute_capability) if found else None
    except Exception as error:  # a driver that is there but cannot start says so in many ways
        found, reason, capability = False, f" ({error})", None
    if not found:
        reason = " ".join(reason.split())  # the driver's message may be several lines
        raise DeviceError(f'device="cuda" needs an NVIDIA GPU and its driver; none was found {reason}. '
                          f"{advice}")
    if capability < MINIMUM_COMPUTE_CAPABILITY:
        need = ".".join(map(str, MINIMUM_COMPUTE_CAPABILITY))
        name = device_name()
        has = ".".join(map(str, capability))
        raise DeviceError(f"this GPU ({name}) has compute capability {has}; tinyvllm's kernels need {need} "
                          f"or newer (bf16 tensor cores). {advice}")


def compute_capability() -> tuple[int, int]:
    """Of the current device, e.g. (9, 0)."""
    return tuple(cuda.get_current_device().compute_capability)


def device_name() -> str:
    """What the current GPU calls itself."""
    if simulated():
        return "numba's CUDA simulator"
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else name


# ---- compiling ----


class kernel:
    """A numba.cuda kernel that is compiled when it is first launched: `name[grid, block, stream,
    shared](...)`.

    signature: argument types for PTX-grade kernels, as a list of names ("uint64", "int32", "float32");
    lesson-grade kernels leave it out and are compiled for the arrays they meet. max_threads: threads a block
    at most, min_blocks: blocks that should fit on a multiprocessor together; the compiler divides the
    registers by them (`__launch_bounds__`).
    """

    def __init__(self, function: Callable | None = None, *, signature: tuple[str, ...] | None = None,
                 max_threads: int | None = None, min_blocks: int = 1):
        self._signature = signature
        self.options = {} if max_threads is None else {"launch_bounds": (max_threads, min_blocks)}
        self._compiled = self._direct = None
        if function is not None:
            self(function)

    def __call__(self, function: Callable) -> "kernel":
        self.py_func = function
        functools.update_wrapper(self, function)
        return self

    def __getitem__(self, configuration):
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled[configuration]

    @property
    def compiled(self):
        """The numba.cuda dispatcher (compiles it)."""
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled

    @property
    def direct(self):
        """The compiled kernel as driver.py launches it; PTX-grade kernels only (compiles it)."""
        if self._direct is None:
            from tinyvllm.kernels.driver import CompiledKernel

            numba_kernel = next(iter(self.compiled.overloads.values()))
            self._direct = CompiledKernel(int(numba_kernel._codelibrary.get_cufunc().handle), self._signature,
                                          getattr(self, "shared_percent", None))
        return self._direct

    def numba_signature(self):
        """The signature as numba types, or None."""
        from numba.cuda import types  # not on import: see above

        if self._signature is None:
            return None
        return types.void(*(getattr(types, name) for name in self._signature))

    def _compile(self):
        require_cuda()
        if simulated():
            return cuda.jit(self.py_func)
        from tinyvllm.kernels.cuda_cache import cached_cuda_jit

        return cached_cuda_jit(self.py_func, self.numba_signature(), self.options)


def device_function(function: Callable) -> Callable:
    """A small function for use inside CUDA kernels, compiled with them; plain Python where numba.cuda is
    missing."""
    if cuda is None:
        return function
    # Inlined as Python, before types are inferred. Otherwise numba would compile it by itself and ask the
    # driver for the GPU's architecture, and kernels must also compile where there is no GPU.
    return cuda.jit(device=True, inline="always")(function)


# ---- launching ----


def ceil_div(a: int, b: int) -> int:
    """Blocks of b that cover a."""
    return -(-a // b)


def block_threads(threads: int) -> int:
    """Threads a block for kernels that work with any number: few in the simulator, which runs each as a
    Python thread."""
    return min(threads, 32) if simulated() else threads


def row_grid(rows: int, columns: int) -> tuple[tuple[int, int], int]:
    """Blocks and threads for one thread an element of a [rows, columns] matrix.

    Rows run along x, of which a grid may have 2**31, columns along y; a kernel's thread then works on
    row = cuda.blockIdx.x, column = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, with no division.
    """
    threads = block_threads(THREADS)
    return (rows, ceil_div(columns, threads)), threads


@functools.lru_cache(maxsize=8)
def _empty(dtype, context_id: int):
    return cuda.device_array(0, dtype)


def array_or_empty(array: Any) -> Any:
    """The array, or where it has no elements a device array of none.

    numba cannot index a device array without elements, so the absent biases of a model may be host arrays.
    """
    return array if array.shape[0] else _empty(np.dtype(array.dtype), id(cuda.current_context()))


def pointer(array: Any) -> int:
    """Device address of an array's first element."""
    address = getattr(array, "device_ctypes_pointer", None)
    if address is not None:
        return address.value or 0
    return array.__cuda_array_interface__["data"][0]


@functools.lru_cache(maxsize=8)
def _scratch(size: int, context_id: int):
    return cuda.device_array(size, np.float32)


def workspace(num_floats: int):
    """Device scratch of at least `num_floats` float32, contents undefined, shared by all kernels that ask for
    it.

    One stream runs one kernel after the other, so a kernel may use it until it ends, and none may expect it
    to keep anything for longer. Sizes are rounded up to a power of two, so that few are ever allocated.
    """
    size = 1 << max(12, (num_floats - 1).bit_length())
    return _scratch(size, id(cuda.current_context()))
