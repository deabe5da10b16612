"""Checkpoint and load_weights: one file or shards, the key list strict both ways, bfloat16 out of every "
"dtype."""

import json

import numpy as np
import pytest

from tests.model_files import (
    encode_array,
    float32_to_bf16_bits,
    tiny_config,
    tiny_weights,
    write_safetensors,
    write_tiny_model,
    write_weights,
)
from tinyvllm.errors import ModelFileError, ModelNotFoundError
from tinyvllm.loader.checkpoint import Checkpoint
from tinyvllm.loader.weights import load_weights, numpy_weights, to_bf16_bits
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import expected_tensors, stacked_shapes

INDEX = "model.safetensors.index.json"


def read(folder):
    return Checkpoint(folder), ModelConfig.from_folder(folder)


def rewrite(folder, change, dtype="bfloat16", shards=1):
    """Write the folder's weights again after `change(weights)`; returns the folder."""
    raw = json.loads((folder / "config.json").read_text())
    weights = tiny_weights(raw)
    change(weights)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_weights(folder, weights, dtype, shards)
    return folder


def check_error(folder):
    checkpoint, config = read(folder)
    with pytest.raises(ModelFileError) as error:
        checkpoint.check(config)
    return str(error.value)


# ---- what is right ----


@pytest.mark.parametrize("options", [
    {}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads":
    1}, {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 200},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_stacked_weights_hold_every_tensor_in_its_rows(tmp_path, options, dtype, shards):
    checkpoint, config = read(write_tiny_model(tmp_path, dtype=dtype, shards=shards, **options))
    assert len(checkpoint.files) == shards
    weights = numpy_weights(checkpoint, config)
    assert {kind: array.shape for kind, array in weights.items()} == stacked_shapes(config)
    assert all(array.dtype == np.uint16 for array in weights.values())

    originals = tiny_weights(tiny_config(dtype=dtype, **options))
    bits = {
        name: float32_to_bf16_bits(
            np.float32(encode_array(values, dtype)[1]) if dtype != "bfloat16" else values
        )
        for name, values in originals.items()
    }
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        get = {name.removeprefix(f"model.layers.{layer}."): value for name, value in bits.items()}
        assert np.array_equal(weights["qkv"][layer][:q], get["self_attn.q_proj.weight"])
        assert np.array_equal(weights["qkv"][layer][q : q + kv], get["self_attn.k_proj.weight"])
        assert np.array_equal(weights["qkv"][layer][q + kv :], get["self_attn.v_proj.weight"])
        assert np.array_equal(weights["o"][layer], get["self_attn.o_proj.weight"])
        assert np.array_equal(
            weights["gate_up"][layer][: config.intermediate_size], get["mlp.gate_proj.weight"]
        )
        assert np.array_equal(
            weights["gate_up"][layer][config.intermediate_size :], get["mlp.up_proj.weight"]
        )
        assert np.array_equal(weights["down"][layer], get["mlp.down_proj.weight"])
        assert np.array_equal(weights["input_norm"][layer], get["input_layernorm.weight"])
        assert np.array_equal(weights["post_attention_norm"][layer], get["post_attention_layernorm.weight"])
        if config.attention_bias:
            assert np.array_equal(weights["qkv_bias"][layer][q : q + kv], get["self_attn.k_proj.bias"])
            assert np.array_equal(weights["o_bias"][layer], get["self_attn.o_proj.bias"])
        if config.mlp_bias:
            up = weights["gate_up_bias"][layer][config.intermediate_size :]
            assert np.array_equal(up, get["mlp.up_proj.bias"])
            assert np.array_equal(weights["down_bias"][layer], get["mlp.down_proj.bias"])
    assert np.array_equal(weights["embed"], bits["model.embed_tokens.weight"])
    assert np.array_equal(weights["final_norm"], bits["model.norm.weight"])
    assert ("lm_head" in weights) == (not config.tie_word_embeddings)
    if not config.tie_word_embeddings:
        assert np.array_equal(weights["lm_head"], bits["lm_head.weight"])


def test_bfloat16_pieces_are_views_of_the_file(tmp_path):
    checkpoint, config = read(write_tiny_model(tmp_path))
    calls = []
    load_weights(checkpoint, config, lambda *call: calls.append(call), progress=False)
    assert len(calls) == len(expected_tensors(config))
    assert not any(array.flags.owndata or array.flags.writeable for *_, array in calls)
    assert {(kind, layer, row) for kind, layer, row, _ in calls if kind == "qkv" and layer == 1} == {
        ("qkv", 1, 0), ("qkv", 1, 128), ("qkv", 1, 192)}  # fmt: skip


def test_joined_pieces_cover_whole_layers(tmp_path):
    checkpoint, config = read(write_tiny_model(tmp_path, tie_word_embeddings=False, attention_bias=True))
    whole = numpy_weights(checkpoint, config)
    seen = set()

    def sink(kind, layer, row_offset, array):
        assert row_offset == 0 and array.flags.c_contiguous
        assert np.array_equal(array, whole[kind] if layer is None else whole[kind][layer])
        seen.add((kind, layer))

    load_weights(checkpoint, config, sink, joined=True, progress=False)
    per_layer = {
        kind for kind, shape in stacked_shapes(config).items() if shape[0] == config.num_hidden_layers
    }
    assert {kind for kind, layer in seen if layer == 1} == per_layer - {"gate_up_bias", "down_bias"}


def test_load_weights_takes_a_folder_and_checks_before_it_calls(tmp_path):
    folder = rewrite(write_tiny_model(tmp_path), lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelFileError, match=r"lacks the tensor 'model\.norm\.weight'"):
        load_weights(
            folder, ModelConfig.from_folder(folder), lambda *call: pytest.fail("called"), progress=False
        )


def test_progress_counts_bytes(tmp_path, capsys):
    checkpoint, config = read(write_tiny_model(tmp_path))
    load_weights(checkpoint, config, lambda *call: None)
    assert "Loading weights: 100%" in capsys.readouterr().err
    load_weights(checkpoint, config, lambda *call: None, progress=False)
    assert capsys.readouterr().err == ""


def test_rounding_is_to_nearest_even_over_all_float16_values():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert np.array_equal(to_bf16_bits(finite), float32_to_bf16_bits(finite.astype(np.float32)))
    assert to_bf16_bits(np.array([np.inf, -np.inf], np.float16)).tolist() == [0x7F80, 0xFF80]


def test_rounding_goes_on_over_the_border_of_a_chunk(monkeypatch):
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    monkeypatch.setattr("tinyvllm.loader.weights._ROUND_ELEMENTS", 4)
    assert np.array_equal(to_bf16_bits(values), float32_to_bf16_bits(values))


def test_one_file_wins_over_an_index(tmp_path):
    folder = write_tiny_model(tmp_path, shards=2)
    rewrite_single = tiny_weights(json.loads((folder / "config.json").read_text()))
    write_weights(folder, rewrite_single)
    assert [file.path.name for file in Checkpoint(folder).files] == ["model.safetensors"]


def test_rotary_buffers_of_old_exports_are_ignored(tmp_path):
    def add(weights):
        for layer in range(2):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        weights["model.rotary_emb.inv_freq"] = np.ones(16, np.float32)

    plain = numpy_weights(*read(write_tiny_model(tmp_path / "plain")))
    with_buffers = numpy_weights(*read(rewrite(write_tiny_model(tmp_path / "old"), add)))
    assert all(np.array_equal(plain[kind], with_buffers[kind]) for kind in plain)


def test_a_tied_model_may_carry_an_equal_lm_head(tmp_path):
    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    checkpoint, config = read(rewrite(write_tiny_model(tmp_path), add))
    checkpoint.check(config)
    assert "lm_head" not in numpy_weights(checkpoint, config)


# ---- what is wrong ----


def test_a_tied_model_with_another_lm_head_is_refused(tmp_path):
    def change_one(weights):
        head = weights["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        weights["lm_head.weight"] = head

    def other_shape(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][:-1]

    for number, change in enumerate((change_one, other_shape)):
        message = check_error(rewrite(write_tiny_model(tmp_path / str(number)), change))
        assert '"tie_word_embeddings": true, but lm_head.weight differs' in message


def test_an_untied_model_without_lm_head_says_what_to_do(tmp_path):
    folder = write_tiny_model(tmp_path, tie_word_embeddings=False)
    message = check_error(rewrite(folder, lambda weights: weights.pop("lm_head.weight")))
    assert "lacks the tensor 'lm_head.weight'" in message and '"tie_word_embeddings": true' in message


def test_missing_tensors_are_counted_and_named(tmp_path):
    def drop(weights):
        for name in list(weights):
            if "layers.1." in name:
                del weights[name]

    message = check_error(rewrite(write_tiny_model(tmp_path), drop))
    assert "lacks 9 tensors ('model.layers.1.input_layernorm.weight', " in message and ", ...)" in message


def test_tensors_that_nothing_uses_are_refused(tmp_path):
    def add(weights):
        weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(32, np.float32)

    message = check_error(rewrite(write_tiny_model(tmp_path), add))
    assert (
        "has the tensor 'model.layers.0.self_attn.q_norm.weight' that LlamaForCausalLM does not use"
        in message
    )


def test_biases_that_config_json_does_not_announce_are_refused(tmp_path):
    folder = write_tiny_model(tmp_path, attention_bias=True)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "attention_bias": False}))
    assert "has 8 tensors ('model.layers.0.self_attn" in check_error(folder)


