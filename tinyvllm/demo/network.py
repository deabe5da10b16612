"""The demo model as a torch module for training: a Llama (Touvron et al. 2023; Llama 3.2's rope scaling),
written for whole batches without a cache. `hf_config` and `hf_tensors` give it Hugging Face's names, and
transformers runs it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinyvllm.demo.tokenizer_recipe import CONTEXT, SPECIAL_TOKENS, VOCAB_SIZE


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the defaults are the shipped model's."""

    hidden: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 896
    vocab: int = VOCAB_SIZE
    context: int = CONTEXT
    rope_theta: float = 500000.0
    eps: float = 1e-5


TOY = Shape(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128)
ROPE_SCALING = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip


def rope_tables(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [context, head_dim], with the llama3 scaling of the frequencies.

    Wavelengths longer than original/low are stretched by `factor`, those shorter than original/high are left
    alone, and the ones between are blended.
    """
    frequency = shape.rope_theta ** -(
        torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    )
    old, factor = ROPE_SCALING["original_max_position_embeddings"], ROPE_SCALING["factor"]
    low, high = ROPE_SCALING["low_freq_factor"], ROPE_SCALING["high_freq_factor"]
    turns = old * frequency / (2 * math.pi)  # full turns within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    frequency = (1 - blend) * frequency / factor + blend * frequency
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float64), frequency).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of x [B, heads, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        hidden, dim = shape.hidden, shape.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(hidden))
        self.q_proj = nn.Linear(hidden, shape.heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * dim, hidden, bias=False)
        self.post_attention_layernorm = nn.Parameter(torch.ones(hidden))
        self.gate_proj = nn.Linear(hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        s = self.shape
        batch, length, _ = x.shape
        y = F.rms_norm(x, (s.hidden,), self.input_layernorm, s.eps)
        q, k, v = (
            project(y).view(batch, length, -1, s.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        y = F.rms_norm(x, (s.hidden,), self.post_attention_layernorm, s.eps)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Network(nn.Module):
    """Token ids [B, T] and targets [B, T] (-100: not counted) to the mean cross-entropy, a scalar."""

    def __init__(self, shape: Shape = Shape()):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        deep = 1 / math.sqrt(2 * shape.layers)  # what adds to the residual stream starts smaller
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(
                    weight, std=0.02 * (deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                )

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        length = ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        x = F.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.eps)
        logits = F.linear(x, self.embed_tokens.weight)  # tied embeddings
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def hf_config(shape: Shape) -> dict:
    """config.json of transformers' LlamaForCausalLM."""
    first_special = shape.vocab - len(SPECIAL_TOKENS)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta, "rope_scaling": ROPE_SCALING, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "bos_token_id": first_special,
        "eos_token_id": [first_special + 1, first_special + 4], "pad_token_id": first_special + 5,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def hf_names(network: Network) -> dict[str, nn.Parameter]:
    """The parameters under Hugging Face's names."""
    named = {}
    for name, weight in network.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        if parts[-1].endswith("_proj"):
            parts.insert(-1, "self_attn" if parts[-1][0] in "qkvo" else "mlp")
        named[".".join(["model", *parts, "weight"])] = weight
    return named


def hf_tensors(network: Network) -> dict[str, torch.Tensor]:
    """The weights in bfloat16 on the CPU, under Hugging Face's names."""
    return {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in hf_names(network).items()
    }
