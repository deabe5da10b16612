"""How the device's memory is divided: weights, activations, and all the rest to KV-cache blocks."""

import dataclasses
from dataclasses import dataclass

from tinyvllm.config import EngineConfig
from tinyvllm.errors import ConfigError, OutOfDeviceMemoryError
from tinyvllm.model.config import ModelConfig
from tinyvllm.runner.backend import Backend
from tinyvllm.runner.model_runner import buffer_shapes
from tinyvllm.runner.weights import weight_bytes
from tinyvllm.units import format_bytes

BYTES = 2  # bfloat16 everywhere
DEFAULT_MAX_NUM_SEQS = {"cpu": 32, "cuda": 256}
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
CPU_KV_SHARE = 0.25  # of the free host memory: a laptop runs other programs too


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in bytes, and the numbers that EngineConfig left open."""

    weight_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    block_bytes: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def describe(self) -> str:
        return (f"weights {format_bytes(self.weight_bytes)}, activations {format_bytes(self.activation_bytes)}, "
                f"KV cache {format_bytes(self.kv_cache_bytes)} in {self.num_blocks} blocks of "
                f"{format_bytes(self.block_bytes)}")


def plan_memory(model: ModelConfig, engine: EngineConfig, backend: Backend) -> MemoryPlan:
    """Decide sizes before anything is allocated.

    Raises ConfigError for lengths that the model does not have, OutOfDeviceMemoryError if the plan cannot fit.
    """
    if engine.max_model_len is not None and engine.max_model_len > model.max_position_embeddings:
        raise ConfigError(f"max_model_len={engine.max_model_len} is more than the model's max_position_embeddings="
                          f"{model.max_position_embeddings}: choose at most that")
    max_model_len = engine.max_model_len or model.max_position_embeddings
    max_num_seqs = engine.max_num_seqs or DEFAULT_MAX_NUM_SEQS[backend.name]
    max_tokens = engine.max_num_batched_tokens or max(DEFAULT_MAX_NUM_BATCHED_TOKENS[backend.name], max_num_seqs)
    if max_tokens < max_num_seqs and engine.max_num_seqs is None:
        max_num_seqs = max_tokens
    _check_batch(max_tokens, max_num_seqs)

    weights = weight_bytes(model, backend)
    rope_table = max_model_len * model.head_dim * BYTES
    activations = BYTES * sum(rows * columns for rows, columns in
                              buffer_shapes(model, max_num_seqs, max_tokens).values()) + rope_table
    block = model.kv_bytes_per_block(engine.block_size)
    free, total = backend.memory_info()
    most_useful = max_num_seqs * -(-max_model_len // engine.block_size)
    if engine.num_blocks is not None:
        num_blocks = engine.num_blocks
    elif backend.name == "cuda":
        budget = min(free, total * engine.gpu_memory_utilization) - weights - activations
        num_blocks = min(most_useful, int(budget // block))
    else:
        num_blocks = min(most_useful, max(1, int((free - weights - activations) * CPU_KV_SHARE // block)))
    needed = weights + activations + max(1, num_blocks) * block
    if num_blocks < 1 or needed > free:
        share = engine.gpu_memory_utilization
        allowed = f" (gpu_memory_utilization={share} allows {format_bytes(int(total * share))})" \
            if backend.name == "cuda" else ""
        raise OutOfDeviceMemoryError(
            f"this does not fit in memory: weights {format_bytes(weights)}, activations {format_bytes(activations)} "
            f"and {max(1, num_blocks)} KV-cache blocks of {engine.block_size} tokens "
            f"{format_bytes(max(1, num_blocks) * block)} make {format_bytes(needed)}, and {format_bytes(free)} of "
            f"{format_bytes(total)} are free{allowed}; lower "
            "num_blocks, max_num_batched_tokens, max_num_seqs or max_model_len, or use a smaller model")
    return MemoryPlan(weights, activations, num_blocks * block, block, num_blocks, max_model_len, max_num_seqs,
                      max_tokens)


def replan(plan: MemoryPlan, model: ModelConfig, engine: EngineConfig, changed: set[str]) -> MemoryPlan:
    """The plan of an engine that was running under `plan`, after the options named in `changed` became `engine`'s.

    What nobody changed stays; a changed block_size alone keeps the cache's size in tokens.
    """
    max_num_seqs = engine.max_num_seqs or plan.max_num_seqs
    max_tokens = engine.max_num_batched_tokens or plan.max_num_batched_tokens
    if "max_num_seqs" in changed and engine.max_num_batched_tokens is None:
        max_tokens = max(max_tokens, max_num_seqs)
    _check_batch(max_tokens, max_num_seqs)
    block = model.kv_bytes_per_block(engine.block_size)
    num_blocks = engine.num_blocks if "num_blocks" in changed else max(1, plan.num_blocks * plan.block_bytes // block)
    if num_blocks is None:
        raise ConfigError("num_blocks must be a whole number of 1 or more in a reset")
    return dataclasses.replace(plan, kv_cache_bytes=num_blocks * block, block_bytes=block, num_blocks=num_blocks,
                               max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens)


def _check_batch(max_tokens: int, max_num_seqs: int) -> None:
    if max_tokens < max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens={max_tokens} is less than max_num_seqs={max_num_seqs}: every "
                          "running request needs at least one token a step")
