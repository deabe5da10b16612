"""Logits of every row of a given sequence, through the engine's own runner: paged cache, chunks and all."""

import numpy as np

from tinyvllm import SamplingParams
from tinyvllm.engine.request import Request
from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.kernels.bf16 import bf16_to_float32


def sequence_logits(llm, token_ids, chunks, last_rows=None, block_ids=None) -> np.ndarray:
    """float32 [rows, V] for the sequence computed in chunks of the given sizes (the last size repeats).

    last_rows: only so many rows at the end. block_ids: the physical blocks to use (default: shuffled ones).
    The engine must be idle, and its prefix cache is forgotten: this writes into the blocks behind its back.
    """
    runner = llm.runner
    pool = llm.engine.kv_cache_manager.pool
    assert pool.num_free_blocks == pool.num_blocks
    pool.reset_cache()
    if block_ids is None:
        block_ids = np.random.default_rng(len(token_ids)).permutation(pool.num_blocks).tolist()
    request = Request("forced", token_ids, SamplingParams(), max_len=10**9)
    keep_from = 0 if last_rows is None else len(token_ids) - last_rows
    rows, start, sizes = [], 0, list(chunks)
    while start < len(token_ids):
        size = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], len(token_ids) - start)
        blocks = block_ids[:-(-(start + size) // pool.block_size)]
        output = SchedulerOutput([request], np.array([start], np.int32), np.array([size], np.int32), np.array([False]),
                                 [blocks], num_decodes=int(size == 1))
        batch = runner.builder.build(output)
        first = max(0, keep_from - start)
        if first < size:
            indices = np.arange(first, size, dtype=np.int32)
            assert len(indices) <= len(runner.buffers.logits), "raise max_num_seqs: one logits row a position is needed"
            batch = batch._replace(logits_indices=runner.backend.upload(runner.backend.empty(indices.shape, np.int32),
                                                                         indices))
        runner.backend.forward(runner.weights, runner.kv_cache, batch, runner.buffers, runner.dims)
        if first < size:
            rows.append(bf16_to_float32(runner.backend.download(runner.buffers.logits[:len(indices)])).copy())
        start += size
    return np.concatenate(rows)
