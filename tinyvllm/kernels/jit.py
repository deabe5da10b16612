"""`cpu_jit`: numba.njit for this package's CPU kernels, with an on-disk cache that never serves stale code.

Compiling every kernel takes many seconds, loading compiled ones a fraction of one, so they are kept on disk.
numba has such a cache, but it looks only at the file that holds the function: edit a helper in another file
and the old machine code, with the old helper inlined, is served without a word. (It also shares one index
among processes, in which two that compile at the same time can take each other's entries.) Here an entry is
one file, named by a hash over everything that went into the machine code:

    source stamp     every .py file of tinyvllm/kernels, and tinyvllm/model/llama.py
    fingerprint      bytecode and constants of the function and of every function it reaches through its
                     globals and closure: this tells apart the copies of `forward` that model.llama.bind makes
    signature        the argument types, and the options of njit
    the machine      processor name and features, operating system; versions of numba, llvmlite and Python

An entry is written to a temporary file and renamed, so a reader sees all of it or nothing, and two processes
that compile the same thing write the same thing. Whatever cannot be read is compiled again.

Where: $TINYVLLM_CACHE_DIR, else $NUMBA_CACHE_DIR, else the user's cache directory ($XDG_CACHE_HOME or
~/.cache on Linux), else a private directory under the system's temporary one.
"""

import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import types as python_types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba.core import compiler, config, types
from numba.core.caching import _Cache
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps
from numba.extending import intrinsic

import tinyvllm.kernels.threads  # noqa: F401  says how threads wait, which must be said before they start

__all__ = ["cpu_jit", "cpu_helper", "thread_count", "PARALLEL_ELEMENTS", "cache_dir", "source_stamp"]

# Without reordering and without assuming that NaN and infinity do not occur: only a * b + c may become one
# fused instruction. A row's result must not depend on its neighbours, and NaN must not pass unseen.
FASTMATH = frozenset({"contract"})
# Threads for `prange` loops and for nothing else: left to itself, numba also spreads whole-array expressions,
# starting threads for tiny ones, and it mistakes the shape of an array whose name is bound again.
PARALLEL = {"prange": True, "comprehension": False, "reduction": False, "inplace_binop": False,
            "setitem": False, "numpy": False, "stencil": False, "fusion": False}
PARALLEL_ELEMENTS = 1 << 17  # from so many on, an element-by-element operation is given to several threads
KEPT_STAMPS = 6  # directories of older sources that are kept, so that switching branches does not recompile


def cpu_jit(function: Callable | None = None, *, parallel: bool = False, fastmath=FASTMATH) -> Callable:
    """Compile `function` with numba.njit on its first call, or load it from the cache.

    parallel: `prange` loops are spread over threads. fastmath: a set of LLVM flags; keep to the default
    unless the result provably stays the same for a row whatever the batch is. The GIL is released while the
    kernel runs, and division by zero gives inf or nan as NumPy does (no exception, hence loops that
    vectorise).

    Use it on entry points, which Python calls: operations, and whole forward passes. What only kernels call
    belongs under `cpu_helper`.
    """
    if function is None:
        return functools.partial(cpu_jit, parallel=parallel, fastmath=fastmath)
    fastmath = set(fastmath) if fastmath else False
    threads = dict(PARALLEL) if parallel else False  # numba empties the dictionary that it is given
    kernel = numba.njit(parallel=threads, fastmath=fastmath, error_model="numpy", nogil=True)(function)
    if isinstance(kernel, Dispatcher):  # a plain function when NUMBA_DISABLE_JIT is set
        kernel._cache = KernelCache(function, {"parallel": parallel, "fastmath": sorted(fastmath or ())})
    return kernel


def cpu_helper(function: Callable) -> Callable:
    """A small function for use inside kernels: compiled with its caller, inlined by LLVM, not cached."""
    return numba.njit(fastmath=set(FASTMATH), error_model="numpy", nogil=True)(function)


@intrinsic
def thread_count(typingctx):
    """Inside a kernel: how many threads a prange loop gets (numba.get_num_threads would prevent caching)."""
    numba.get_num_threads()  # starts the threads, and with them the symbol that is called below exists

    def codegen(context, builder, signature, args):
        function = builder.module.globals.get("get_num_threads") or ir.Function(
            builder.module, ir.FunctionType(context.get_value_type(types.intp), []), "get_num_threads")
        return builder.call(function, [])

    return types.intp(), codegen


# ---- what an entry depends on ----


