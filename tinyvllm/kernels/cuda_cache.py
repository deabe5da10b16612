"""Compiled CUDA kernels, kept on disk: the same one-file-an-entry cache that the CPU kernels have (see
jit.py).

numba-cuda's own cache looks at the kernel's file only, so that after an edit of ptx.py or of a device
function elsewhere it would serve the old machine code. Here the entry's name is a hash that covers every file
of this package, the constants that a kernel was generated with, the argument types, the GPU's architecture
and all versions involved. What is kept is the linked machine code (cubin), so a warm start neither compiles
nor assembles.
"""

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

from tinyvllm.kernels import jit
from tinyvllm.kernels.cuda_support import cuda

__all__ = ["cached_cuda_jit"]


class CudaKernelCache(jit.KernelCache):
    """numba-cuda's cache interface: entries are its compiled kernels."""

    def _entry(self, signature, codegen) -> tuple[Path, str]:
        import numba_cuda

        cells = [cell.cell_contents for cell in self._function.__closure__ or ()]
        constants = [value for value in cells if isinstance(value, (int, float, str, bool, tuple))]
        key = repr((jit._STAMP, self._function.__module__, self._function.__qualname__, constants,
                    str(signature), sorted(self._options.items(), key=str), codegen.magic_tuple(),
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
