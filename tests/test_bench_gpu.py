"""The parts of the GPU's benchmark, without a GPU: what they launch, and that they say what they measured.

Whole-engine parts run on the CPU backend, kernels and peers on stand-ins in host memory. Figures mean nothing here.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.bench_stand_ins import TINY, HostBackend, HostEvent, HostPeer, view
from tinyvllm.bench import gpu_engine, gpu_kernels, gpu_peers, gpu_timing
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.gpu_model import Bench, Sizes
from tinyvllm.bench.gpu_roofline import cost
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.model.config import ModelConfig
from tinyvllm.runner.cpu import CPUBackend

SIZES = Sizes(block_size=16, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256, num_blocks=64)


@pytest.fixture(scope="module")
def engine_bench():
    return Bench(TINY, backend=CPUBackend(), sizes=SIZES)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(gpu_timing, "Event", HostEvent)
    return Bench(TINY, backend=HostBackend(), sizes=SIZES)


@pytest.fixture
def peer():
    """torch belongs to the bench only where it is there."""
    pytest.importorskip("torch")
    return HostPeer()


def collected(figures):
    found = dict(figures)
    for label, values in found.items():
        assert not isinstance(values, Exception), (label, values)
        assert values and all(np.isfinite(values)), label
    return found


def test_engine_parts_give_a_figure_a_round_and_end_every_request(engine_bench):
    found = collected(figure for part in (
        gpu_engine.decode(engine_bench, 2, batches=(1, 3), prompt=5, new=6),
        gpu_engine.long_decode(engine_bench, 2, prompt=5, new=12),
        gpu_engine.ttft(engine_bench, 2, lengths=(7,)),
        gpu_engine.served(engine_bench, 2, batches=(4,), prompt=9, new=5),
        gpu_engine.workload(engine_bench, 4, requests=5, shortest=3, longest=20),
        gpu_engine.prefill(engine_bench, 2, count=2, length=40),
        gpu_engine.sampling(engine_bench, 2, batches=(2,), prompt=4, new=6),
    ) for figure in part)
    assert {label: len(values) for label, values in found.items()} == {
        "decode, batch 1 (tokens/s)": 2, "decode, batch 3 (tokens/s)": 2, "decode, batch 1, 12 out (tokens/s)": 2,
        "TTFT, 7 tokens (ms)": 6, "served, batch 4 (tokens/s)": 2, "workload, 5 requests (tokens/s)": 2,
        "prefill, 2 x 40 (TFLOP/s)": 2, "sampled decode, batch 2 (tokens/s)": 2,
        "sampling over greedy, batch 2 (us a step)": 2}
    served = engine_bench.serve(engine_bench.prompts(3, 5), [4, 6, 8])
    assert served.tokens == 18 and 0 < served.first_token_s < served.seconds
    assert served.rate == 18 / served.seconds


def test_a_step_ahead_is_switched_on_for_its_figures_and_put_back(engine_bench, monkeypatch):
    runner, seen = engine_bench.runner, []
    serve = engine_bench.serve
    runner.runs_ahead = False
    # the CPU cannot: what counts here is which way was asked for
    monkeypatch.setattr(engine_bench, "serve", lambda *a, **k: (
        seen.append(runner.runs_ahead), setattr(runner, "runs_ahead", False), serve(*a, **k))[2])
    found = collected(gpu_engine.ahead(engine_bench, 2, batches=(2,), prompt=4, new=3, requests=3, longest=9))
    assert seen[:6] == [False, True] * 3 and seen[6]
    assert runner.runs_ahead is False and len(found) == 3


def test_batch_invariance_is_switched_on_for_its_figures_and_put_back(engine_bench, monkeypatch):
    with pytest.raises(RuntimeError, match="fused"):
        list(gpu_engine.invariant(engine_bench, 1))
    fused, seen = SimpleNamespace(batch_invariant=False), []
    monkeypatch.setattr(engine_bench.backend, "fused", fused, raising=False)

    def serve(*a, **k):
        seen.append(fused.batch_invariant)
        return SimpleNamespace(decode_rate=1.0, first_token_s=1.0)

    monkeypatch.setattr(engine_bench, "serve", serve)
    found = collected(gpu_engine.invariant(engine_bench, 2, batches=(2,), prompt=4, new=3, count=2, length=5))
    assert len(found) == 4 and seen == 6 * [False, True]
    assert fused.batch_invariant is False


def test_the_workload_is_the_one_that_other_engines_were_given():
    prompts, counts = gpu_engine.workload_requests(128256, 256, 100, 1024)
    assert len(prompts) == len(counts) == 256 and sum(counts) == 133_966
    assert {100 <= len(prompt) <= 1024 for prompt in prompts} == {True} and max(map(max, prompts)) == 10000


def test_flops_of_a_prefill_are_those_of_the_1b_model():
    """16 prompts of 1,024 tokens, counted by hand: 1.94 GFLOP a token in products, the rest attention and logits."""
    config = ModelConfig.from_dict(LLAMA_3_2_1B)
    layer = 3072 * 2048 + 2048 * 2048 + 16384 * 2048 + 2048 * 8192
    attention = 16 * sum(4 * 2048 * (position + 1) for position in range(1024)) * 16
    assert gpu_engine.prefill_flops(config, 16, 1024) == pytest.approx(
        2 * 16384 * 16 * layer + attention + 2 * 16 * 128256 * 2048)


def test_kernels_are_launched_for_every_layer_and_every_number_of_rows(bench):
    layers, stream = TINY["num_hidden_layers"], bench.backend.fused.stream
    found = collected(gpu_kernels.kernels(bench, 3, rows=(1, 8, 40)))
    names = ("qkv", "o", "gate_up", "down")
    expected = {f"kernel: {name}, batch {n} (us)" for name in names for n in (1, 8, 40)}
    expected |= {f"kernel: {name}, batch {n} (us)" for name in ("lm_head", "argmax") for n in (1, 8)}
    assert set(found) == expected and {len(values) for values in found.values()} == {3}
    assert stream.replays == len(expected) * 4, "one replay for nothing, then one a round"
    launches = gpu_kernels.layer_launches(bench, 8, *(gpu_kernels.put_numbers(bench, np.arange(8)) for _ in range(2)))
    graph = gpu_timing.capture(stream, lambda: [launches["qkv"](i) for i in range(layers)])
    weights = {arguments[6].address for _, arguments in graph.calls}
    assert len(weights) == layers, "each launch reads another layer's weights"


def test_a_kernel_that_fails_leaves_the_others_their_figures(bench):
    def broken(*arguments):
        raise RuntimeError("CUDA: launching a kernel failed")

    bench.backend.fused.norm_gate_up = broken
    found = dict(gpu_kernels.kernels(bench, 2, rows=(8,)))
    assert isinstance(found["kernel: gate_up, batch 8 (us)"], RuntimeError)
    assert all(len(found[f"kernel: {name}, batch 8 (us)"]) == 2 for name in ("qkv", "o", "down", "lm_head", "argmax"))


def test_an_eager_backend_has_no_single_kernels_to_measure(engine_bench, monkeypatch):
    monkeypatch.setattr(engine_bench.backend, "fused", None, raising=False)
    for part in (gpu_kernels.ceiling, gpu_kernels.kernels, gpu_kernels.decode_attention):
        with pytest.raises(RuntimeError, match="leave out --eager"):
            list(part(engine_bench, 1))
    with pytest.raises(RuntimeError, match="leave out --eager"):
        list(gpu_peers.products(engine_bench, 1, None))


def test_the_ceiling_is_the_best_of_several_grids(bench, monkeypatch):
    launched = []

    def launch(grid, threads, shared, stream, arguments):
        launched.append(grid[0])
        assert arguments[1] == bench.runner.kv_cache.k.address and arguments[3] == 1
        assert arguments[2] % (16 * 4 * 256) == 0 < arguments[2] <= bench.runner.kv_cache.k.nbytes

    kernel = SimpleNamespace(direct=SimpleNamespace(launch=launch))
    monkeypatch.setattr(gpu_kernels, "roofs", SimpleNamespace(UNROLL=4, THREADS=256, read_kernel=kernel))
    rates = iter([[9.0, 9.0], [2.0, 2.0], [5.0, 5.0]])
    monkeypatch.setattr(gpu_kernels, "graph_milliseconds", lambda stream, read, rounds: (read(), next(rates))[1])
    [(label, figures)] = gpu_kernels.ceiling(bench, 2)
    num_bytes = bench.runner.kv_cache.k.nbytes
    assert label == "ceiling: read (TB/s)" and figures == [num_bytes / 2.0 / 1e9] * 2
    assert launched == [32, 64, 128]


def test_decode_attention_counts_keys_and_values(bench):
    found = collected(gpu_kernels.decode_attention(bench, 2, cases=((2, 32), (4, 64))))
    for batch, context in ((2, 32), (4, 64)):
        label = f"kernel: decode attention, {batch} x {context} "
        num_bytes = 2 * 2 * batch * context * 2 * 32
        assert found[label + "(TB/s)"] == pytest.approx([num_bytes / us / 1e6 for us in found[label + "(us)"]])
        moved = cost(label + "(us)", bench.config)
        assert num_bytes < moved.num_bytes < 1.2 * num_bytes


def test_products_of_both_sides_are_the_same_and_timed_in_turn(bench, peer):
    found = collected(gpu_peers.products(bench, 3, peer, rows=(1, 8, 40)))
    assert len(found) == 2 * 5 * 3 and {len(values) for values in found.values()} == {3}


def test_without_torch_our_side_is_measured_alone(bench):
    found = collected([*gpu_peers.products(bench, 2, None, rows=(8,)),
                       *gpu_peers.prefill_attention(bench, 2, None, None, cases=((2, 48),))])
    assert set(found) == {"prefill attention, 2 x 48 (us)"} | {
        f"product: {name}, 8 rows (us)" for name in ("qkv", "o", "gate_up", "down", "lm_head")}


def test_a_product_that_is_not_the_product_gets_no_time(bench, peer):
    fused = bench.backend.fused
    right = fused._linear

    def wrong(out, x, weight):
        right(out, x, weight)
        fused.stream.run(lambda out: out.__setitem__((0, slice(0, 40)), 0), (out,))

    fused._linear = wrong
    found = dict(gpu_peers.products(bench, 2, peer, rows=(8,)))
    assert len(found) == 5 and all("differ from torch's" in str(error) for error in found.values())


def test_prefill_attention_of_both_sides_is_the_same(bench, peer, monkeypatch):
    monkeypatch.setattr(gpu_peers, "BACKENDS", ("CUDNN_ATTENTION", "MATH"))  # the CPU has no cuDNN
    notes = {}
    found = collected(gpu_peers.prefill_attention(bench, 2, peer, notes.__setitem__, cases=((2, 48), (1, 64))))
    assert set(found) == {f"{side}prefill attention, {shape} (us)" for side in ("", "torch: ")
                          for shape in ("2 x 48", "1 x 64")}
    assert set(notes.values()) == {"MATH"}, "what ran is what is named"


def test_prefill_attention_that_reads_other_pages_gets_no_time(bench, peer, monkeypatch):
    monkeypatch.setattr(gpu_peers, "BACKENDS", ("MATH",))
    right = bench.backend.fused.attention

    def wrong(out, qkv, k, v, tables, *rest):
        right(out, qkv, k, v, bench.backend.zeros(tables.shape, np.int32), *rest)

    bench.backend.fused.attention = wrong
    found = dict(gpu_peers.prefill_attention(bench, 2, peer, lambda *note: None, cases=((2, 48),)))
    assert "differ from torch's" in str(found["prefill attention, 2 x 48 (us)"])


def test_weights_and_activations_are_random_numbers_everywhere(bench):
    gpu_kernels.fill_buffers(bench)
    weights = bench.runner.weights
    for array in (weights.qkv, weights.lm_head, bench.runner.buffers.act, bench.runner.buffers.logits):
        values = bf16_to_float32(view(array)).reshape(-1)
        assert np.isfinite(values).all() and 0.4 < (values > 0).mean() < 0.6
        assert values[-100:].std() == pytest.approx(values.std(), rel=0.4)
    assert (bf16_to_float32(view(weights.final_norm)) == 1).all()