def test_wrong_shapes_are_named_with_both_shapes(tmp_path):
    def transpose(weights):
        name = "model.layers.1.self_attn.k_proj.weight"
        weights[name] = weights[name][:-1]

    message = check_error(rewrite(write_tiny_model(tmp_path), transpose))
    assert (
        "'model.layers.1.self_attn.k_proj.weight' has shape [63, 64], but config.json makes it [64, 64]"
        in message
    )


def test_wrong_dtypes_are_named(tmp_path):
    folder = write_tiny_model(tmp_path)
    weights = tiny_weights(json.loads((folder / "config.json").read_text()))
    tensors = {name: encode_array(values, "bfloat16") for name, values in weights.items()}
    tensors["model.norm.weight"] = ("I8", np.zeros(64, np.int8))
    write_safetensors(folder / "model.safetensors", tensors)
    message = check_error(folder)
    assert (
        "'model.norm.weight' has dtype I8, which is not supported for weights (supported: BF16, F16, F32)"
        in message
    )


def test_folders_without_weights_say_what_is_read(tmp_path):
    with pytest.raises(ModelNotFoundError, match="is not a folder: give the folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        ModelNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ModelNotFoundError, match=r"It has pytorch_model\.bin, but .* save them as safetensors"
    ):
        Checkpoint(tmp_path)


