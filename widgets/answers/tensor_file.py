"""What TensorFile asks: the parts of a file, heat maps of its tensors, and its bytes as they are."""

from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import answers
from widgets.frames import Payload
from widgets.model_files import ITEM_SIZES, LENS_FORMATS, ModelFiles, heat_map, kind_of, matrix_shape

MOST_BYTES = 1 << 16  # in one answer
MOST_CELLS = 1024  # of a heat map, in each direction
MOST_HEADER = 4 << 20  # characters of a header that are sent as text

# key -> what a panel opened. A page can ask only for files that a panel of this notebook was made for.
OPENED: WeakValueDictionary[str, ModelFiles] = WeakValueDictionary()


def _files(key: str) -> ModelFiles:
    if key not in OPENED:
        raise TinyVLLMError("this panel's model is no longer open: run its cell again")
    return OPENED[key]


@answers("tensor_file")
def tensor_file(feed: Any, key: str, file: str = "") -> dict[str, Any]:
    """The parts of one file: {folder, files, file, size, header_length, data_start, header, tensors}.

    tensors: in the order of their data, each {name, dtype, shape, begin, end, kind, rows, columns, item_size, format}.
    header: the JSON text of the file, None if it is very long.
    """
    files = _files(key)
    folder, names = files.folder_and_names()
    opened = files.open(file or None)
    raw = opened.raw_header()
    tensors = []
    for info in opened:
        rows, columns = matrix_shape(info)
        tensors.append({
            "name": info.name, "dtype": info.dtype, "shape": list(info.shape), "begin": info.begin, "end": info.end,
            "kind": kind_of(info.name), "rows": rows, "columns": columns, "item_size": ITEM_SIZES.get(info.dtype),
            "format": LENS_FORMATS.get(info.dtype)})
    return {"folder": str(folder), "files": names, "file": opened.path.name, "size": opened.size,
            "header_length": opened.header_length, "data_start": opened.data_start, "tensors": tensors,
            "header": raw.decode("utf-8") if len(raw) <= MOST_HEADER else None}


@answers("tensor_heat")
def tensor_heat(feed: Any, key: str, file: str, name: str, most_rows: int, most_columns: int,
                rows: list[int] | None = None, columns: list[int] | None = None) -> Payload:
    """A tensor or a window of it as cells; see model_files.heat_map."""
    most_rows, most_columns = (min(max(int(n), 1), MOST_CELLS) for n in (most_rows, most_columns))
    heat = heat_map(_files(key).open(file), name, most_rows, most_columns, rows, columns)
    arrays = {part: heat.pop(part) for part in ("values", "row", "column")}
    return Payload({"name": name, **heat}, arrays)


@answers("tensor_bytes")
def tensor_bytes(feed: Any, key: str, file: str, begin: int, count: int) -> Payload:
    """Bytes of the file from `begin` on, fewer where it ends: {begin} and bytes uint8 [count]."""
    opened = _files(key).open(file)
    begin = min(max(int(begin), 0), opened.size)
    data = opened.read(begin, min(begin + min(max(int(count), 0), MOST_BYTES), opened.size))
    return Payload({"begin": begin}, {"bytes": np.frombuffer(data, np.uint8)})
