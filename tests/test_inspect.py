"""inspect_model: what is in the files, where, and how memory would be shared."""

import io

import pytest

from tests.model_files import write_tiny_model
from tinyvllm.errors import ConfigError, ModelFileError
from tinyvllm.inspect import estimate_memory, inspect_model
from tinyvllm.model.config import ModelConfig
from tinyvllm.units import format_bytes

PARAMETERS = (
    384 * 64 + 2 * (64 * 256 + 128 * 64 + 3 * 64 * 96 + 128) + 64
)  # embedding, two layers, final norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("inspect") / "model", shards=2, dtype="float16")


def test_the_report_adds_up(folder):
    report = inspect_model(folder)
    assert report.num_tensors == 1 + 2 * 9 + 1 and report.dtypes == {"F16": 20}
    assert report.num_elements == report.config.num_parameters == PARAMETERS
    assert report.tensor_bytes == 2 * PARAMETERS
    assert sum(file.size for file in report.files) == sum(
        path.stat().st_size for path in folder.glob("*.safetensors")
    )
    for file in report.files:
        assert file.data_start == 8 + file.header_length == file.tensors[0].begin
        assert file.tensors[-1].end == file.size


def test_memory_is_shared_between_weights_and_blocks(folder):
    config = ModelConfig.from_folder(folder)
    per_token = 2 * 2 * 2 * 32 * 2  # K and V, layers, key heads, head_dim, bytes
    memory = 2 * PARAMETERS + 10 * 16 * per_token + 5
    estimate = estimate_memory(config, memory=memory)
    assert (estimate.kv_bytes_per_token, estimate.kv_bytes_per_block) == (per_token, 16 * per_token)
    assert (estimate.weights, estimate.num_blocks, estimate.num_tokens) == (2 * PARAMETERS, 10, 160)
    assert estimate.num_full_requests == 160 / 512
    assert estimate_memory(config, memory=memory, block_size=32, max_model_len=80).num_full_requests == 2
    nothing = estimate_memory(config)
    assert nothing.num_blocks is nothing.num_tokens is nothing.num_full_requests is None


def test_memory_too_small_says_how_much_is_missing(folder):
    report = inspect_model(folder, memory=2 * PARAMETERS)
    assert report.memory.num_tokens == 0
    assert "no: weights and one block need 8 KiB more" in report.text()


@pytest.mark.parametrize("options, message", [
    ({"block_size": 0}, "block_size must be a whole number of 1 or more, got 0"),
    ({"max_model_len": -1}, "max_model_len must be"), ({"memory": -1}, "memory must be a number of bytes"),
])  # fmt: skip
def test_options_are_checked(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        inspect_model(folder, **options)


def test_plain_text_and_tables_show_the_same_facts(folder):
    from rich.console import Console

    report = inspect_model(folder, memory=1 << 20)
    tables = io.StringIO()
    Console(file=tables, width=200).print(report)
    first = report.files[0].tensors[0]
    facts = [
        "LlamaForCausalLM", f"{PARAMETERS:,}", "2 (each serves 2 query heads)", "theta 10,000, default",
        "model.layers.1.self_attn.q_proj.weight", "128 x 64", "16,384", f"{first.begin:,} - {first.end:,}",
        "model-00002-of-00002.safetensors", "20 (20 F16)", "512 B", "8 KiB (16 tokens)", "1 MiB", "blocks = ",
    ]  # fmt: skip
    for text in (report.text(), tables.getvalue()):
        assert [fact for fact in facts if fact not in text] == []
    assert "q_proj" not in report.text(tensors=False)


def test_a_model_that_would_not_load_is_not_described(folder, tmp_path):
    broken = write_tiny_model(tmp_path)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="truncated"):
        inspect_model(broken)


def test_bytes_in_words():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 512 << 10, 5 << 40, 5 << 50)] == [
        "0 B", "1,023 B", "1 KiB", "1.50 KiB", "512 KiB", "5 TiB", "5,120 TiB"]  # fmt: skip
