"""From a checkpoint to the stacked bfloat16 weights that the kernels read.

Weights are bfloat16 in memory and products accumulate in float32, whatever the files hold: bfloat16 tensors
are passed on as they lie in the memory map, float16 and float32 ones are rounded to bfloat16, to nearest
even, here and once. (A float16 value keeps 8 of its 11 significant bits, and nothing of it overflows.)

The caller owns the destination, on the host or on a device, in whatever layout its kernels like; it gets the
pieces one by one, and each piece of the file is let go once it was handed over, so that the model is never
in memory twice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.loader.checkpoint import Checkpoint
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import WeightPiece, stacked_shapes
from tinyvllm.model.registry import ARCHITECTURES

# kind, layer (None for embed, lm_head, final_norm), first row, bfloat16 bits [rows, columns] or [rows]
Sink = Callable[[str, int | None, int, np.ndarray], None]

_ROUND_ELEMENTS = 1 << 15  # at a time: the intermediates of 128 KiB of float32 stay in cache


def load_weights(
    checkpoint: Checkpoint | str | Path,
    config: ModelConfig,
    sink: Sink,
    *,
    joined: bool = False,
    progress: bool = True,
) -> None:
    """Check the checkpoint against `config` and hand every weight to `sink(kind, layer, row_offset, bits)`.

    bits is a uint16 array of bfloat16 patterns, C-contiguous, [rows, columns] or [rows]; it fills the rows
    from row_offset of that layer of `stacked_shapes(config)[kind]`. A bfloat16 tensor is a read-only view of
    the file: copy what you keep. A tied model has no "lm_head", a model without biases no "..._bias".

    joined: hand over each layer's qkv and gate_up as one array (row_offset is then always 0), at the price of
    a copy of that one array. progress: show a bar, by bytes read.

    Raises ModelFileError or ModelNotFoundError, before the first call of `sink`.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    checkpoint.check(config)
    pieces = ARCHITECTURES[config.architecture].pieces(config)
    total = sum(checkpoint.info(piece.name).nbytes for piece in pieces)
    with tqdm(
        total=total,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    ) as bar:
        for group in _groups(pieces) if joined else ([piece] for piece in pieces):
            parts = [to_bf16_bits(checkpoint.array(piece.name)) for piece in group]
            first = group[0]
            sink(
                first.kind,
                first.layer,
                first.row_offset,
                parts[0] if len(parts) == 1 else np.concatenate(parts),
            )
            for piece in group:
                checkpoint.release(piece.name)
                bar.update(checkpoint.info(piece.name).nbytes)


def numpy_weights(checkpoint: Checkpoint | str | Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The stacked weights as plain arrays, {kind: uint16 bits}, shaped as `stacked_shapes` says."""
    weights = {kind: np.empty(shape, dtype=np.uint16) for kind, shape in stacked_shapes(config).items()}

    def copy(kind: str, layer: int | None, row_offset: int, bits: np.ndarray) -> None:
        target = weights[kind] if layer is None else weights[kind][layer]
        target[row_offset : row_offset + len(bits)] = bits

    load_weights(checkpoint, config, copy, progress=False)
    return weights


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 or float16 values, to nearest even; uint16 is passed through."""
    if values.dtype == np.uint16:
        return values
    bits = np.empty(values.shape, dtype=np.uint16)
    source, target = values.reshape(-1), bits.reshape(-1)
    for start in range(0, source.size, _ROUND_ELEMENTS):
        part = slice(start, start + _ROUND_ELEMENTS)
        target[part] = float32_to_bf16(source[part].astype(np.float32))
    return bits


def _groups(pieces: list[WeightPiece]) -> Iterator[list[WeightPiece]]:
    """The pieces, those of one kind and layer together, in the order of their rows."""
    groups: dict[tuple[str, int | None], list[WeightPiece]] = {}
    for piece in pieces:
        groups.setdefault((piece.kind, piece.layer), []).append(piece)
    for group in groups.values():
        yield sorted(group, key=lambda piece: piece.row_offset)
