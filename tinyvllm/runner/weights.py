"""From a checkpoint's tensors to a backend's stacked arrays, without holding the model twice."""

import math

import numpy as np

from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama import Weights
from tinyvllm.model.llama_weights import stacked_shapes
from tinyvllm.model.rope_table import cos_sin_table
from tinyvllm.runner.backend import Backend

LINEAR_KINDS = ("embed", "qkv", "o", "gate_up", "down", "lm_head")  # these the backend may lay out in its own way


def device_shapes(config: ModelConfig, backend: Backend) -> dict[str, tuple[int, ...]]:
    """{kind: shape} of the stacked arrays as this backend keeps them (a tied model has no "lm_head")."""
    return {kind: (*shape[:-2], *backend.linear_shape(*shape[-2:])) if kind in LINEAR_KINDS else shape
            for kind, shape in stacked_shapes(config).items()}


def weight_bytes(config: ModelConfig, backend: Backend) -> int:
    """Bytes of all weights in this backend's layout."""
    return 2 * sum(math.prod(shape) for shape in device_shapes(config, backend).values())


class WeightStore:
    """Allocates the stacked arrays and receives the pieces that a loader hands over.

    Call it as the loader's sink: store(kind, layer, row_offset, rows), then `finish(max_model_len)`.
    """

    def __init__(self, config: ModelConfig, backend: Backend):
        self.config, self.backend = config, backend
        self.arrays = {kind: backend.empty(shape, np.uint16) for kind, shape in device_shapes(config, backend).items()}

    def __call__(self, kind: str, layer: int | None, row_offset: int, rows: np.ndarray) -> None:
        destination = self.arrays[kind] if layer is None else self.arrays[kind][layer]
        put = self.backend.put_linear if kind in LINEAR_KINDS else self.backend.put
        put(destination, row_offset, rows)

    def finish(self, max_model_len: int) -> Weights:
        """The complete weights, with the rotary table for positions below max_model_len."""
        table = cos_sin_table(self.config, max_model_len)
        cos_sin = self.backend.empty(table.shape, np.uint16)
        self.backend.put(cos_sin, 0, table)
        arrays = {"lm_head": self.arrays["embed"], **self.arrays}  # tied: the very same array
        return Weights(**arrays, no_bias=self.backend.empty((0,), np.uint16), cos_sin=cos_sin)
