"""Tensor files in pieces: heat maps show elements that are there, bytes are the file's, damage is told in words."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from tests.model_files import write_tiny_model
from tinyvllm.errors import ModelFileError, ModelNotFoundError, TinyVLLMError
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from tinyvllm.loader.resolve import demo_model_folder
from widgets import Feed, TensorFile
from widgets.answers import ANSWERS
from widgets.model_files import MOST_ELEMENTS, ModelFiles, heat_map, kind_of, to_float32

DEMO = demo_model_folder() / "model.safetensors"
Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


def write(path, tensors):
    """A safetensors file of {name: (dtype, shape, bytes)}, by the format's own rules."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def ask(panel, what, **args):
    return ANSWERS[what](panel.feed, key=panel.key, **args)


def test_each_cell_shows_the_element_of_largest_magnitude_of_its_rectangle():
    file = ModelFiles("demo").open()
    whole = bf16_to_float32(file.array(Q_PROJ))
    for most_rows, most_columns in ((256, 256), (100, 60), (7, 300), (1, 1)):
        heat = heat_map(file, Q_PROJ, most_rows, most_columns)
        tall, wide = heat["cell"]
        assert heat["values"].shape[0] <= most_rows and heat["values"].shape[1] <= most_columns
        assert np.array_equal(whole[heat["row"], heat["column"]], heat["values"])
        for i in range(heat["values"].shape[0]):
            for j in range(heat["values"].shape[1]):
                part = whole[i * tall:(i + 1) * tall, j * wide:(j + 1) * wide]
                assert abs(heat["values"][i, j]) == np.abs(part).max()


def test_a_window_of_a_tensor_a_vector_and_what_is_not_there():
    file = ModelFiles("demo").open()
    whole = bf16_to_float32(file.array(Q_PROJ))
    heat = heat_map(file, Q_PROJ, 64, 64, (10, 20), (250, 256))
    assert np.array_equal(heat["values"], whole[10:20, 250:256]) and heat["window"] == [10, 20, 250, 256]
    norm = heat_map(file, "model.norm.weight", 64, 64)
    assert norm["values"].shape == (1, 64) and norm["cell"] == [1, 4]
    for window in ((0, 257), (-1, 3), (5, 4)):
        with pytest.raises(TinyVLLMError, match="are not in this tensor, which has 256"):
            heat_map(file, Q_PROJ, 64, 64, window)
    with pytest.raises(ModelFileError, match="no tensor 'nothing'"):
        heat_map(file, "nothing", 1, 1)


def test_every_dtype_is_read_as_its_peer_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    peers = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64,
             "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "U8": np.uint8, "I8": np.int8,
             "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64}
    tensors = {name: (name, (3, 16), rng.integers(0, 256, 48 * np.dtype(peer).itemsize, np.uint8).tobytes())
               for name, peer in peers.items()}
    file = ModelFiles(write(tmp_path / "all.safetensors", tensors)).open()
    for name, peer in peers.items():
        with np.errstate(all="ignore"):
            expected = np.frombuffer(tensors[name][2], peer).astype(np.float32)
        assert np.array_equal(to_float32(tensors[name][2], name), expected, equal_nan=True), name
        values = heat_map(file, name, 3, 16)["values"]
        assert np.array_equal(values, expected.reshape(3, 16), equal_nan=True), name


def test_tensors_without_values_are_told(tmp_path):
    file = ModelFiles(write(tmp_path / "odd.safetensors", {
        "empty": ("F32", (0, 4), b""), "none": ("F32", (4, 0), b""), "scalar": ("F32", (), b"\0\0\x80?"),
        "pairs": ("F4", (2, 2), b"\x12\x34"), "deep": ("U8", (2, 2, 3), bytes(range(12)))})).open()
    assert heat_map(file, "empty", 5, 5)["values"].size == heat_map(file, "none", 5, 5)["values"].size == 0
    assert heat_map(file, "scalar", 5, 5)["values"].tolist() == [[1.0]]
    assert heat_map(file, "deep", 5, 5)["values"].tolist() == np.arange(12).reshape(4, 3).tolist()
    with pytest.raises(TinyVLLMError, match="dtype F4 are not drawn"):
        heat_map(file, "pairs", 5, 5)


