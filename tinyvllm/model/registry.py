"""The architectures that this engine runs, by the name that config.json gives them.

This is the place for the next ones. A relative of Llama needs, in this order:

  1. its checkpoint's keys and how they stack: a file beside llama_weights.py
     (Qwen2 has biases on q, k and v but not on o; Qwen3 has a norm per head; Mistral has Llama's very keys)
  2. what its config.json may say that Llama's may not: a `check`, and a field in ModelConfig
     (Mistral's sliding_window is refused in config.py until attention honours it)
  3. what its forward pass adds to llama.py
  4. an entry in ARCHITECTURES
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import ConfigError
from tinyvllm.model import llama_weights
from tinyvllm.model.llama_weights import WeightPiece

if TYPE_CHECKING:
    from tinyvllm.model.config import ModelConfig


def _nothing_more_to_check(config: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class ArchitectureSpec:
    """One architecture.

    name: as in config.json's "architectures"; model_type: as in its "model_type".
    pieces: every tensor of a checkpoint and its place in the stacked weights.
    check: raises ConfigError for fields of config.json that this architecture does not honour.
    default_rms_norm_eps: what a config without rms_norm_eps means.
    """

    name: str
    model_type: str
    pieces: "Callable[[ModelConfig], list[WeightPiece]]"
    check: Callable[[Mapping[str, Any]], None] = _nothing_more_to_check
    default_rms_norm_eps: float = 1e-6


ARCHITECTURES: dict[str, ArchitectureSpec] = {
    spec.name: spec for spec in (ArchitectureSpec("LlamaForCausalLM", "llama", pieces=llama_weights.pieces),)
}


def find_architecture(config: Mapping[str, Any]) -> ArchitectureSpec:
    """The architecture of a config.json dict: by "architectures", or by "model_type" if there are none.

    Raises ConfigError that names what was found and what is supported.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures must be a list of names, got {names!r}")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names:
        for spec in ARCHITECTURES.values():
            if spec.model_type == config.get("model_type"):
                return spec
    if names:
        found = f"architecture {', '.join(map(repr, names))} is not supported"
    elif config.get("model_type"):
        found = f"model type {config['model_type']!r} is not supported"
    else:
        found = "there is neither 'architectures' nor 'model_type'"
    raise ConfigError(f"config.json: {found} (supported: {', '.join(ARCHITECTURES)})")
