"""A profiled step: the same tokens, times of every operation, costs as counted by hand; and the machine's roofs."""

import dataclasses
import json
import time

import numpy as np
import pytest

from tinyvllm import SamplingParams
from tinyvllm.bench.ceilings import Ceilings, best_rate, ceilings
from tinyvllm.engine.events import EventLog
from tinyvllm.errors import ConfigError
from tinyvllm.kernels import numpy_backend
from tinyvllm.model import llama
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import expected_tensors
from tinyvllm.probe.cost import OperationCost, StepShape, step_costs

PROMPT = [(7 * i) % 300 + 3 for i in range(37)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True)


# ---- the cost model ----


@pytest.fixture(scope="module")
def small(tiny_model):
    """H 4, two query heads and one key head of D 2, I 3, V 5, one layer: small enough to count by hand."""
    return dataclasses.replace(ModelConfig.from_folder(tiny_model), hidden_size=4, head_dim=2, num_attention_heads=2,
                               num_key_value_heads=1, intermediate_size=3, vocab_size=5, num_hidden_layers=1)


def test_one_decode_step_counted_by_hand(small):
    """One token, the tenth of its request. Elements are two bytes each."""
    assert step_costs(small, StepShape(rows=((1, 10),), num_logits=1)) == [
        ("embedding", "embedding", -1, 2 * (4 + 4), 0),
        ("input_norm", "rms_norm", 0, 2 * (4 + 4 + 4), 4 * 4),  # row in, row out, weight
        ("qkv_proj", "linear", 0, 2 * (8 * 4 + 4 + 8), 2 * 8 * 4),  # 4 q, 2 k, 2 v outputs of 4 inputs
        ("rope", "rope", 0, 2 * (6 + 6 + 2), 6 * 3),  # three pairs: two of q, one of k; cos and sin
        ("write_kv", "write_kv", 0, 2 * (4 + 4), 0),
        # q in, row out, ten keys and values in; two heads, ten keys, 2 D for q k and 2 D for weight times v
        ("attention", "attention", 0, 2 * (4 + 4 + 10 * (2 + 2)), 2 * 10 * (4 + 4)),
        ("o_proj", "linear", 0, 2 * (4 * 4 + 4 + 4), 2 * 4 * 4),
        ("post_attention_norm", "add_rms_norm", 0, 2 * (4 * 4 + 4), 5 * 4),
        ("gate_up_proj", "linear", 0, 2 * (6 * 4 + 4 + 6), 2 * 6 * 4),
        ("silu_mul", "silu_mul", 0, 2 * (6 + 3), 5 * 3),
        ("down_proj", "linear", 0, 2 * (4 * 3 + 3 + 4), 2 * 4 * 3),
        ("final_norm", "add_rms_norm", -1, 2 * (4 * 4 + 4), 5 * 4),
        ("gather_rows", "gather_rows", -1, 2 * (4 + 4), 0),
        ("lm_head", "linear", -1, 2 * (5 * 4 + 4 + 5), 2 * 5 * 4),
        ("argmax", "argmax", -1, 2 * 5, 0),
    ]


def test_a_mixed_batch_counts_every_pair_of_query_and_key(small):
    """Three requests; the pairs that attention sees are counted here one by one."""
    rows = ((1, 7), (3, 3), (2, 9))
    costs = {cost.name: cost for cost in step_costs(small, StepShape(rows, num_logits=2, greedy=False, num_kept=3))}
    pairs = sum(1 for count, context in rows for query in range(context - count, context) for key in range(context)
                if key <= query)
    assert pairs == 7 + (1 + 2 + 3) + (8 + 9)
    assert costs["attention"].flops == pairs * 2 * (2 * 2 + 2 * 2)
    assert costs["attention"].bytes == 2 * (6 * 4 + 6 * 4 + (7 + 3 + 9) * (2 + 2))
    assert costs["qkv_proj"][3:] == (2 * (8 * 4 + 6 * 4 + 6 * 8), 6 * 2 * 8 * 4)
    assert costs["lm_head"][3:] == (2 * (5 * 4 + 2 * 4 + 2 * 5), 2 * 2 * 5 * 4)
    assert costs["sample"].bytes == 2 * 2 * 5 and "argmax" not in costs
    assert costs["keep_queries"].bytes == 2 * 2 * 3 * 4 and costs["keep_residual"].bytes == 2 * 2 * 3 * 4


def test_a_step_without_logits_reads_no_vocabulary(small):
    costs = {cost.name: cost for cost in step_costs(small, StepShape(rows=((8, 8),), num_logits=0))}
    assert costs["lm_head"][3:] == (0, 0) and costs["gather_rows"][3:] == (0, 0)
    assert "argmax" not in costs and "keep_queries" not in costs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [{}, dict(attention_bias=True), dict(mlp_bias=True)], ids=str)