def test_a_large_matrix_is_never_in_memory_as_a_whole(tmp_path):
    rows, columns = 20_000, 1024
    data = float32_to_bf16(np.random.default_rng(0).standard_normal(rows * columns).astype(np.float32)).tobytes()
    file = ModelFiles(write(tmp_path / "large.safetensors", {"big": ("BF16", (rows, columns), data)})).open()
    tracemalloc.start()
    heat = heat_map(file, "big", 200, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) / 8
    assert heat["stride"] == 3 and rows * columns / heat["stride"] <= MOST_ELEMENTS
    whole = bf16_to_float32(np.frombuffer(data, "<u2").reshape(rows, columns))
    assert np.array_equal(whole[heat["row"], heat["column"]], heat["values"])


def test_kinds_by_name():
    kinds = {"model.embed_tokens.weight": "embedding", "model.layers.0.input_layernorm.weight": "norm",
             "model.norm.weight": "norm", "model.layers.0.self_attn.q_proj.bias": "attention",
             "lm_head.weight": "output",
             "model.layers.9.mlp.down_proj.weight": "mlp", "something": "other"}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_the_parts_of_the_file_are_those_of_its_own_header():
    panel = TensorFile()
    told, data = ask(panel, "tensor_file"), DEMO.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    assert (told["size"], told["header_length"], told["data_start"]) == (len(data), length, 8 + length)
    assert json.loads(told["header"]) == header and told["files"] == ["model.safetensors"]
    for tensor in told["tensors"]:
        entry = header[tensor["name"]]
        assert [tensor["begin"] - 8 - length, tensor["end"] - 8 - length] == entry["data_offsets"]
        assert (tensor["dtype"], tensor["shape"], tensor["format"]) == (entry["dtype"], entry["shape"], "bf16")
    bytes_ = ask(panel, "tensor_bytes", file="", begin=len(data) - 4, count=100)
    assert bytes_.arrays["bytes"].tobytes() == data[-4:]


def test_several_files_are_a_choice(tmp_path):
    folder = write_tiny_model(tmp_path / "model", shards=2)
    panel = TensorFile(folder)
    told = ask(panel, "tensor_file")
    assert len(told["files"]) == 2 and told["file"] == told["files"][0]
    other = ask(panel, "tensor_file", file=told["files"][1])
    assert {t["name"] for t in told["tensors"]}.isdisjoint(t["name"] for t in other["tensors"])
    with pytest.raises(ModelNotFoundError, match="has no file '../../etc/passwd'"):
        ask(panel, "tensor_file", file="../../etc/passwd")
    with pytest.raises(TinyVLLMError, match="no longer open"):
        ANSWERS["tensor_file"](panel.feed, key="guess")


@pytest.mark.parametrize("content, said", [
    (b"", "8-byte header length"), (b"hello, this is no such file", "not a safetensors file"),
    (DEMO.read_bytes()[:100_000], "truncated"), (struct.pack("<Q", 4) + b"[1] ", "JSON object"),
])
def test_a_damaged_file_is_told_in_the_loader_s_words(tmp_path, content, said):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    panel = TensorFile(path)  # the panel opens; what is wrong stands in it
    with pytest.raises(ModelFileError, match=said):
        ask(panel, "tensor_file")


def test_what_is_no_model_is_refused(tmp_path):
    for path, said in ((tmp_path / "no.safetensors", "does not exist"), (tmp_path, "has no safetensors file"),
                       ("no/such/model", "no/such/model")):
        with pytest.raises(TinyVLLMError, match=said):
            ask(TensorFile(path), "tensor_file")
    with pytest.raises(TinyVLLMError, match="got int"):
        TensorFile(path=3)
    with pytest.raises(TinyVLLMError, match="path once"):
        TensorFile("demo", "demo")
    with pytest.raises(TypeError, match="no option 'colour'"):
        TensorFile(colour="red")
    assert "demo" in repr(TensorFile(Feed(None), "demo"))


def test_bytes_outside_of_the_file_are_refused():
    file = ModelFiles("demo").open()
    assert file.read(0, 8) == DEMO.read_bytes()[:8] and file.read(file.size, file.size) == b""
    for begin, end in ((-1, 3), (5, 4), (0, file.size + 1)):
        with pytest.raises(ValueError, match="are not in this file"):
            file.read(begin, end)
