"""Queries, keys and values of one attention head as plain numbers, for whoever wants to do its arithmetic by hand.

`Probe.attention` gives what comes out; this gives what goes in, so that a question can be asked that the engine never
computes: what the weights would be without the mask, or without the scale.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.probe.errors import ProbeError, check_number

if TYPE_CHECKING:
    from tinyvllm.llm import LLM


class HeadVectors(NamedTuple):
    """One head of one layer. positions: of the queries; keys and values are those of positions 0 .. C - 1."""

    positions: np.ndarray  # int64 [R]
    q: np.ndarray  # float32 [R, D], after RoPE
    k: np.ndarray  # float32 [C, D], after RoPE
    v: np.ndarray  # float32 [C, D]
    scale: float


def head_vectors(llm: "LLM", layer: int, head: int) -> HeadVectors:
    """The kept queries of the watched request, and its keys and values out of the paged cache: the very numbers used.

    Only the thread that steps the engine may call this. Raises ProbeError, also where a block has been given to
    another request since.
    """
    runner, watch = llm.runner, llm.runner.watch
    if watch is None or not watch.context:
        raise ProbeError("nothing is kept: watch a request, and let the engine run a step of it")
    dims, download = runner.dims, runner.backend.download
    check_number("layer", layer, dims.num_layers)
    check_number("head", head, dims.num_heads)
    if watch.overwritten:
        raise ProbeError(f"some keys of request {watch.request_id!r} are gone: their blocks have been given to request "
                         f"{next(iter(watch.overwritten.values()))!r}")
    positions = np.flatnonzero(watch.is_kept[:watch.context])
    kv_head = head // (dims.num_heads // dims.num_kv_heads)
    part = slice(head * dims.head_dim, (head + 1) * dims.head_dim)
    q = bf16_to_float32(np.array(download(watch.queries[layer]))[positions, part])
    blocks = watch.block_ids[:-(-watch.context // dims.block_size)]
    k, v = (np.concatenate([bf16_to_float32(np.array(download(cache[layer, block]))[kv_head]) for block in blocks])
            [:watch.context] for cache in runner.kv_cache)
    return HeadVectors(positions, q, k, v, dims.scale)


def softmax_rows(vectors: HeadVectors, *, causal: bool = True, scaled: bool = True) -> np.ndarray:
    """float32 [R, C]: the attention weights of these queries over these keys, in NumPy.

    causal=False: nobody is kept from looking at what comes later. scaled=False: scores are not multiplied by
    D ** -0.5. With both True it is what the engine computes; each of the others is a "what if".
    """
    scores = vectors.q @ vectors.k.T
    if scaled:
        scores *= np.float32(vectors.scale)
    if causal:
        scores[np.arange(len(vectors.k)) > vectors.positions[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=1, keepdims=True)
