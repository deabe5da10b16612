"""What the tests of the probe share: a watched request beside others, and its attention in float64."""

import numpy as np

from tinyvllm import SamplingParams
from tinyvllm.kernels.bf16 import bf16_to_float32

PROMPT = [(7 * i) % 300 + 3 for i in range(37)]
OTHERS = [PROMPT[:20] + [5, 6], [11] * 30]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=12, ignore_eos=True)
OPTIONS = {"roomy": {}, "eager": dict(enforce_eager=True), "chunked": dict(max_num_batched_tokens=16, max_num_seqs=8),
           "tiny pool": dict(num_blocks=7, max_num_seqs=3), "small blocks": dict(block_size=2),
           "no cache": dict(use_kv_cache=False, enable_prefix_caching=False)}


def run(llm, watch="it", until=None, params=GREEDY):
    """{request_id: token ids} of PROMPT as "it" beside two others; `until(llm)` is called after each step."""
    if watch:
        llm.probe.watch(watch)
    for request_id, prompt in zip(("first", "it", "third"), (OTHERS[0], PROMPT, OTHERS[1])):
        llm.engine.add_request(prompt, params, request_id)
    tokens = {}
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
        if until is not None:
            until(llm)
    return tokens


def exact_attention(llm, queries, block_ids, layer, head, row):
    """float64 weights of one row from `kv` and kept queries: [row + 1], and the keys and values [row + 1, D]."""
    config = llm.model_config
    kv_head = head // (config.num_attention_heads // config.num_key_value_heads)
    size = llm.engine_config.block_size
    k, v = (np.concatenate([cache[kv_head] for cache in kinds])[:row + 1] for kinds in
            zip(*[llm.probe.kv(layer, block_id) for block_id in block_ids[:row // size + 1]]))
    q = bf16_to_float32(queries[layer, row].reshape(-1, config.head_dim)[head]).astype(np.float64)
    scores = bf16_to_float32(k).astype(np.float64) @ q * config.head_dim ** -0.5
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), bf16_to_float32(k), bf16_to_float32(v)


def run_to_end(engine):
    while engine.has_unfinished_requests():
        engine.step()