def source_stamp(package: Path | None = None) -> str:
    """Hash over the sources that CPU machine code is made from (`package`: the tinyvllm directory)."""
    package = package or Path(__file__).resolve().parent.parent
    files = sorted((package / "kernels").rglob("*.py")) + [package / "model" / "llama.py"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


# Taken on import, before any kernel module is: a file edited while this process runs then belongs to the next
# one.
_STAMP = source_stamp()


def fingerprint(function: Callable) -> str:
    """Hash over bytecode and constants of `function` and of all Python functions that it reaches by name."""
    digest, seen = hashlib.sha256(), set()

    def note(*parts):
        digest.update("\0".join(map(str, parts)).encode() + b"\1")

    def visit_code(code: python_types.CodeType):
        note(code.co_name, code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars)
        for const in code.co_consts:
            if isinstance(const, python_types.CodeType):
                visit_code(const)
            else:
                note(type(const).__name__, repr(const))

    def names_of(code: python_types.CodeType):
        yield from code.co_names
        for const in code.co_consts:
            if isinstance(const, python_types.CodeType):
                yield from names_of(const)

    def visit(name: str, value: Any):
        if isinstance(value, Dispatcher):
            value = value.py_func
        value = getattr(value, "_defn", value)  # a numba intrinsic: the function that emits its code
        if isinstance(value, python_types.FunctionType):
            note(name, value.__module__, value.__qualname__)
            if id(value) in seen:
                return
            seen.add(id(value))
            visit_code(value.__code__)
            for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                visit(free, cell.cell_contents)
            if not _foreign(value):
                for global_name in sorted(set(names_of(value.__code__))):
                    if global_name in value.__globals__:
                        visit(global_name, value.__globals__[global_name])
        elif isinstance(value, np.ndarray):
            note(name, value.dtype, value.shape, value.tobytes().hex())
        elif isinstance(value, (int, float, complex, str, bytes, type(None), np.generic)):
            note(name, type(value).__name__, repr(value))
        elif isinstance(value, (tuple, list, dict, set, frozenset)):
            note(name, type(value).__name__, len(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            if isinstance(value, (set, frozenset)):
                items = enumerate(sorted(value, key=repr))
            for key, item in items:
                visit(str(key), item)
        elif isinstance(value, (type, python_types.ModuleType, python_types.BuiltinFunctionType)):
            # Known by name: versions of the packages are part of the key, this package's sources of the
            # stamp.
            note(name, getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
        elif isinstance(value, types.Type):
            note(name, value)
        else:  # an object: its class, and what it holds
            note(name, type(value).__module__, type(value).__qualname__)
            if id(value) not in seen and not _foreign(type(value)):
                seen.add(id(value))
                for attribute, held in sorted(getattr(value, "__dict__", {}).items()):
                    visit(attribute, held)

    visit("", function)
    return digest.hexdigest()


def _foreign(value) -> bool:
    """Whether a function or class belongs to a package whose version is part of the key."""
    return (value.__module__ or "").partition(".")[0] in ("numba", "numpy", "llvmlite")


# ---- where entries are ----


@functools.cache
def cache_dir() -> Path | None:
    """The directory of compiled kernels, created; None when no place can be written to: nothing is cached."""
    home = os.environ.get("XDG_CACHE_HOME")
    if sys.platform == "win32":
        home = home or os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        home = home or os.path.expanduser("~/Library/Caches")
    named = [os.environ.get("TINYVLLM_CACHE_DIR"), os.environ.get("NUMBA_CACHE_DIR"),
             os.path.join(home or os.path.expanduser("~/.cache"), "tinyvllm")]
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    for path in [*(name for name in named if name), os.path.join(tempfile.gettempdir(), f"tinyvllm-{user}")]:
        path = Path(path) / "cpu-kernels"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
                continue  # entries are executed: only those that this user wrote
            tempfile.TemporaryFile(dir=path).close()
            return path
        except OSError:
            continue
    return None


class KernelCache(_Cache):
    """numba's cache interface over one file an entry (see the top of this file)."""

    def __init__(self, function: Callable, options: dict):
        self._function, self._options = function, options
        self._enabled = True

    @property
    def cache_path(self):
        return str(cache_dir())

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def flush(self):
        """Forget what is on disk for these sources (numba calls this on recompile)."""
        if cache_dir() is not None:
            shutil.rmtree(cache_dir() / _STAMP, ignore_errors=True)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._function)

    def _entry(self, signature, codegen) -> tuple[Path, str]:
        machine = (codegen.magic_tuple(), sys.platform, sys.version, numba.__version__, llvmlite.__version__)
        switches = [getattr(config, name, None) for name in
                    ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")]
        key = repr((_STAMP, self._function.__module__, self._function.__qualname__, str(signature), machine,
                    sorted(self._options.items()), switches, self._fingerprint))
        name = f"{self._function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
        return cache_dir() / _STAMP / name, key

    # How a compiled function becomes bytes and back (cuda_cache.py has its own three).

    def _load(self, target_context, payload: bytes):
        numba.get_num_threads()  # starts the threads: linking parallel code needs their symbols
        return compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))

    def _dump(self, result) -> bytes:
        return dumps(result._reduce())

    def _cacheable(self, result) -> bool:
        """False for machine code with addresses of this process in it."""
        return not result.library.has_dynamic_globals and all(lifted.can_cache for lifted in result.lifted)

    def load_overload(self, signature, target_context):
        """The compiled function of this signature, or None when it is not there or not readable."""
        if not self._enabled or cache_dir() is None:
            return None
        target_context.refresh()
        path, key = self._entry(signature, target_context.codegen())
        try:
            stored_key, payload = pickle.loads(path.read_bytes())
            if stored_key != key:
                return None
            return self._load(target_context, payload)
        except FileNotFoundError:
            return None
        except Exception as error:  # damaged, or of a kind that this numba cannot read: compile instead
            warnings.warn(f"compiled kernel {path.name} cannot be loaded ({error!r}); compiling it again",
                          stacklevel=2)
            return None

    def save_overload(self, signature, result):
        """Write the compiled function; a full or read-only disk costs the next start its time, no more."""
        if not self._enabled or cache_dir() is None:
            return
        if not self._cacheable(result):
            return
        path, key = self._entry(signature, result.codegen)
        try:
            if not path.parent.exists():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                _forget_old_stamps(path.parent.parent)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                file.write(pickle.dumps((key, self._dump(result))))
            os.replace(file.name, path)
        except OSError as error:
            warnings.warn(f"compiled kernels cannot be kept in {path.parent}: {error}", stacklevel=2)


def _forget_old_stamps(root: Path):
    """Drop the directories of all but the latest few versions of the sources."""
    directories = sorted((d for d in root.iterdir() if d.is_dir()), key=lambda d: d.stat().st_mtime)
    for directory in directories[:-KEPT_STAMPS]:
        shutil.rmtree(directory, ignore_errors=True)
