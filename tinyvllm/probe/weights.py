"""Weights of a running engine by their checkpoint names: read, change one by one, put back.

The engine has its weights in arrays of its own: stacked over layers, q, k and v in one, and on the CPU packed for its
matrix kernel. model/llama_weights.py says which tensor of the checkpoint is which rows of what; here that table is
walked the other way.
"""

from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyvllm.model.llama_weights import EMBED, LM_HEAD, WeightPiece
from tinyvllm.model.registry import ARCHITECTURES
from tinyvllm.probe.errors import ProbeError
from tinyvllm.runner.weights import LINEAR_KINDS

if TYPE_CHECKING:
    from tinyvllm.llm import LLM


class Patch(NamedTuple):
    """One element that is not what the checkpoint says. old, new: bfloat16 bits. column: None in a vector."""

    name: str
    row: int
    column: int | None
    old: int
    new: int


class WeightEditor:
    """The weights of an LLM by name. Patches are remembered, so that they can be taken back."""

    def __init__(self, llm: "LLM"):
        self._llm = llm
        config = llm.model_config
        self._pieces = {piece.name: piece for piece in ARCHITECTURES[config.architecture].pieces(config)}
        self._tied = config.tie_word_embeddings
        self._patches: dict[tuple[str, int, int | None], Patch] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor that the checkpoint has."""
        return {name: piece.shape for name, piece in self._pieces.items()}

    @property
    def patches(self) -> list[Patch]:
        return list(self._patches.values())

    def read(self, name: str, rows: Any, columns: Any) -> np.ndarray:
        """uint16 [rows, columns], or [rows] of a vector: a copy."""
        piece = self._piece(name)
        backend, array = self._llm.runner.backend, self._array(piece)
        picked_rows = piece.row_offset + self._indices(piece, "rows", 0, rows)
        if len(piece.shape) == 1:
            if columns is not None and columns != slice(None):
                raise ProbeError(f"{name} is a vector of shape {piece.shape}: give rows only")
            return np.array(backend.download(array))[picked_rows]
        picked_columns = self._indices(piece, "columns", 1, slice(None) if columns is None else columns)
        return backend.read_linear(array, picked_rows, picked_columns)

    def write(self, name: str, row: int, column: int | None, bits: int) -> int:
        """Replace one element; returns the bits that were there."""
        piece = self._piece(name)
        row = self._index(piece, "row", 0, row)
        if len(piece.shape) > 1:
            column = self._index(piece, "column", 1, column)
        elif column is not None:
            raise ProbeError(f"{name} is a vector of shape {piece.shape}: its elements have a row and no column "
                             f"(None), got column {column!r}")
        if isinstance(bits, bool) or not isinstance(bits, Integral) or not 0 <= bits <= 0xFFFF:
            raise ProbeError(f"bits of {name} are a bfloat16 as a whole number from 0 to 65535, got {bits!r}")
        self._llm._settle()  # what is under way is computed with the old one
        old = self._put(piece, row, column, int(bits))
        key = name, row, column
        original = self._patches[key].old if key in self._patches else old
        if int(bits) == original:
            self._patches.pop(key, None)
        else:
            self._patches[key] = Patch(name, row, column, original, int(bits))
        self._llm.engine.kv_cache_manager.forget_cached()
        return old

    def restore(self) -> None:
        """Put back what every patch replaced."""
        if self._patches:
            self._llm._settle()
            for patch in self._patches.values():
                self._put(self._pieces[patch.name], patch.row, patch.column, patch.old)
            self._patches.clear()
            self._llm.engine.kv_cache_manager.forget_cached()

    def _put(self, piece: WeightPiece, row: int, column: int | None, bits: int) -> int:
        backend, array, row = self._llm.runner.backend, self._array(piece), piece.row_offset + row
        if column is None:
            old = int(backend.download(array)[row])
            backend.put(array, row, np.array([bits], np.uint16))
        else:
            old = int(backend.read_linear(array, np.array([row]), np.array([column]))[0, 0])
            backend.write_linear(array, row, column, bits)
        return old

    def _array(self, piece: WeightPiece) -> Any:
        array = getattr(self._llm.runner.weights, piece.kind)
        assert (len(piece.shape) > 1) == (piece.kind in LINEAR_KINDS)
        return array if piece.layer is None else array[piece.layer]

    def _piece(self, name: str) -> WeightPiece:
        piece = self._pieces.get(name) if isinstance(name, str) else None
        if piece is not None:
            return piece
        if name == LM_HEAD and self._tied:
            raise ProbeError(f"this model has no {LM_HEAD} of its own: the embedding is the output projection too "
                             f"(tied). Use {EMBED}; a change of it changes both")
        raise ProbeError(f"there is no weight {name!r}: weight_names() has all {len(self._pieces)}, such as "
                         f"{', '.join(list(self._pieces)[:2])}")

    def _index(self, piece: WeightPiece, what: str, axis: int, value: Any) -> int:
        count = piece.shape[axis]
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < count:
            raise ProbeError(f"{piece.name} has shape {piece.shape}: a {what} is a whole number from 0 to {count - 1}, "
                             f"got {value!r}")
        return int(value)

    def _indices(self, piece: WeightPiece, what: str, axis: int, value: Any) -> np.ndarray:
        try:
            return np.atleast_1d(np.arange(piece.shape[axis])[value])
        except (IndexError, TypeError, ValueError):
            raise ProbeError(f"{piece.name} has shape {piece.shape}: {what} are a slice, a number or numbers below "
                             f"{piece.shape[axis]}, got {value!r}") from None
