"""The tensors of a Llama checkpoint, and where each goes in the stacked weights that the kernels read.

A checkpoint has a tensor per projection and layer. The engine keeps one array per kind, stacked over layers,
and joins what is multiplied by the same input, so that a layer needs four matrix products instead of seven:

    qkv [L, (Hq + 2 Hkv) D, H]     rows   0 ........ Hq D ....... (Hq + Hkv) D ....... (Hq + 2 Hkv) D
                                          | q_proj   | k_proj     | v_proj             |
    gate_up [L, 2 I, H]            rows   0 ........ I .......... 2 I
                                          | gate_proj| up_proj    |

This file is the one table of those facts: what must be in a checkpoint follows from it (`expected_tensors`),
and so does how much to allocate (`stacked_shapes`).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvllm.model.config import ModelConfig

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

# Buffers that old exports wrote into the checkpoint: they follow from config.json, and are not read.
IGNORED_TENSORS = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class WeightPiece:
    """One tensor of a checkpoint: `name` with `shape` fills rows row_offset.. of layer `layer` of `kind`.

    layer is None for the kinds that exist once: embed, lm_head and final_norm.
    """

    name: str
    kind: str
    layer: int | None
    row_offset: int
    shape: tuple[int, ...]


def pieces(config: "ModelConfig") -> list[WeightPiece]:
    """Every tensor that a checkpoint of this config must have, in the order of the forward pass."""
    hidden = config.hidden_size
    found = [WeightPiece(EMBED, "embed", None, 0, (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        found += _layer_pieces(config, layer)
    found.append(WeightPiece("model.norm.weight", "final_norm", None, 0, (hidden,)))
    if not config.tie_word_embeddings:
        found.append(WeightPiece(LM_HEAD, "lm_head", None, 0, (config.vocab_size, hidden)))
    return found


def _layer_pieces(config: "ModelConfig", layer: int) -> list[WeightPiece]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    prefix = f"model.layers.{layer}"

    def norm(name: str, kind: str) -> WeightPiece:
        return WeightPiece(f"{prefix}.{name}.weight", kind, layer, 0, (hidden,))

    def linear(
        name: str, kind: str, row_offset: int, rows: int, columns: int, bias: bool
    ) -> list[WeightPiece]:
        weight = WeightPiece(f"{prefix}.{name}.weight", kind, layer, row_offset, (rows, columns))
        if not bias:
            return [weight]
        return [weight, WeightPiece(f"{prefix}.{name}.bias", f"{kind}_bias", layer, row_offset, (rows,))]

    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return [
        norm("input_layernorm", "input_norm"),
        *linear("self_attn.q_proj", "qkv", 0, q, hidden, attention_bias),
        *linear("self_attn.k_proj", "qkv", q, kv, hidden, attention_bias),
        *linear("self_attn.v_proj", "qkv", q + kv, kv, hidden, attention_bias),
        *linear("self_attn.o_proj", "o", 0, hidden, q, attention_bias),
        norm("post_attention_layernorm", "post_attention_norm"),
        *linear("mlp.gate_proj", "gate_up", 0, inner, hidden, mlp_bias),
        *linear("mlp.up_proj", "gate_up", inner, inner, hidden, mlp_bias),
        *linear("mlp.down_proj", "down", 0, hidden, inner, mlp_bias),
    ]


def expected_tensors(config: "ModelConfig") -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of a complete checkpoint."""
    return {piece.name: piece.shape for piece in pieces(config)}


def stacked_shapes(config: "ModelConfig") -> dict[str, tuple[int, ...]]:
    """{kind: shape} of the stacked arrays. A bias that the model does not have is [L, 0].

    A tied model has no "lm_head": the forward pass uses the embedding itself.
    """
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = int(config.attention_bias), int(config.mlp_bias)
    shapes = {
        "embed": (config.vocab_size, hidden),
        "input_norm": (layers, hidden),
        "qkv": (layers, q + 2 * kv, hidden),
        "qkv_bias": (layers, attention * (q + 2 * kv)),
        "o": (layers, hidden, q),
        "o_bias": (layers, attention * hidden),
        "post_attention_norm": (layers, hidden),
        "gate_up": (layers, 2 * inner, hidden),
        "gate_up_bias": (layers, mlp * 2 * inner),
        "down": (layers, hidden, inner),
        "down_bias": (layers, mlp * hidden),
        "final_norm": (hidden,),
        "lm_head": (config.vocab_size, hidden),
    }
    if config.tie_word_embeddings:
        del shapes["lm_head"]
    return shapes
