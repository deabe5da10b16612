"""A safetensors file, read through a memory map: nothing is copied until a tensor is touched.

    byte 0          8                       8 + n                                         end of file
         | n: u64 LE | header: n bytes JSON  | tensor data, one after the other, no holes  |
                                             ^ data_start; the header's offsets count from here

    header  {"__metadata__": {"format": "pt"},
             "model.norm.weight": {"dtype": "BF16", "shape": [2048], "data_offsets": [0, 4096]}, ...}

The format: https://huggingface.co/docs/safetensors. A file is checked completely when it is opened, so that a
damaged download is found before any memory is allocated, and every message says which numbers disagree.
"""

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.errors import ModelFileError, ModelNotFoundError

# Bits a value, for every dtype of the format.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# The dtypes that weights may have here, as NumPy sees them. NumPy has no bfloat16: its bits, as uint16.
WEIGHT_DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a larger one is an attack or garbage


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. begin and end are byte positions in the file: file[begin:end] is its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """An open safetensors file. Raises ModelNotFoundError or ModelFileError when it is opened.

    header_length: bytes of the JSON header; data_start = 8 + header_length: where the first tensor begins;
    size: bytes of the file. tensors: {name: TensorInfo}, in the order of the data; metadata: the file's own
    string pairs.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map = self._open()
        self.size = len(self._map)
        self.header_length = self._header_length()
        self.data_start = 8 + self.header_length
        header = self._read_header()
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._error(f"__metadata__ must be an object of strings, got {type(metadata).__name__}")
        self.metadata: dict[str, str] = {str(key): str(value) for key, value in metadata.items()}
        infos = sorted((self._tensor_info(name, entry) for name, entry in header.items()), key=_by_position)
        self._check_layout(infos)
        self.tensors: dict[str, TensorInfo] = {info.name: info for info in infos}

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}: {len(self.tensors)} tensors, {self.size:,} bytes)"

    def info(self, name: str) -> TensorInfo:
        """Where and what the tensor `name` is. Raises ModelFileError if it is not in the file."""
        if name not in self.tensors:
            raise self._error(f"there is no tensor {name!r}; it holds {len(self.tensors)} others")
        return self.tensors[name]

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the map, no copy: BF16 as uint16 bits, F16 and F32 as they are.

        Raises ModelFileError for every other dtype: no weight of a model may have it.
        """
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise self._error(
                f"tensor {name!r} has dtype {info.dtype}, which is not supported for weights (supported: "
                f"{', '.join(WEIGHT_DTYPES)})"
            )
        flat = np.frombuffer(self._map, WEIGHT_DTYPES[info.dtype], count=info.num_elements, offset=info.begin)
        return flat.reshape(info.shape)

    def release(self, name: str) -> None:
        """Tell the system that the tensor's pages of the map are not needed now. Views of it stay valid.

        The file stays in the page cache as far as there is room; this process no longer counts as using it.
        """
        info = self.info(name)
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            start = info.begin - info.begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def raw_header(self) -> bytes:
        """The header's bytes as they stand in the file."""
        return self._map[8 : self.data_start]

    def read(self, begin: int, end: int) -> bytes:
        """The bytes begin to end of the file, copied. Raises ValueError for a place outside of it."""
        if not 0 <= begin <= end <= self.size:
            raise ValueError(f"bytes {begin:,} to {end:,} are not in this file of {self.size:,} bytes")
        return self._map[begin:end]

    # ---- opening and checking ----

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}")

    def _open(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                start = file.read(64)
                if start.startswith(b"version https://git-lfs"):
                    raise self._error(
                        "this is a Git LFS pointer and not the weights themselves: fetch them with `git lfs "
                        "pull`"
                    )
                if len(start) < 8:
                    raise self._error(
                        f"the file has {len(start)} bytes; a safetensors file begins with an 8-byte header "
                        "length. Download it again"
                    )
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{self.path} does not exist") from None
        except OSError as problem:
            raise self._error(f"cannot be read: {problem.strerror or problem}") from problem

    def _header_length(self) -> int:
        length = int.from_bytes(self._map[:8], "little")
        if length > self.size - 8:
            raise self._error(
                f"the header says it is {length:,} bytes long, but only {self.size - 8:,} bytes follow: the "
                "file is truncated, or not a safetensors file. Download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise self._error(
                f"the header says it is {length:,} bytes long; at most {MAX_HEADER_BYTES:,} are allowed"
            )
        return length

    def _read_header(self) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = [key for key, _ in pairs]
            if len(set(keys)) < len(keys):
                twice = next(key for i, key in enumerate(keys) if key in keys[:i])
                raise self._error(f"the header has the key {twice!r} twice")
            return dict(pairs)

        try:
            header = json.loads(self.raw_header().decode("utf-8"), object_pairs_hook=unique)
        except UnicodeDecodeError as problem:
            raise self._error(
                f"the header is not UTF-8 text (at byte {8 + problem.start} of the file)"
            ) from None
        except json.JSONDecodeError as problem:
            raise self._error(
                f"the header is not valid JSON: {problem.msg} (at character {problem.pos} of the header)"
            ) from None
        except ModelFileError:
            raise
        except (ValueError, RecursionError) as problem:  # endless digits, endless nesting
            raise self._error(f"the header is not usable JSON: {problem}") from None
        if not isinstance(header, dict):
            raise self._error(f"the header must be a JSON object, got {type(header).__name__}")
        return header

    def _tensor_info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            got = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
            raise self._error(
                f"tensor {name!r} must have exactly dtype, shape and data_offsets, got {got or 'nothing'}"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise self._error(
                f"tensor {name!r} has the unknown dtype {dtype!r} (known: {', '.join(DTYPE_BITS)})"
            )
        if not _whole_numbers(shape):
            raise self._error(
                f"tensor {name!r} has the shape {shape!r}: it must be a list of whole numbers, 0 or more"
            )
        if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(
                f"tensor {name!r} has data_offsets {offsets!r}: they must be [begin, end], begin <= end"
            )
        begin, end = offsets
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * (end - begin):
            raise self._error(
                f"tensor {name!r} has {end - begin:,} bytes of data, but {dtype} of shape {shape} takes "
                f"{bits / 8:,.10g}"
            )
        return TensorInfo(name, dtype, tuple(shape), self.data_start + begin, self.data_start + end)

    def _check_layout(self, infos: list[TensorInfo]) -> None:
        """The tensors, in the order of their data, must fill the rest of the file without overlap or hole."""
        position, before = self.data_start, "the header"
        for info in infos:
            if info.begin < position:
                raise self._error(
                    f"tensor {info.name!r} (bytes {info.begin:,} to {info.end:,} of the file) overlaps "
                    f"{before}, which ends at byte {position:,}"
                )
            if info.begin > position:
                if info.end > self.size:
                    raise self._error(
                        f"tensor {info.name!r} is out of range: it says it lies at bytes {info.begin:,} to "
                        f"{info.end:,} of the file, which has {self.size:,} bytes"
                    )
                raise self._error(
                    f"{info.begin - position:,} bytes between {before} (up to byte {position:,}) and tensor "
                    f"{info.name!r} (from byte {info.begin:,}) belong to no tensor"
                )
            position, before = info.end, f"tensor {info.name!r}"
        if position > self.size:
            cut = next(info for info in infos if info.end > self.size)
            raise self._error(
                f"the file is truncated: its header describes {position:,} bytes and it has {self.size:,}, "
                f"so {position - self.size:,} bytes are missing, from tensor {cut.name!r} on. Download it "
                "again"
            )
        if position < self.size:
            raise self._error(
                f"{self.size - position:,} bytes at the end, from byte {position:,}, belong to no tensor"
            )


def _by_position(info: TensorInfo) -> tuple[int, int]:
    return info.begin, info.end


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
