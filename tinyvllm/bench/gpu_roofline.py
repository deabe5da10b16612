"""What each measured kernel has to move and to compute, and what share of the GPU's roofs it reached.

    least time = max(bytes / bytes a second, flops / flops a second)          share = least time / time

Bytes are what must cross the memory bus at least once: weights, activations in and out, keys and values. The roofs are
of the same process: the rate of mere reading, and the fastest matrix product of that process, cuBLAS's where torch is
there. A small product that stays in the cache can show up above its roof.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

NUMBER = r"([\d]+)"
PRODUCT = re.compile(rf"(kernel|product|cuBLAS): (qkv|o|gate_up|down|lm_head), (?:batch )?{NUMBER}(?: rows)? \(us\)")
ARGMAX = re.compile(rf"kernel: argmax, batch {NUMBER} \(us\)")
DECODE = re.compile(rf"kernel: decode attention, {NUMBER} x {NUMBER} \(us\)")
PREFILL = re.compile(rf"(?:torch: )?prefill attention, {NUMBER} x {NUMBER} \(us\)")
READ = "ceiling: read (TB/s)"
LARGE = 2048  # rows from which on a product can show how fast the GPU multiplies


class Cost(NamedTuple):
    """Of one launch, or of the launches that belong together: bytes moved at least, floating-point operations."""

    num_bytes: float
    flops: float


class Point(NamedTuple):
    """A kernel under the roof. microseconds: median; share: of the least time that the roofs allow, or None."""

    kernel: str
    microseconds: float
    terabytes: float  # a second
    teraflops: float  # a second
    bound: str  # "reading" or "multiplying": which roof is the nearer one
    share: float | None


def product_shapes(config) -> dict[str, tuple[int, int]]:
    """name -> (outputs, inputs) of the matrix products. config: a ModelConfig."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {"qkv": ((heads + 2 * kv_heads) * head_dim, hidden), "o": (hidden, heads * head_dim),
            "gate_up": (2 * inner, hidden), "down": (hidden, inner), "lm_head": (config.vocab_size, hidden)}


def cost(label: str, config) -> Cost | None:
    """Of the kernel whose microseconds this label names; None for any other label."""
    if match := PRODUCT.fullmatch(label):
        (outputs, inputs), rows = product_shapes(config)[match[2]], int(match[3])
        written = rows * outputs
        if match[1] == "kernel":  # as a step launches it
            if match[2] in ("o", "down"):
                written *= 2  # the residual is read and written
            elif match[2] == "gate_up":
                written //= 2  # one value of a gate and its partner
        return Cost(2 * (outputs * inputs + rows * inputs + written), 2 * rows * outputs * inputs)
    if match := ARGMAX.fullmatch(label):
        return Cost(2 * int(match[1]) * config.vocab_size, 0)
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if match := DECODE.fullmatch(label):
        batch, context = int(match[1]), int(match[2])
        return Cost(4 * batch * context * kv_width + 4 * batch * width, 4 * batch * context * width)
    if match := PREFILL.fullmatch(label):
        count, length = int(match[1]), int(match[2])
        return Cost(count * length * (4 * width + 4 * kv_width), 4 * count * length * (length + 1) / 2 * width)
    return None


def multiply_ceiling(figures: Mapping[str, float], config) -> tuple[float, str] | None:
    """(TFLOP/s, label) of the fastest large product of either side. figures: label -> microseconds."""
    rates = []
    for label, value in figures.items():
        match = PRODUCT.fullmatch(label)
        if match and match[1] != "kernel" and int(match[3]) >= LARGE:
            rates.append((cost(label, config).flops / value / 1e6, label))
    return max(rates, default=None)


def roofline(figures: Mapping[str, float], config) -> list[Point]:
    """A Point for every kernel among figures (label -> median of one process, its ceilings included)."""
    read, multiply = figures.get(READ), multiply_ceiling(figures, config)
    points = []
    for label, microseconds in figures.items():
        found = cost(label, config)
        if found is None or microseconds <= 0:
            continue
        least = {}
        if read:
            least["reading"] = found.num_bytes / read / 1e6
        if multiply:
            least["multiplying"] = found.flops / multiply[0] / 1e6
        bound = max(least, key=least.get, default="")
        points.append(Point(label.removesuffix(" (us)"), microseconds, found.num_bytes / microseconds / 1e6,
                            found.flops / microseconds / 1e6, bound, least[bound] / microseconds if least else None))
    return points
