"""What a model is: config.json and generation_config.json, checked and turned into one frozen dataclass.

A field that would change what the model computes, and that this engine does not compute, is an error here and
not a silent difference in the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvllm.errors import ConfigError, ModelNotFoundError
from tinyvllm.loader.json_file import read_json_object, refuse_dangling_link
from tinyvllm.model.registry import ArchitectureSpec, find_architecture
from tinyvllm.model.rope_parameters import RopeParameters

HEAD_DIMS = (32, 64, 80, 96, 128)  # what the attention kernels are written for
DTYPES = ("bfloat16", "float16", "float32")  # of the weights in the files; computing is bfloat16
BYTES_PER_VALUE = 2  # bfloat16: weights, activations, keys and values on the device


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a Llama-family model. Field names are those of config.json.

    num_key_value_heads: groups of num_attention_heads / num_key_value_heads query heads share a key head
    (GQA). rope: the rotary embedding, from whichever spelling the file uses.
    bos_token_id: the beginning-of-sequence id, or None. eos_token_ids: every id that ends a sequence;
    generation_config.json's list wins over config.json's.
    dtype: what config.json says the weights are stored as; the tensors' own dtypes decide when loading.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeParameters
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json and, if it is there, generation_config.json of a Hugging Face folder.

        Raises ModelNotFoundError without a config.json, ModelFileError if one is not JSON, ConfigError if
        this engine cannot run what it describes.
        """
        folder = Path(folder)
        path = folder / "config.json"
        for name in (path.name, "generation_config.json"):
            refuse_dangling_link(path.parent / name)
        if not path.is_file():
            raise ModelNotFoundError(
                f"{folder} has no config.json: a model folder holds config.json, tokenizer.json and "
                "*.safetensors"
            )
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_json_object(path), read_json_object(generation) if generation.is_file() else None
        )

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Check a config.json dict (and a generation_config.json dict). Raises ConfigError."""
        spec = find_architecture(config)
        spec.check(config)
        _refuse_what_changes_the_model(config)
        vocab_size = _size(config, "vocab_size")
        hidden_size = _size(config, "hidden_size")
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{kv_heads}"
            )
        bos, eos = _special_ids(config, generation_config or {}, vocab_size)
        return cls(
            architecture=spec.name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_hidden_layers=_size(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(config, hidden_size, heads),
            rms_norm_eps=_epsilon(config, spec),
            max_position_embeddings=_size(config, "max_position_embeddings"),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            rope=RopeParameters.from_dict(config),
            bos_token_id=bos,
            eos_token_ids=eos,
            dtype=_dtype(config),
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint; a tied embedding counts once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner + 2 * hidden
        if self.attention_bias:
            layer += q + 2 * kv + hidden
        if self.mlp_bias:
            layer += 2 * inner + hidden
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + hidden + tables * self.vocab_size * hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory, as bfloat16."""
        return self.num_parameters * BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes: a key and a value per layer and key head, bfloat16."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * BYTES_PER_VALUE

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV-cache block of `block_size` tokens, over all layers."""
        return block_size * self.kv_bytes_per_token


# A key of config.json -> what it would mean here. Only "absent", null, false and empty are understood.
_UNSUPPORTED = {
    "sliding_window": "attention over a sliding window is not supported, only full causal attention",
    "quantization_config": "quantized weights are not supported, only bfloat16, float16 and float32",
    "compression_config": "compressed weights are not supported, only bfloat16, float16 and float32",
    "attn_logit_softcapping": "soft-capped attention scores are not supported",
    "final_logit_softcapping": "soft-capped logits are not supported",
    "rope_interleaved": "interleaved rotary pairs are not supported, only pairs (i, i + head_dim/2)",
    "num_local_experts": "mixtures of experts are not supported",
    "is_encoder_decoder": "encoder-decoder models are not supported",
}


def _refuse_what_changes_the_model(config: Mapping[str, Any]) -> None:
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            if key == "sliding_window" and config.get("use_sliding_window") is False:
                continue  # the window is written down but switched off
            raise ConfigError(f"config.json: {key} is {_short(config[key])}: {reason}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported (supported: 'silu')")
    rotary = config.get("partial_rotary_factor")
    if rotary not in (None, 1, 1.0):
        raise ConfigError(f"config.json: partial_rotary_factor {rotary!r} is not supported (supported: 1.0)")
    other = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if other:
        raise ConfigError(
            f"config.json: layer_types has {', '.join(map(repr, other))}, which is not supported (supported: "
            "'full_attention')"
        )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} must be a whole number of 1 or more, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _epsilon(config: Mapping[str, Any], spec: ArchitectureSpec) -> float:
    value = config.get("rms_norm_eps", spec.default_rms_norm_eps)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"config.json: rms_norm_eps must be a number between 0 and 1, got {value!r}")
    return float(value)


def _head_dim(config: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    if config.get("head_dim") is None:
        if hidden_size % heads:
            raise ConfigError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, "
                "and there is no head_dim"
            )
        head_dim, origin = hidden_size // heads, f" (hidden_size {hidden_size} / num_attention_heads {heads})"
    else:
        head_dim, origin = _size(config, "head_dim"), ""
    if head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"config.json: head_dim {head_dim}{origin} is not supported (supported: "
            f"{', '.join(map(str, HEAD_DIMS))})"
        )
    return head_dim


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype", config.get("torch_dtype"))
    name = "bfloat16" if value is None else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"config.json: dtype {value!r} is not supported (supported: {', '.join(DTYPES)})")
    return name


def _special_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """(bos id or None, eos ids), each from generation_config.json if it has them, else from config.json."""

    def ids(key: str) -> tuple[str, tuple[int, ...]]:
        for file, source in (("generation_config.json", generation), ("config.json", config)):
            value = source.get(key)
            if value is not None:
                return file, _token_ids(file, key, value, vocab_size)
        return "", ()

    file, bos = ids("bos_token_id")
    if len(bos) > 1:
        raise ConfigError(f"{file}: bos_token_id must be one id, got {list(bos)}")
    return (bos[0] if bos else None), ids("eos_token_id")[1]


def _token_ids(file: str, key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ConfigError(f"{file}: {key} must be a token id or a list of them, got {value!r}")
        if not 0 <= i < vocab_size:
            raise ConfigError(f"{file}: {key} {i} is outside the vocabulary of {vocab_size} ids")
    return tuple(dict.fromkeys(ids))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
