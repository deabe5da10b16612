"""ModelConfig: what config.json may say, in which spellings, and what is refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.model_files import LLAMA3_ROPE, TINY_CONFIG, tiny_config, write_tiny_model
from tinyvllm.errors import ConfigError, ModelFileError, ModelNotFoundError
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import expected_tensors, pieces, stacked_shapes
from tinyvllm.model.registry import ARCHITECTURES
from tinyvllm.model.rope_parameters import RopeParameters
from tinyvllm.model.rope_table import cos_sin_table, inv_freq

LLAMA_1B = Path(__file__).parent / "data" / "llama-3.2-1b"


def config(generation=None, **overrides):
    return ModelConfig.from_dict({**TINY_CONFIG, "rope_scaling": None, **overrides}, generation)


def without(*keys, **overrides):
    return {key: value for key, value in {**TINY_CONFIG, **overrides}.items() if key not in keys}


# ---- Llama 3.2 1B Instruct, the reference ----


def test_llama_3_2_1b_is_read_as_it_is():
    llama = ModelConfig.from_folder(LLAMA_1B)
    assert (llama.architecture, llama.vocab_size, llama.hidden_size) == ("LlamaForCausalLM", 128256, 2048)
    assert (llama.num_hidden_layers, llama.num_attention_heads, llama.num_key_value_heads) == (16, 32, 8)
    assert (llama.head_dim, llama.intermediate_size, llama.rms_norm_eps) == (64, 8192, 1e-5)
    assert llama.rope == RopeParameters(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert llama.tie_word_embeddings and not llama.attention_bias and not llama.mlp_bias
    assert (llama.bos_token_id, llama.eos_token_ids) == (128000, (128001, 128008, 128009))
    assert llama.num_parameters == 1_235_814_400  # the figure of its model card, 1.23 B


def test_kv_cache_of_llama_3_2_1b_takes_32_kib_a_token_and_512_kib_a_block():
    llama = ModelConfig.from_folder(LLAMA_1B)
    assert llama.kv_bytes_per_token == 32 * 1024
    assert llama.kv_bytes_per_block(16) == 512 * 1024


@pytest.mark.parametrize("overrides", [
    {}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"mlp_bias": True},
    {"num_key_value_heads": 1, "num_hidden_layers": 3, "intermediate_size": 100},
])  # fmt: skip
def test_counts_agree_with_the_table_of_tensors(overrides):
    model = config(**overrides)
    assert model.num_parameters == sum(math.prod(shape) for shape in expected_tensors(model).values())
    assert model.num_parameters == sum(math.prod(shape) for shape in stacked_shapes(model).values())
    assert model.weight_bytes == 2 * model.num_parameters


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_tile_every_stacked_array_exactly_once(tied):
    model = config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    covered = {
        kind: np.zeros(shape[: 1 + (kind in PER_LAYER)], int) for kind, shape in stacked_shapes(model).items()
    }
    for piece in pieces(model):
        rows = covered[piece.kind] if piece.layer is None else covered[piece.kind][piece.layer]
        rows[piece.row_offset : piece.row_offset + piece.shape[0]] += 1
    assert all((rows == 1).all() for rows in covered.values())


PER_LAYER = {"qkv", "qkv_bias", "o", "o_bias", "gate_up", "gate_up_bias", "down", "down_bias", "input_norm",
             "post_attention_norm"}  # fmt: skip


# ---- spellings and defaults ----


def test_head_dim_and_key_heads_are_derived_when_absent_or_null():
    for raw in (without("head_dim", "num_key_value_heads", hidden_size=256),
                without(head_dim=None, num_key_value_heads=None, hidden_size=256)):  # fmt: skip
        model = ModelConfig.from_dict(raw)
        assert (model.head_dim, model.num_key_value_heads) == (64, 4)


def test_head_dim_need_not_be_hidden_size_over_heads():
    assert config(hidden_size=72, num_attention_heads=5, num_key_value_heads=5, head_dim=96).head_dim == 96


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_every_supported_head_dim(head_dim):
    assert config(head_dim=head_dim).head_dim == head_dim


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    {"rope_theta": 5e5, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in
    LLAMA3_ROPE.items()}}, {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
    {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}, "rope_theta": 5e5},
    {"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    {"rope_parameters": LLAMA3_ROPE, "rope_theta": 5e5},
])  # fmt: skip
def test_llama3_rope_in_every_spelling(spelling):
    model = ModelConfig.from_dict(without("rope_theta", "rope_scaling") | spelling)
    assert model.rope == RopeParameters(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("spelling, expected", [
    ({}, RopeParameters(10000.0)),
    ({"rope_theta": 25000, "rope_scaling": None}, RopeParameters(25000.0)),
    ({"rope_parameters": {"rope_theta": 25000.0, "rope_type": "default"}}, RopeParameters(25000.0)),
    ({"rope_parameters": {"rope_theta": 25000.0}}, RopeParameters(25000.0)),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4}}, RopeParameters(1e4, "linear",
    4.0)),
])  # fmt: skip
def test_default_and_linear_rope(spelling, expected):
    assert ModelConfig.from_dict(without("rope_theta", "rope_scaling") | spelling).rope == expected


def test_llama3_without_an_original_context_takes_the_models_own():
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    assert config(rope_scaling=scaling).rope.original_max_position_embeddings == 512


def test_eos_list_of_generation_config_wins():
    one = {"bos_token_id": 5, "eos_token_id": 6}
    assert config(**one).eos_token_ids == (6,)
    assert config({"eos_token_id": [7, 8, 7]}, **one).eos_token_ids == (7, 8)
    assert config({"eos_token_id": 9}, **one).eos_token_ids == (9,)
    assert config({"bos_token_id": 4}, **one).bos_token_id == 4
    assert config({}, eos_token_id=[1, 2]).eos_token_ids == (1, 2)
    assert config().eos_token_ids == () and config().bos_token_id is None


def test_dtype_in_either_spelling():
    assert config(torch_dtype="float16").dtype == "float16"
    assert config(dtype="float32", torch_dtype="float16").dtype == "float32"
    assert config(torch_dtype="torch.bfloat16").dtype == "bfloat16"
    assert config().dtype == "bfloat16"


def test_model_type_stands_in_for_missing_architectures():
    assert ModelConfig.from_dict(without("architectures")).architecture == "LlamaForCausalLM"
    assert list(ARCHITECTURES) == ["LlamaForCausalLM"]


def test_what_changes_nothing_is_let_pass():
    assert config(sliding_window=None, quantization_config=None, partial_rotary_factor=1.0, pretraining_tp=2,
                  use_cache=False, layer_types=["full_attention"] * 2, rope_interleaved=False,
                  some_note="anything") == config()  # fmt: skip
    assert config(sliding_window=4096, use_sliding_window=False) == config()


# ---- refusals: the message names what was given and what is supported ----

REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]},
     "architecture 'GPT2LMHeadModel' is not supported (supported: LlamaForCausalLM)"),
    ({"architectures": ["Qwen2ForCausalLM"], "model_type": "llama"}, "'Qwen2ForCausalLM' is not supported"),
    ({"architectures": None, "model_type": "mamba"}, "model type 'mamba' is not supported"),
    ({"architectures": None, "model_type": None}, "neither 'architectures' nor 'model_type'"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (supported: 'silu')"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', which is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_interleaved": True}, "interleaved rotary pairs"),
    ({"head_dim": 48}, "head_dim 48 is not supported (supported: 32, 64, 80, 96, 128)"),
    ({"head_dim": None, "hidden_size": 192}, "head_dim 48 (hidden_size 192 / num_attention_heads 4)"),
    ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"vocab_size": 0}, "vocab_size must be a whole number of 1 or more, got 0"),
    ({"hidden_size": 64.0}, "hidden_size must be a whole number of 1 or more, got 64.0"),
    ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number between 0 and 1, got 0"),
    ({"torch_dtype": "int8"}, "dtype 'int8' is not supported (supported: bfloat16, float16, float32)"),
    ({"eos_token_id": 384}, "eos_token_id 384 is outside the vocabulary of 384 ids"),
    ({"eos_token_id": [1, -1]}, "eos_token_id -1 is outside"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, got '</s>'"),
    ({"bos_token_id": [1, 2]}, "bos_token_id must be one id, got [1, 2]"),
]  # fmt: skip
REFUSED_ROPE = [
    ({"rope_type": "yarn", "factor": 4.0}, "'yarn' is not supported (supported: default, linear, llama3)"),
    ({"type": "dynamic", "factor": 4.0}, "rope type 'dynamic' is not supported"),
    ({"rope_type": "longrope", "factor": 4.0}, "rope type 'longrope' is not supported"),
    ({"rope_type": "linear"}, "of type 'linear' lacks 'factor'"),
    ({"rope_type": "llama3", "factor": 8}, "lacks 'low_freq_factor', 'high_freq_factor'"),
    ({"factor": 4.0}, "does not say its rope_type"),
    ({"rope_type": "linear", "type": "llama3", "factor": 2}, "must name one type"),
    ({"rope_type": "default", "factor": 4.0}, "factor 4.0 but type 'default'"),
    ({"rope_type": "linear", "factor": -1}, "factor in rope_scaling must be a number above 0, got -1"),
    ({"rope_type": "linear", "factor": 2, "beta_fast": 32}, "'beta_fast', which are not supported"),
    ({"rope_type": "linear", "factor": 2, "rope_theta": 5e5}, "is 10000.0, but rope_scaling says 500000.0"),
    ({**LLAMA3_ROPE, "high_freq_factor": 1.0}, "high_freq_factor 1, which must be above low_freq_factor 1"),
    ("linear", "rope_scaling must be an object"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_supported_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as error:
        config(**overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("scaling, message", REFUSED_ROPE, ids=[message[:40] for _, message in REFUSED_ROPE])
def test_rope_that_is_not_supported_is_refused_by_name(scaling, message):
    with pytest.raises(ConfigError) as error:
        config(rope_scaling=scaling)
    assert message in str(error.value)


def test_two_rope_sections_that_differ_are_refused():
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters are both there and differ"):
        config(rope_scaling=LLAMA3_ROPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def test_wrong_generation_config_is_named():
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id 999 is outside"):
        config({"eos_token_id": [1, 999]})


def test_missing_and_broken_config_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json: a model folder holds"):
        ModelConfig.from_folder(tmp_path)
    broken = {
        b"{\n  'a': 1}": "not valid JSON: .* at line 2, column 3",
        b"[1]": "must hold a JSON object",
        b'{"a": "\xff"}': "is not UTF-8",
        b"[" * 100_000: "not usable JSON",
        b'{"a": ' + b"9" * 10_000 + b"}": "not usable JSON",
    }
    for raw, message in broken.items():
        (tmp_path / "config.json").write_bytes(raw)
        with pytest.raises(ModelFileError, match=message):
            ModelConfig.from_folder(tmp_path)


def test_a_folder_is_read_with_its_generation_config(tmp_path):
    folder = write_tiny_model(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    model = ModelConfig.from_folder(folder)
    assert len(model.eos_token_ids) == 3 and raw["eos_token_id"] in model.eos_token_ids
    (folder / "generation_config.json").unlink()
    assert ModelConfig.from_folder(folder).eos_token_ids == (raw["eos_token_id"],)


# ---- the rotary tables ----


def reference_inv_freq(theta, dim):
    """f_i = theta ** (-2 i / D) in float64."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def test_all_32_frequencies_of_llama_3_2_1b():
    frequency, plain = inv_freq(ModelConfig.from_folder(LLAMA_1B)), reference_inv_freq(500000.0, 64)
    ratio = frequency / plain
    assert frequency.dtype == np.float32 and frequency.shape == (32,)
    assert np.allclose(ratio[:15], 1, rtol=1e-6)  # pairs 0-14: wavelength below 8192 / 4 tokens
    assert np.allclose(ratio[18:], 1 / 32, rtol=1e-6)  # pairs 18-31: longer than 8192
    keep = (8192 / (2 * math.pi / plain[15:18]) - 1) / (4 - 1)
    assert np.allclose(ratio[15:18], (1 - keep) / 32 + keep, rtol=1e-6)
    assert (ratio[15:18] > 1.1 / 32).all() and (ratio[15:18] < 0.9).all(), "really between the two"


