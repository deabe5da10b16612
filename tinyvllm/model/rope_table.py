"""The rotary embedding's tables: one frequency a pair of dimensions, one (cos, sin) a position and pair.

RoPE turns the pair of dimensions (i, i + D/2) of a query or key at position p by the angle p * f_i, so that a
dot product of two turned vectors depends on the distance of their positions (Su et al., "RoFormer", 2021):

    f_i = theta ** (-2 i / D),  i = 0 .. D/2 - 1          pair 0 turns one radian a token, the last one hardly

A model trained on short contexts has never seen the slow pairs turn far. Two ways to stretch its context:

    linear   every f_i divided by `factor` (Chen et al., "Extending context window ...", 2023)
    llama3   by wavelength 2 pi / f_i, in tokens of the original context C (Llama 3.1's own scheme):
                 shorter than C / high_freq_factor    f_i            turns often, keeps local order sharp
                 longer than C / low_freq_factor      f_i / factor   never came round: stretched
                 between                              a blend of both, linear in C / wavelength

Angles, cosines and sines are float32 and then rounded to bfloat16, the rounding points of the reference
implementation. Powers and cosines are taken in float64 and rounded once, which is the float32 nearest to the
true value: mathematical libraries differ in that last bit, and this choice does not depend on one.
"""

import math

import numpy as np

from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.model.config import ModelConfig

_CHUNK = 4096  # positions at a time: the float64 intermediates stay in cache


def inv_freq(config: ModelConfig) -> np.ndarray:
    """The angle per token of each pair, float32 [D/2], scaled as the config's rope type says."""
    rope, dim = config.rope, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = (np.float64(rope.theta) ** exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    if rope.rope_type == "linear":
        return frequency / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(frequency, config)
    return frequency


def _llama3(frequency: np.ndarray, config: ModelConfig) -> np.ndarray:
    rope = config.rope
    factor = np.float32(rope.factor)
    context = np.float32(rope.original_max_position_embeddings)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelength = np.float32(2 * math.pi) / frequency
    # How much of the unscaled frequency stays in the blend: 0 at the long border, 1 at the short one.
    keep = (context / wavelength - low) / (high - low)
    blend = (1 - keep) * frequency / factor + keep * frequency
    scaled = np.where(wavelength > context / low, frequency / factor, blend)
    return np.where(wavelength < context / high, frequency, scaled)


def cos_sin_table(config: ModelConfig, num_positions: int) -> np.ndarray:
    """bfloat16 bits [num_positions, D]: the cosines of all pairs in [:D/2], their sines in [D/2:]."""
    frequency = inv_freq(config)
    half = len(frequency)
    table = np.empty((num_positions, 2 * half), dtype=np.uint16)
    for start in range(0, num_positions, _CHUNK):
        rows = slice(start, min(start + _CHUNK, num_positions))
        positions = np.arange(rows.start, rows.stop, dtype=np.float32)
        angle = (positions[:, None] * frequency).astype(np.float64)  # the product itself is float32
        table[rows, :half] = float32_to_bf16(np.cos(angle).astype(np.float32))
        table[rows, half:] = float32_to_bf16(np.sin(angle).astype(np.float32))
    return table