def test_the_weights_that_a_step_reads_are_those_of_the_checkpoint(tiny_model, tied, biases):
    """Over all linear layers and norms of one token's step, biases too; the embedding is read by the row."""
    config = dataclasses.replace(ModelConfig.from_folder(tiny_model), tie_word_embeddings=tied, **biases)

    def weights_read(tokens):
        costs = step_costs(config, StepShape(((1, 1),) * tokens, tokens))
        return sum(cost.bytes for cost in costs if cost.operation in ("linear", "rms_norm", "add_rms_norm"))

    total = 2 * sum(int(np.prod(shape)) for name, shape in expected_tensors(config).items() if "embed" not in name)
    if config.tie_word_embeddings:
        total += 2 * config.vocab_size * config.hidden_size
    assert 2 * weights_read(1) - weights_read(2) == total  # what does not grow with the tokens


# ---- profiled steps ----


OPTIONS = {"compiled": {}, "eager": dict(enforce_eager=True),
           "chunked": dict(max_num_batched_tokens=16, max_num_seqs=8),
           "no cache": dict(use_kv_cache=False, enable_prefix_caching=False)}


def run(llm, profile, params, watch=False):
    """(tokens by request, profiles of the steps)."""
    if watch:
        llm.probe.watch("long")
    llm.engine.add_request(PROMPT, params, "long")
    llm.engine.add_request(PROMPT[3:9], params, "short")
    tokens, profiles = {}, []
    while llm.engine.has_unfinished_requests():
        if profile:
            llm.probe.profile_next_step()
        tokens.update({output.request_id: output.outputs[0].token_ids for output in llm.engine.step()})
        profiles.append(llm.probe.last_profile)
    return tokens, profiles


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("watch", [False, True], ids=["", "watched"])
def test_a_profiled_step_gives_the_same_tokens_and_lists_every_operation(make_llm, options, params, watch):
    expected, _ = run(make_llm(**options), False, params)
    llm = make_llm(**options)
    tokens, profiles = run(llm, True, params, watch)
    assert tokens == expected and len(profiles) == len({id(profile) for profile in profiles})
    if watch:
        assert llm.probe.kept and llm.probe.attention(llm.probe.kept[-1:]).sum() > 0
    for profile in profiles:
        names = [operation[0] for operation in profile.operations]
        assert names[0] == "embedding" and "lm_head" in names
        layers = [operation[1] for operation in profile.operations if operation[0] == "attention"]
        assert layers == list(range(llm.model_config.num_hidden_layers))
        assert all(isinstance(value, int) and value >= 0 for operation in profile.operations for value in operation[2:])
        assert sum(operation[2] for operation in profile.operations) > 1000  # ns
    assert any(name == "sample" for profile in profiles for name, *_ in profile.operations) == (params is SAMPLED)
    assert any(name == "keep_queries" for profile in profiles for name, *_ in profile.operations) == watch
    assert profiles[0].about["tokens"] == (16 if "max_num_batched_tokens" in options else len(PROMPT) + 6)


def test_only_one_step_is_profiled_and_one_event_tells_of_it(make_llm):
    llm = make_llm()
    events = EventLog()
    llm.engine.listen(events)
    llm.engine.add_request(PROMPT, GREEDY)
    llm.engine.step()
    assert llm.probe.last_profile is None
    llm.probe.profile_next_step()
    llm.engine.step()
    profile = llm.probe.last_profile
    llm.engine.step()
    assert llm.probe.last_profile is profile and llm.runner.profiler is None
    told = [event for event in events.read()[0] if event.kind == "step_profiled"]
    assert len(told) == 1 and told[0].step == 2
    assert (told[0].a, told[0].b) == profile and json.loads(json.dumps(told[0].a)) == told[0].a
    assert profile.about == {"device": profile.about["device"], "clock": "time.perf_counter_ns", "tokens": 1,
                             "requests": 1}
    costs = step_costs(llm.model_config, StepShape(((1, len(PROMPT) + 1),), 1))
    assert [operation[:2] + operation[3:] for operation in profile.operations] == [
        [cost.name, cost.layer, cost.bytes, cost.flops] for cost in costs]


