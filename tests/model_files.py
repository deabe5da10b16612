"""Small random-weight Hugging Face folders for tests, written without torch or transformers.

    folder = write_tiny_model(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=False)

writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the safetensors
file(s), in a few milliseconds once the tokenizer of the process is trained. Everything depends on `seed` and
the options alone.

The safetensors writer and the float32 -> bf16 rounding here are written apart from the package's own, so
that a test that reads these files does not check code against itself.
"""

import functools
import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 384,
}

LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

OMIT = object()  # `write_tiny_model(folder, head_dim=OMIT)` leaves the key out of config.json

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    "<|python_tag|>",
)

# The same shape of conversation as Llama 3.2's template: a system turn that is always there and carries the
# date, the header tokens around each role, <|eot_id|> after each turn.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages and messages[0]["role"] == "system" %}
    {%- set system_text = messages[0]["content"] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system_text = "" %}
    {%- set turns = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_text + "<|eot_id|>" }}
{%- for turn in turns %}
    {%- if turn["role"] not in ["user", "assistant"] %}
        {{- raise_exception("Only user and assistant turns may follow the system turn.") }}
    {%- endif %}
    {{- "<|start_header_id|>" + turn["role"] + "<|end_header_id|>\\n\\n" + turn["content"] | trim +
    "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

# Llama 3's cut of text into words, in our own words: contractions, words with one leading sign, up to three
# digits, runs of signs with the line ends after them, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = [
    "A small fox found a lantern under the old bridge and carried it home through the rain.",
    "The river was high, the road was long, and nobody in the village had seen the key since spring.",
    "What did the fox find? The fox found a lantern. Who helped the fox? An owl helped the fox.",
    "Once there was an owl who kept every letter that the wind had ever brought to the window.",
    "Please tell me a story about a heron and a silver bell. Here is a story about a heron.",
    "Count with me: 1, 2, 3, 10, 20, 300. Repeat after me: the quick otter, the quiet otter.",
    "Users, system, assistant: say hello! 'I'll be there,' she said; it's only the weather.",
]


# ---------------------------------------------------------------------------------------- safetensors


def float32_to_bf16_bits(values):
    """float32 -> bf16 bits by plain integer rounding to nearest even (finite values only)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode_array(values, dtype):
    """float32 values -> (safetensors dtype, array whose bytes are the payload) for a config.json dtype "
    "name."""
    if dtype == "bfloat16":
        return "BF16", float32_to_bf16_bits(values)
    if dtype == "float16":
        return "F16", np.asarray(values, dtype=np.float16)
    if dtype == "float32":
        return "F32", np.asarray(values, dtype=np.float32)
    raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, float32")


def safetensors_bytes(header, data=b"", header_length=None):
    """The bytes of a safetensors file from its header (a dict, or raw bytes) and data, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw) if header_length is None else header_length) + raw + data


def write_safetensors(path, tensors, metadata=None):
    """Write `{name: (safetensors dtype, array)}` one after the other; the header is padded to 8 bytes."""
    header, position = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return Path(path)


# ------------------------------------------------------------------------------------------ tokenizer


@functools.cache
def _tiny_tokenizer_json(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # after the text tokens, as in Llama 3
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size=384):
    """A byte-level BPE tokenizer in Llama 3's style; its special tokens are the last ids."""
    return Tokenizer.from_str(_tiny_tokenizer_json(min(vocab_size, 512)))


def special_token_ids(vocab_size=384):
    """`{special token: id}` of `tiny_tokenizer(vocab_size)`."""
    tokenizer = tiny_tokenizer(vocab_size)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_tiny_tokenizer(folder, vocab_size=384, chat_template=CHAT_TEMPLATE):
    """Write tokenizer.json and tokenizer_config.json (with the chat template inside, unless None)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer(vocab_size).to_str(), encoding="utf-8")
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", settings)
    return folder


# ---------------------------------------------------------------------------------------------- model


def tiny_config(*, dtype="bfloat16", **overrides):
    """The config.json of a tiny Llama as a dict: `TINY_CONFIG` with overrides and matching token ids."""
    config = {**TINY_CONFIG, "torch_dtype": dtype, **overrides}
    config = {key: value for key, value in config.items() if value is not OMIT}
    ids = special_token_ids(config["vocab_size"])
    config.setdefault("bos_token_id", ids["<|begin_of_text|>"])
    config.setdefault("eos_token_id", ids["<|end_of_text|>"])
    return config


def tiny_weights(config, seed=0):
    """Random float32 weights by Hugging Face name for a Llama config dict.

    Scaled by fan-in so that greedy decoding wanders (some 45 distinct tokens in 64) and logits reach about 7:
    much smaller weights copy the last token for ever, and a test of equal outputs would then show little.
    Norm weights lie near 1.
    """
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(1.6 / hidden**0.5)

    def norm():
        return 1 + rng.standard_normal(hidden, dtype=np.float32) * np.float32(0.1)

    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden)}
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.o_proj": (hidden, heads * head_dim, config.get("attention_bias")),
        "mlp.gate_proj": (inner, hidden, config.get("mlp_bias")),
        "mlp.up_proj": (inner, hidden, config.get("mlp_bias")),
        "mlp.down_proj": (hidden, inner, config.get("mlp_bias")),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
        for name, (rows, columns, bias) in linears.items():
            weights[f"{prefix}.{name}.weight"] = normal(rows, columns)
            if bias:
                weights[f"{prefix}.{name}.bias"] = normal(rows)
    weights["model.norm.weight"] = norm()
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return weights


def write_weights(folder, weights, dtype="bfloat16", shards=1):
    """Write `{name: float32 array}` as model.safetensors, or as `shards` files with an index."""
    folder = Path(folder)
    tensors = {name: encode_array(values, dtype) for name, values in weights.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard, part in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        file_name = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        shard_names = [names[i] for i in part]
        write_safetensors(folder / file_name, {name: tensors[name] for name in shard_names}, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard_names, file_name))
    total = sum(array.nbytes for _, array in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def write_tiny_model(
    folder, *, dtype="bfloat16", shards=1, seed=0, chat_template=CHAT_TEMPLATE, **config_overrides
):
    """Write a complete Hugging Face folder of a tiny random Llama and return its path.

    Any key of config.json can be overridden by name; `OMIT` leaves it out. With `dtype` "float16" or
    "float32" the weights are stored so. generation_config.json lists three end-of-sequence ids, config.json
    one, as Llama 3.2 Instruct does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(dtype=dtype, **config_overrides)
    ids = special_token_ids(config["vocab_size"])
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
        "temperature": 0.6,
        "top_p": 0.9,
    }
    _write_json(folder / "generation_config.json", generation)
    write_tiny_tokenizer(folder, config["vocab_size"], chat_template)
    write_weights(folder, tiny_weights(config, seed), dtype, shards)
    return folder


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
