"""What a step must move and compute, operation by operation: the cost model behind a roofline.

Bytes are the least an operation can move: each array that it reads once, each that it writes once, two bytes an
element. What stays in a cache on the way is counted all the same, and so is what a kernel reads twice only once. Small
integer arrays (token ids, positions, block tables) are left out.

Flops count a multiplication and an addition each, and every other arithmetic operation of the formula (a square root,
a division, an exp) as one:

    linear        2 N K a row, and N more with a bias
    attention     4 D for each pair of a query and a key it sees, each query head (q k, and weight times v); its softmax
                  is left out, as the field does
    rope          6 a pair of features: four multiplications, two additions
    rms_norm      4 a feature (square and add, scale, weight); 5 with the residual addition before it
    silu_mul      5 a feature (negate, exp, add 1, divide, multiply)

Written from the formulas and not from the kernels: a kernel can reach its roof, and cannot get above it.
"""

from typing import NamedTuple

from tinyvllm.model.config import ModelConfig

BYTES = 2  # an element, bfloat16
NO_LAYER = -1


class StepShape(NamedTuple):
    """The batch of a step, as far as its costs depend on it."""

    rows: tuple[tuple[int, int], ...]  # (rows in this step, tokens in context after it) of each request
    num_logits: int
    greedy: bool = True  # every token the likeliest, or some drawn
    num_kept: int | None = None  # rows of a watched request that are kept; None: there is none in this step

    @property
    def num_tokens(self) -> int:
        return sum(rows for rows, _ in self.rows)


class OperationCost(NamedTuple):
    """One operation of a step."""

    name: str  # what it is in the model: "qkv_proj", "attention", ...
    operation: str  # which of the backend's operations does it: "linear", "attention", ...
    layer: int  # NO_LAYER outside the layers
    bytes: int
    flops: int


def step_costs(config: ModelConfig, shape: StepShape) -> list[OperationCost]:
    """Every operation of a step, in the order of model.llama.forward, with the choice of tokens at the end."""
    tokens, hidden, inner = shape.num_tokens, config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    costs: list[OperationCost] = []

    def add(name: str, operation: str, layer: int, elements: int, flops: int) -> None:
        costs.append(OperationCost(name, operation, layer, BYTES * elements, flops))

    def linear(name: str, layer: int, rows: int, outputs: int, inputs: int, bias: bool = False) -> None:
        weights = outputs * (inputs + bias) if rows else 0
        add(name, "linear", layer, weights + rows * (inputs + outputs), rows * outputs * (2 * inputs + bias))

    def keep(name: str, layer: int, width: int) -> None:
        if shape.num_kept is not None:
            add(name, "keep_rows", layer, 2 * shape.num_kept * width, 0)

    # A request's last row sees its whole context, the row before it one token less, ...
    pairs = sum(rows * context - rows * (rows - 1) // 2 for rows, context in shape.rows)
    cached = sum(context for _, context in shape.rows)

    add("embedding", "embedding", NO_LAYER, 2 * tokens * hidden, 0)
    add("input_norm", "rms_norm", 0, 2 * tokens * hidden + hidden, 4 * tokens * hidden)
    for layer in range(config.num_hidden_layers):
        keep("keep_residual", layer, hidden)
        linear("qkv_proj", layer, tokens, q + 2 * kv, hidden, attention_bias)
        add("rope", "rope", layer, 2 * tokens * (q + kv) + tokens * config.head_dim, 3 * tokens * (q + kv))
        keep("keep_queries", layer, q)
        add("write_kv", "write_kv", layer, 2 * 2 * tokens * kv, 0)
        add("attention", "attention", layer, 2 * tokens * q + 2 * cached * kv, 4 * pairs * q)
        linear("o_proj", layer, tokens, hidden, q, attention_bias)
        add("post_attention_norm", "add_rms_norm", layer, 4 * tokens * hidden + hidden, 5 * tokens * hidden)
        linear("gate_up_proj", layer, tokens, 2 * inner, hidden, mlp_bias)
        add("silu_mul", "silu_mul", layer, 3 * tokens * inner, 5 * tokens * inner)
        linear("down_proj", layer, tokens, hidden, inner, mlp_bias)
        last = layer + 1 == config.num_hidden_layers
        add("final_norm" if last else "input_norm", "add_rms_norm", NO_LAYER if last else layer + 1,
            4 * tokens * hidden + hidden, 5 * tokens * hidden)
    keep("keep_residual", NO_LAYER, hidden)
    add("gather_rows", "gather_rows", NO_LAYER, 2 * shape.num_logits * hidden, 0)
    linear("lm_head", NO_LAYER, shape.num_logits, config.vocab_size, hidden)
    if shape.num_logits:
        operation = "argmax" if shape.greedy else "sample"
        add(operation, operation, NO_LAYER, shape.num_logits * config.vocab_size, 0)
    return costs