def test_missing_shards_are_named(tmp_path):
    folder = write_tiny_model(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelNotFoundError, match=r"1 of the 3 files .* missing: model-00002-of-00003\.safetensors"
    ):
        Checkpoint(folder)


def test_a_damaged_shard_is_named(tmp_path):
    folder = write_tiny_model(tmp_path, shards=3)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match=r"model-00002-of-00003\.safetensors: .* 10 bytes are missing"):
        Checkpoint(folder)


INDEX_FAULTS = {
    "no weight_map": (lambda index: index.pop("weight_map"), "must have a 'weight_map' object"),
    "a folder in a name": (
        lambda index: index["weight_map"].update({"model.norm.weight": "../model.safetensors"}),
        "which is not the plain name of a file",
    ),
    "another file": (
        lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"}),
        "says that model-00001-of-00002.safetensors holds 'model.norm.weight', but it is in "
        "model-00002-of-00002",
    ),
    "a tensor too many": (
        lambda index: index["weight_map"].update({"x": "model-00001-of-00002.safetensors"}),
        "holds 'x', but no file does",
    ),
    "a tensor too few": (
        lambda index: index["weight_map"].pop("model.norm.weight"),
        "the files hold the tensor 'model.norm.weight' that model.safetensors.index.json does not list",
    ),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, name):
    change, message = INDEX_FAULTS[name]
    folder = write_tiny_model(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelFileError) as error:
        Checkpoint(folder)
    assert message in str(error.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path, shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        ModelFileError, match=r"is in two files, model-00001-of-00002.safetensors and model-00002"
    ):
        Checkpoint(folder)


def test_a_checkpoint_checks_itself_when_given_the_config(tmp_path):
    folder = rewrite(write_tiny_model(tmp_path), lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelFileError, match="lacks"):
        Checkpoint(folder, ModelConfig.from_folder(folder))
    with pytest.raises(ModelFileError, match=r"has no tensor 'model.norm.weight'"):
        Checkpoint(folder).array("model.norm.weight")


def test_transformers_loads_the_same_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_model(tmp_path, shards=2, attention_bias=True, tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    checkpoint = Checkpoint(folder, ModelConfig.from_folder(folder))
    assert set(theirs) == set(checkpoint.tensors)
    for name, tensor in theirs.items():
        assert np.array_equal(checkpoint.array(name), tensor.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_link_whose_target_is_gone_is_named(tmp_path, name):
    from tinyvllm import LLM

    folder = write_tiny_model(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match=f"{name} is a link to a file that is not there any more"):
        LLM(folder, device="cpu", use_tqdm=False)


def test_an_absurd_number_of_layers_is_refused_at_once(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(ModelFileError, match="config.json says 1000000000 layers, but the checkpoint lacks"):
        Checkpoint(folder).check(ModelConfig.from_folder(folder))


@pytest.mark.parametrize("model", [None, 5, "", "x" * 5000])
def test_what_is_no_model_name_is_refused_in_plain_words(model):
    from tinyvllm import LLM

    with pytest.raises(ModelNotFoundError, match="a model is a folder, a hub id|there is no folder"):
        LLM(model)
