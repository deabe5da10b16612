"""The memory plan: exact numbers on an imagined device."""

import math

import pytest

from tests.model_files import tiny_config
from tinyvllm.config import EngineConfig
from tinyvllm.errors import ConfigError, OutOfDeviceMemoryError
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import stacked_shapes
from tinyvllm.runner.memory import plan_memory, replan

MODEL = ModelConfig.from_dict(tiny_config())  # 2 layers, 2 KV heads of 32: 512 bytes of K and V a token
BLOCK = 16 * 512
WEIGHTS = 2 * sum(math.prod(shape) for shape in stacked_shapes(MODEL).values())


class Device:
    """A backend of which only the name, the layout and the free memory are asked."""

    def __init__(self, name, free, total=None):
        self.name, self.free, self.total = name, free, total or free

    def linear_shape(self, rows, columns):
        return rows, columns

    def memory_info(self):
        return self.free, self.total


def activations(seqs, tokens, max_model_len):
    hidden, qkv, attn, inner = 64, (4 + 2 * 2) * 32, 4 * 32, 96
    return 2 * (tokens * (2 * hidden + qkv + attn + 3 * inner) + seqs * (hidden + 384)) + max_model_len * 32 * 2


def test_defaults_fill_the_seats_at_full_length_and_no_more():
    plan = plan_memory(MODEL, EngineConfig(), Device("cuda", 10**12))
    assert (plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len) == (256, 8192, 512)
    assert plan.num_blocks == 256 * 512 // 16
    assert plan.weight_bytes == WEIGHTS and plan.block_bytes == BLOCK
    assert plan.activation_bytes == activations(256, 8192, 512)
    assert plan.kv_cache_bytes == plan.num_blocks * BLOCK
    cpu = plan_memory(MODEL, EngineConfig(), Device("cpu", 10**12))
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.num_blocks) == (32, 2048, 32 * 512 // 16)


def test_a_length_that_is_no_multiple_of_a_block_gets_the_block_it_begins():
    plan = plan_memory(MODEL, EngineConfig(max_model_len=33, max_num_seqs=4), Device("cuda", 10**12))
    assert plan.num_blocks == 4 * 3


def test_on_a_gpu_the_share_limits_everything_together():
    total = 120 * 2**20
    plan = plan_memory(MODEL, EngineConfig(gpu_memory_utilization=0.5), Device("cuda", total))
    assert plan.num_blocks == int((total * 0.5 - WEIGHTS - activations(256, 8192, 512)) // BLOCK)
    other_programs = plan_memory(MODEL, EngineConfig(gpu_memory_utilization=0.5), Device("cuda", 40 * 2**20, total))
    assert other_programs.num_blocks == int((40 * 2**20 - WEIGHTS - activations(256, 8192, 512)) // BLOCK)


def test_on_the_cpu_a_quarter_of_what_is_free_at_most():
    free = 10 * 2**20
    plan = plan_memory(MODEL, EngineConfig(), Device("cpu", free))
    assert plan.num_blocks == int((free - WEIGHTS - activations(32, 2048, 512)) * 0.25 // BLOCK)


def test_seats_and_tokens_fit_each_other_when_only_one_is_given():
    assert plan_memory(MODEL, EngineConfig(max_num_batched_tokens=10), Device("cpu", 10**12)).max_num_seqs == 10
    assert plan_memory(MODEL, EngineConfig(max_num_seqs=5000), Device("cpu", 10**12)).max_num_batched_tokens == 5000
    with pytest.raises(ConfigError, match="max_num_batched_tokens=4 is less than max_num_seqs=5"):
        plan_memory(MODEL, EngineConfig(max_num_seqs=5, max_num_batched_tokens=4), Device("cpu", 10**12))


def test_what_does_not_fit_is_refused_with_what_was_asked_for_and_what_is_free():
    with pytest.raises(OutOfDeviceMemoryError, match=r"9 KV-cache blocks of 16 tokens 72 KiB make .* 1 MiB of 2 MiB are free"):
        plan_memory(MODEL, EngineConfig(num_blocks=9), Device("cuda", 2**20, 2**21))
    with pytest.raises(OutOfDeviceMemoryError, match=r"gpu_memory_utilization=0.0005 allows 8.19 MiB"):
        plan_memory(MODEL, EngineConfig(gpu_memory_utilization=0.0005), Device("cuda", 12 * 2**30, 16 * 2**30))


def test_a_reset_keeps_the_cache_s_size_in_tokens():
    before = plan_memory(MODEL, EngineConfig(num_blocks=64, max_num_seqs=8), Device("cpu", 10**12))
    after = replan(before, MODEL, EngineConfig(block_size=64, max_num_seqs=8), {"block_size"})
    assert after.num_blocks == 16 and after.kv_cache_bytes == before.kv_cache_bytes
    fewer = replan(before, MODEL, EngineConfig(num_blocks=5, max_num_seqs=8), {"num_blocks"})
    assert fewer.num_blocks == 5 and fewer.max_num_seqs == 8
