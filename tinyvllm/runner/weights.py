"""From a checkpoint's tensors to a backend's stacked arrays, without holding the model twice."""

import numpy as np

from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama import Weights
from tinyvllm.model.rope_table import cos_sin_table
from tinyvllm.runner.backend import Backend


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int] | tuple[int, int]]:
    """Linear kinds as (layers, rows, columns), vectors as (layers, length); the embedding tables apart."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return {"qkv": (layers, qkv, hidden), "o": (layers, hidden, heads),
            "gate_up": (layers, 2 * inner, hidden), "down": (layers, hidden, inner),
            "qkv_bias": (layers, qkv * attention_bias), "o_bias": (layers, hidden * attention_bias),
            "gate_up_bias": (layers, 2 * inner * mlp_bias), "down_bias": (layers, hidden * mlp_bias),
            "input_norm": (layers, hidden), "post_attention_norm": (layers, hidden)}


class WeightStore:
    """Allocates the stacked arrays and receives the pieces that a loader hands over.

    Call it as the loader's sink: store(kind, layer, row_offset, rows), then `finish(max_model_len)`.
    """

    def __init__(self, config: ModelConfig, backend: Backend):
        self.config, self.backend = config, backend
        self.arrays = {}
        for kind, shape in weight_shapes(config).items():
            if len(shape) == 3:
                layers, rows, columns = shape
                shape = (layers, *backend.linear_shape(rows, columns))
            self.arrays[kind] = backend.empty(shape, np.uint16)
        table = backend.linear_shape(config.vocab_size, config.hidden_size)
        self.arrays["embed"] = backend.empty(table, np.uint16)
        self.arrays["lm_head"] = (self.arrays["embed"] if config.tie_word_embeddings
                                  else backend.empty(table, np.uint16))
        self.arrays["final_norm"] = backend.empty((config.hidden_size,), np.uint16)

    def __call__(self, kind: str, layer: int | None, row_offset: int, rows: np.ndarray) -> None:
        destination = self.arrays[kind] if layer is None else self.arrays[kind][layer]
        put = self.backend.put_linear if rows.ndim == 2 else self.backend.put
        put(destination, row_offset, rows)

    def finish(self, max_model_len: int) -> Weights:
        """The complete weights, with the rotary table for positions below max_model_len."""
        table = cos_sin_table(self.config, max_model_len)
        cos_sin = self.backend.empty(table.shape, np.uint16)
        self.backend.put(cos_sin, 0, table)
        return Weights(**self.arrays, no_bias=self.backend.empty((0,), np.uint16), cos_sin=cos_sin)
