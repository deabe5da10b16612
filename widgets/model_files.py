"""The safetensors files of a model, opened one at a time, and pieces of their tensors: small enough for a page.

Everything is read through the memory map, in bands of rows: a matrix of any size never is in memory as a whole.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.errors import ModelFileError, ModelNotFoundError, TinyVLLMError
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.loader.checkpoint import INDEX_FILE, SINGLE_FILE
from tinyvllm.loader.json_file import read_json_object
from tinyvllm.loader.resolve import resolve_model
from tinyvllm.loader.safetensors_file import SafetensorsFile, TensorInfo
from widgets.number_formats import FORMATS

# dtype in the file -> the format that BitLens shows it in.
LENS_FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_PLAIN = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "|u1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2",
          "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"}
ITEM_SIZES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, **{name: np.dtype(code).itemsize for name, code in _PLAIN.items()}}

MOST_ELEMENTS = 1 << 23  # that one heat map reads; of a larger matrix it takes every n-th row
_KINDS = (("norm", r"norm"), ("embedding", r"embed|wte|wpe"), ("output", r"lm_head|^output\."),
          ("attention", r"attn|attention|[qkvo]_proj"), ("mlp", r"mlp|feed_forward|gate|up_proj|down_proj|ffn"))


def kind_of(name: str) -> str:
    """What a tensor is for, by its name: norm, embedding, output, attention, mlp or other."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


class ModelFiles:
    """The safetensors files of a model.

    path: one file, a folder in Hugging Face layout, a hub id in the local cache, or "demo". Nothing is opened yet, so
    that a panel can show what is wrong with a file.
    """

    def __init__(self, path: str | Path):
        if not isinstance(path, (str, Path)):
            raise TinyVLLMError(f"a model is a file, a folder, a hub id, or 'demo', got {type(path).__name__}")
        self.path = path
        self._open: dict[str, SafetensorsFile] = {}

    def folder_and_names(self) -> tuple[Path, list[str]]:
        """The folder and the names of its files. Raises ModelNotFoundError or ModelFileError."""
        path = Path(self.path).expanduser()
        if str(self.path) != "demo" and (path.is_file() or path.suffix == ".safetensors"):
            return path.parent, [path.name]
        folder = resolve_model(self.path)
        if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
            weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFileError(f"{folder / INDEX_FILE} must have a 'weight_map' object: tensor name, file name")
            names = {Path(str(name)).name for name in weight_map.values()}
        else:
            names = {found.name for found in folder.glob("*.safetensors")}
        if not names:
            raise ModelNotFoundError(f"{folder} has no safetensors file")
        return folder, sorted(names, key=lambda name: (name != SINGLE_FILE, name))

    def open(self, name: str | None = None) -> SafetensorsFile:
        """One of the files, the first by default. Raises ModelFileError if it is damaged, and says where."""
        folder, names = self.folder_and_names()
        name = name or names[0]
        if name not in names:
            raise ModelNotFoundError(f"{folder} has no file {name!r}: it has {', '.join(names[:5])}")
        if name not in self._open:
            self._open[name] = SafetensorsFile(folder / name)
        return self._open[name]


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """(rows, columns) of a tensor as it is drawn: a vector is one row; of more axes, all but the last are rows."""
    columns = info.shape[-1] if info.shape else 1
    return (info.num_elements // columns if columns else 0), columns


def heat_map(file: SafetensorsFile, name: str, most_rows: int, most_columns: int,
             rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> dict[str, Any]:
    """A tensor, or a window of it, in at most most_rows * most_columns cells.

    A cell shows the element of largest magnitude of a small rectangle of elements, and says which one that is.
    rows, columns: the window, [begin, end). Returns values float32 [h, w], row and column int32 [h, w] of the element
    shown, cell [rows, columns] of a cell, window, and stride: only every n-th row of a cell was read (1: all).
    Raises TinyVLLMError for a dtype whose values are not known here.
    """
    info = file.info(name)
    num_rows, num_columns = matrix_shape(info)
    (r0, r1), (c0, c1) = _window(rows, num_rows, "rows"), _window(columns, num_columns, "columns")
    if info.dtype not in ITEM_SIZES:
        raise TinyVLLMError(f"the values of dtype {info.dtype} are not drawn here; its bytes are shown")
    tall, wide = -(-(r1 - r0) // most_rows) or 1, -(-(c1 - c0) // most_columns) or 1
    height, width = -(-(r1 - r0) // tall), -(-(c1 - c0) // wide)
    values = np.zeros((height, width), np.float32)
    row = np.zeros((height, width), np.int32)
    column = np.zeros((height, width), np.int32)
    stride = min(tall, max(1, -(-(r1 - r0) * num_columns // MOST_ELEMENTS)))
    for i in range(height if width else 0):
        top, bottom = r0 + i * tall, min(r0 + (i + 1) * tall, r1)
        band = _rows(file, info, num_columns, top, bottom, stride)[:, c0:c1]
        padded = np.zeros((len(band), width * wide), np.float32)
        padded[:, :c1 - c0] = band
        cells = padded.reshape(len(band), width, wide).transpose(1, 0, 2).reshape(width, -1)
        best = np.abs(cells).argmax(axis=1)
        values[i] = cells[np.arange(width), best]
        row[i] = top + best // wide * stride
        column[i] = c0 + np.arange(width) * wide + best % wide
    file.release(name)
    return {"values": values, "row": row, "column": column, "cell": [tall, wide], "stride": stride,
            "window": [r0, r1, c0, c1]}


def _window(wanted: tuple[int, int] | None, size: int, what: str) -> tuple[int, int]:
    begin, end = (0, size) if wanted is None else wanted
    if not 0 <= begin <= end <= size:
        raise TinyVLLMError(f"{what} {begin} to {end} are not in this tensor, which has {size}")
    return begin, end


def _rows(file: SafetensorsFile, info: TensorInfo, num_columns: int, top: int, bottom: int, stride: int) -> np.ndarray:
    """float32 [rows, columns]: rows top, top + stride, ... below bottom, copied out of the map."""
    length = num_columns * ITEM_SIZES[info.dtype]
    if stride == 1:
        data = file.read(info.begin + top * length, info.begin + bottom * length)
    else:
        data = b"".join(file.read(info.begin + r * length, info.begin + (r + 1) * length)
                        for r in range(top, bottom, stride))
    return to_float32(data, info.dtype).reshape(-1, num_columns)


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    """The values of raw little-endian bytes; what float32 cannot hold exactly is rounded."""
    if dtype == "BF16":
        return bf16_to_float32(np.frombuffer(data, "<u2"))
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _table(LENS_FORMATS[dtype])[np.frombuffer(data, np.uint8)]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.frombuffer(data, _PLAIN[dtype]).astype(np.float32)


def _table(name: str) -> np.ndarray:
    reals = [FORMATS[name].decode(bits) for bits in range(256)]
    return np.array([float(r.fraction) if r.kind == "finite" else {"nan": np.nan, "infinity": np.inf}[r.kind]
                     * (-1 if r.negative else 1) for r in reals], np.float32)
