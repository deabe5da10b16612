"""Compiled CUDA kernels, kept on disk: the same one-file-an-entry cache that the CPU kernels have (see
jit.py).

numba-cuda's own cache looks at the kernel's file only, so that after an edit of ptx.py or of a device
function elsewhere it would serve the old machine code. Here the entry's name is a hash that covers every file
of this package, the constants that a kernel and its parts were generated with, the argument types, the GPU's
architecture and all versions involved. What is kept is the linked machine code (cubin), so a warm start neither
compiles nor assembles.
"""

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import numpy as np

from tinyvllm.kernels import jit
from tinyvllm.kernels.cuda_support import cuda

__all__ = ["cached_cuda_jit", "constants"]


def constants(function: Callable) -> list:
    """What a function was generated with: the values that it has from the functions around it, and, where these are
    functions for kernels themselves, theirs. Two kernels of one source differ in nothing else."""
    found: list = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        if isinstance(value, (int, float, str, tuple, list, np.generic, type(None))):
            found.append((name, value))
        elif hasattr(value, "ptx"):  # ptx.instruction
            found.append((name, value.ptx))
        elif hasattr(value, "sequence"):  # hopper.sequence
            outputs, inputs, build = value.sequence
            found.append((name, outputs, inputs, constants(build)))
        elif isinstance(getattr(value, "py_func", value), FunctionType):
            value = getattr(value, "py_func", value)
            found.append((name, value.__qualname__, constants(value)))
        else:
            raise TypeError(f"{function.__qualname__} has {name}, of type {type(value).__name__}, from around it: a "
                            "compiled kernel could not be told from one with another value")
    return found


class CudaKernelCache(jit.KernelCache):
    """numba-cuda's cache interface: entries are its compiled kernels."""

    def _entry(self, signature, codegen) -> tuple[Path, str]:
        import numba_cuda

        key = repr((jit._STAMP, self._function.__module__, self._function.__qualname__,
                    constants(self._function), str(signature), sorted(self._options.items(), key=str),
                    codegen.magic_tuple(),
                    numba_cuda.__version__, sys.platform, sys.version))
        name = f"{self._function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cuda.bin"
        return jit.cache_dir() / jit._STAMP / name, key

    def _load(self, target_context, payload: bytes):
        from numba.cuda.dispatcher import _Kernel

        return _Kernel._rebuild(**pickle.loads(payload))

    def _dump(self, kernel) -> bytes:
        from numba.cuda.serialize import dumps

        return dumps(kernel._reduce_states())

    def _cacheable(self, kernel) -> bool:
        return True  # no lifted loops and no addresses in CUDA kernels


def cached_cuda_jit(function: Callable, signature, options: dict):
    """numba.cuda.jit with the cache above. With a signature it compiles (or loads) at once, else for each
    launch's."""
    dispatcher = cuda.jit(function, **options)
    dispatcher._cache = CudaKernelCache(function, options)
    if signature is not None:
        dispatcher.compile(signature.args)
        dispatcher.disable_compile()
    return dispatcher