def test_the_time_of_an_operation_is_counted_as_its_own(make_llm, monkeypatch):
    """One operation is made slow: that one, and no other, takes long."""
    llm = make_llm()
    llm.engine.add_request(PROMPT, GREEDY)

    def slow(*arguments):
        time.sleep(0.02)
        return silu_mul(*arguments)

    operations = llm.runner.backend.operations
    silu_mul = operations["silu_mul"]
    monkeypatch.setattr(llm.runner.backend, "operations", {**operations, "silu_mul": slow})
    llm.probe.profile_next_step()
    llm.engine.step()
    times = {name: ns for name, _, ns, *_ in llm.probe.last_profile.operations}
    assert times.pop("silu_mul") > 19e6
    assert sorted(times.values())[-2] < 15e6  # one may have been interrupted


def test_a_step_that_fails_under_the_profiler_is_run_again_without(make_llm, monkeypatch):
    llm = make_llm()
    llm.engine.add_request(PROMPT, GREEDY, "it")
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.backend, "operations", {**llm.runner.backend.operations, "rope": None})
        llm.probe.profile_next_step()
        with pytest.raises(TypeError):
            llm.engine.step()
    tokens = []
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            tokens = output.outputs[0].token_ids
    assert llm.probe.last_profile is None
    assert tokens == make_llm().generate([PROMPT], GREEDY)[0].outputs[0].token_ids


def test_the_cost_model_lists_what_the_forward_pass_does(small):
    """So that a change of model/llama.py is noticed here, and not by a profile that does not add up."""
    called = []
    ops = {name: (lambda *_, name=name: called.append(name)) for name in llama.OP_NAMES}
    assert set(llama.OP_NAMES) <= set(numpy_backend.OPS)
    weights = llama.Weights(*[np.zeros((4, 8), np.uint16)] * len(llama.Weights._fields))
    zeros = np.zeros((1, 8), np.uint16)
    batch = llama.Batch(*[np.zeros(1, np.int32)] * 7, num_decodes=1,
                        watch=llama.Watch(zeros, zeros, np.zeros(1, np.int32)))
    llama.bind(ops)(weights, llama.KVCache(np.zeros((4, 1)), np.zeros((4, 1))), batch, llama.Buffers(*[zeros] * 8),
                    llama.Dims(small.num_hidden_layers, 2, 1, 2, 4, 1.0, 1e-5))
    costs = step_costs(small, StepShape(((1, 1),), 1, num_kept=1))
    assert called == [cost.operation for cost in costs][:-1]  # the last is the choice of the token
    assert all(isinstance(cost, OperationCost) for cost in costs)


# ---- the roofs ----


def test_the_roofs_of_this_machine_are_measured_once_and_make_sense():
    start = time.perf_counter()
    found = ceilings("cpu")
    first = time.perf_counter() - start
    assert ceilings("cpu") is found and first < 30
    # An independent look: a copy reads and writes, so reading is at least half of it, and at most some times more.
    block = np.ones(1 << 26, np.uint8)
    copy = np.empty_like(block)
    copied = best_rate(block.nbytes, lambda repetitions: [np.copyto(copy, block) for _ in range(repetitions)])
    assert 0.3 * copied < found.bandwidth < 50 * copied
    assert found.bandwidth <= found.cache_bandwidth < 1e13
    assert 1e9 < found.peak < 1e14 and found.arithmetic and found.device


def test_a_real_product_stays_below_the_peak_and_comes_near_it():
    from tinyvllm.kernels.cpu_backend import OPS, exclusive
    from tinyvllm.kernels.gemm.packing import pack_linear

    x, weight = np.full((64, 512), 0x3F80, np.uint16), pack_linear(np.full((2048, 512), 0x3F80, np.uint16))
    out, no_bias = np.empty((64, 2048), np.uint16), np.empty(0, np.uint16)

    def products(repetitions):
        with exclusive():
            for _ in range(repetitions):
                OPS["linear"](out, x, weight, no_bias)

    rate = best_rate(2 * 64 * 512 * 2048, products)
    # Generous both ways: other programs may run in one of the two measurements and not in the other.
    assert 0.02 < rate / ceilings("cpu").peak < 3


def test_the_roofline_is_the_lower_of_two_roofs():
    roofs = Ceilings("a machine", bandwidth=10.0, cache_bandwidth=50.0, peak=100.0, arithmetic="")
    assert roofs.attainable(flops=20, num_bytes=10) == 20 and roofs.attainable(flops=200, num_bytes=10) == 100
    assert roofs.attainable(flops=0, num_bytes=10) == 0 and roofs.attainable(flops=1, num_bytes=0) == 100


def test_ceilings_of_what_is_no_device_are_refused():
    with pytest.raises(ConfigError, match='of "cpu" or "cuda", got \'tpu\''):
        ceilings("tpu")


def test_the_probe_asks_for_the_roofs_of_its_own_device(make_llm):
    assert make_llm().probe.ceilings() is ceilings("cpu")