def test_default_and_linear_frequencies():
    assert np.allclose(inv_freq(config(rope_theta=3e4)), reference_inv_freq(3e4, 32), rtol=1e-6)
    linear = config(rope_theta=3e4, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert np.array_equal(inv_freq(linear), inv_freq(config(rope_theta=3e4)) / 4)


@pytest.mark.parametrize("position", [0, 1, 500, 8191, 8192, 20_000, 131_071])
def test_table_rows_hold_cosines_then_sines(position):
    llama = ModelConfig.from_folder(LLAMA_1B)
    table = cos_sin_table(llama, position + 1)
    assert table.dtype == np.uint16 and table.shape == (position + 1, 64)
    row = bf16_to_float32(table[position])
    angle = (np.float32(position) * inv_freq(llama)).astype(np.float64)
    # bfloat16 keeps 8 significant bits: half of the last one of a value below 1 is at most 2 ** -9.
    assert np.abs(row[:32] - np.cos(angle)).max() <= 2.0**-9
    assert np.abs(row[32:] - np.sin(angle)).max() <= 2.0**-9


def test_a_longer_table_begins_with_the_shorter_one():
    llama = ModelConfig.from_folder(LLAMA_1B)
    assert np.array_equal(cos_sin_table(llama, 9000)[:5000], cos_sin_table(llama, 5000))
    assert cos_sin_table(llama, 0).shape == (0, 64)


ROPE_CASES = [
    (64, 500000.0, LLAMA3_ROPE), (128, 500000.0, {**LLAMA3_ROPE, "factor": 8.0}), (80, 10000.0, None),
    (32, 10000.0, {"rope_type": "linear", "factor": 4.0}),
]  # fmt: skip


@pytest.mark.parametrize("head_dim, theta, scaling", ROPE_CASES)
def test_frequencies_and_tables_equal_transformers(head_dim, theta, scaling):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = tiny_config(
        head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=131072
    )
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    model = ModelConfig.from_dict(raw)
    assert np.array_equal(inv_freq(model), reference.inv_freq.numpy())
    if scaling is not None:
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        assert np.array_equal(inv_freq(model), init(transformers.LlamaConfig(**raw), "cpu")[0].numpy())

    positions = torch.cat([torch.arange(3000), torch.arange(8000, 11000), torch.arange(130_000, 131_000)])
    cos, sin = reference(torch.zeros(1, dtype=torch.bfloat16), positions[None])
    half = head_dim // 2
    theirs = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1).contiguous().view(torch.int16).numpy()
    ours = cos_sin_table(model, 131_072)[positions.numpy()]
    # Their float32 cosines differ from the nearest float32 in the last bit now and then; one bfloat16 in a
    # million lies so near a rounding border that this shows (Llama 3.2 1B, all positions: 2 of 8.4 million).
    differing = ours != theirs.view(np.uint16)
    assert differing.mean() <= 1e-5
    gap = np.abs(bf16_to_float32(ours) - bf16_to_float32(theirs.view(np.uint16)))
    assert gap.max() <= 2.0**-8, "never more than one step of bfloat16"
