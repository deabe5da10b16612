"""The probe on a GPU: its kernels against their NumPy twins, and on a running engine against what it computed."""

import time

import numpy as np
import pytest

from tests.kernel_cases import fresh_rng, poisoned, random_bf16
from tests.model_files import write_tiny_model
from tests.probe_case import exact_attention
from tests.test_probe_kernels import rows_case
from tinyvllm import LLM, SamplingParams
from tinyvllm.bench.ceilings import ceilings
from tinyvllm.engine.events import EventLog
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.probe import ProbeError

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(), reason="needs a GPU")]

cuda = cuda_support.cuda
PROMPT = [(7 * i) % 300 + 3 for i in range(37)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MATRIX, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("gpu-probe") / "model")


def make_llm(folder, **options):
    return LLM(folder, device="cuda", use_tqdm=False, **{"num_blocks": 128, "max_num_seqs": 16,
                                                         "max_num_batched_tokens": 256, **options})


def run(llm, until=None, watch=True):
    """{request_id: tokens} of PROMPT as "it", watched, beside another."""
    if watch:
        llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.add_request(PROMPT[4:20], GREEDY, "other")
    tokens = {}
    while llm.engine.has_unfinished_requests():
        tokens.update({output.request_id: output.outputs[0].token_ids for output in llm.engine.step()})
        if until is not None:
            until(llm)
    return tokens


# ---- kernels ----


def test_rows_are_kept_at_their_positions(rng):
    from tinyvllm.kernels.keep_rows import keep_rows_cuda, keep_rows_numpy

    source, kept = random_bf16(rng, 300, 700), poisoned(2, 400, 512)
    device = cuda.to_device(kept)
    keep_rows_cuda(device, 1, cuda.to_device(source), np.empty(0, np.int32))
    np.testing.assert_array_equal(device.copy_to_host(), kept)
    for first, count in ((3, 1), (20, 257), (0, 300)):
        positions = np.full(300, -1, np.int32)
        positions[first:first + count] = np.arange(90, 90 + count)
        keep_rows_numpy(kept, 1, source, positions)
        keep_rows_cuda(device, 1, cuda.to_device(source), cuda.to_device(positions))
        np.testing.assert_array_equal(device.copy_to_host(), kept)


@pytest.mark.parametrize("shape", [(4, 2, 8, 4, 37), (32, 8, 64, 16, 1500), (8, 1, 128, 32, 129), (5, 5, 80, 16, 1)],
                         ids=str)
def test_attention_rows_and_their_bytes(rng, shape):
    from tinyvllm.kernels.attention.pool import pool_uint8_cuda, pool_uint8_numpy
    from tinyvllm.kernels.attention.rows import attention_rows_cuda, attention_rows_numpy

    num_heads, _, head_dim, _, context = shape
    queries, k_cache, table = rows_case(rng, *shape)
    numbers = [np.array(x, np.int32) for x in ([1, 0], range(num_heads), sorted({0, context // 2, context - 1}))]
    outs = [np.full((2, num_heads, len(numbers[2]), columns), np.nan, np.float32) for columns in (context, 2)]
    device = [cuda.to_device(x) for x in outs]
    attention_rows_numpy(*outs, queries, k_cache, table, *numbers, head_dim**-0.5)
    attention_rows_cuda(*device, *map(cuda.to_device, (queries, k_cache, table, *numbers)), head_dim**-0.5)
    for got, expected in zip(device, outs):
        np.testing.assert_allclose(got.copy_to_host(), expected, rtol=2e-5, atol=1e-12)
    weights = device[0].copy_to_host().reshape(-1, context)
    for width in {context, max(1, context // 9)}:
        expected, got = np.zeros((len(weights), width), np.uint8), cuda.device_array((len(weights), width), np.uint8)
        pool_uint8_numpy(expected, weights)
        pool_uint8_cuda(got, device[0].reshape(*weights.shape))
        np.testing.assert_array_equal(got.copy_to_host(), expected)


# ---- a running engine ----


@pytest.mark.parametrize("options", [{}, dict(max_num_batched_tokens=16, max_num_seqs=8), dict(block_size=4),
                                     dict(enforce_eager=True)], ids=str)
def test_looking_changes_no_token_and_shows_what_was_computed(folder, options):
    expected = run(make_llm(folder, **options), watch=False)
    llm = make_llm(folder, **options)
    checked = []

    def check(llm):
        probe, watch = llm.probe, llm.runner.watch
        if not probe.kept:
            return
        rows = [probe.kept[0], probe.kept[-1]]
        weights = probe.attention(rows)
        queries = watch.queries.copy_to_host()
        for layer in range(weights.shape[0]):
            for head in (0, weights.shape[1] - 1):
                for r, row in enumerate(rows):
                    exact, k, v = exact_attention(llm, queries, watch.block_ids, layer, head, row)
                    np.testing.assert_allclose(weights[layer, head, r, :row + 1], exact, rtol=2e-5, atol=1e-12)
        cell = probe.attention_cell(1, 3, rows[1], 0)
        assert cell["weight"] == weights[1, 3, 1, 0]
        np.testing.assert_allclose(cell["exp"] / cell["denominator"], cell["weight"], rtol=1e-5)
        np.testing.assert_array_equal(probe.attention_uint8(rows),
                                      np.floor(weights.astype(np.float64) * 255 + 0.5).astype(np.uint8))
        np.testing.assert_array_equal(float32_to_bf16(probe.hidden(rows[0])[0]),
                                      probe.weight("model.embed_tokens.weight", watch.request.token_ids[rows[0]])[0])
        if (top := probe.top("it", 4)) is not None and llm.runner.last_sampled:
            assert top[0][0] == watch.request.token_ids[-1]
            ids, logits, _ = probe.logit_lens(probe.kept[-1], 4)
            # The lens has its own number of rows, and so perhaps another matrix kernel: the last bit may differ.
            np.testing.assert_allclose(logits[-1], top[1], rtol=2**-7, atol=2**-7)
        checked.append(rows)

    assert run(llm, check) == expected
    assert len(checked) >= 12 and llm.probe.attention([], [0]).shape[2] == 0
    with pytest.raises(ProbeError, match="not there"):
        llm.probe.attention([10**6])


def test_kept_rows_are_those_of_the_cpu_backend_up_to_bfloat16(folder):
    gpu, cpu = make_llm(folder), LLM(folder, device="cpu", use_tqdm=False, num_blocks=128)
    for llm in (gpu, cpu):
        llm.probe.watch("it")
        llm.engine.add_request(PROMPT, GREEDY, "it")
        llm.engine.step()
    for position in (0, 20, 36):
        ours, theirs = gpu.probe.hidden(position), cpu.probe.hidden(position)
        assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
    ours, theirs = gpu.probe.attention(range(37)), cpu.probe.attention(range(37))
    assert np.abs(ours - theirs).mean() < 1e-3 and (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.98


def test_weights_are_read_patched_and_restored(folder):
    llm, cpu = make_llm(folder), LLM(folder, device="cpu", use_tqdm=False, num_blocks=128)
    probe = llm.probe
    assert probe.weight_names() == cpu.probe.weight_names()
    for name in probe.weight_names():
        np.testing.assert_array_equal(probe.weight(name), cpu.probe.weight(name))
    np.testing.assert_array_equal(probe.weight(MATRIX, slice(3, 40, 5), [7, 1]), probe.weight(MATRIX)[3:40:5, [7, 1]])
    assert probe.weight(MATRIX, slice(0, 0)).shape == (0, 64)
    before = {name: probe.weight(name) for name in probe.weight_names()}
    plain = run(llm, watch=False)
    for name, row, column in ((MATRIX, 9, 63), (NORM, 5, None), ("model.embed_tokens.weight", 3, 0)):
        assert probe.set_weight(name, row, column, 0x42C8) == probe.patches[-1].old
    changed = [name for name in before if not np.array_equal(probe.weight(name), before[name])]
    assert len(changed) == 3 and sum((probe.weight(name) != before[name]).sum() for name in changed) == 3
    assert probe.weight(MATRIX, 9, 63) == probe.weight(NORM, 5) == 0x42C8
    assert run(llm, watch=False) != plain
    probe.restore()
    assert all(np.array_equal(probe.weight(name), before[name]) for name in before)
    assert run(llm, watch=False) == plain


def test_a_profiled_step_is_timed_by_the_gpu_and_not_by_the_launches(folder):
    expected = run(make_llm(folder), watch=False)
    llm = make_llm(folder)
    events = EventLog()
    llm.engine.listen(events)
    profiles = []

    def profile(llm):
        if llm.probe.last_profile is not None and llm.probe.last_profile not in profiles:
            profiles.append(llm.probe.last_profile)
        llm.probe.profile_next_step()

    assert run(llm, profile, watch=False) == expected and len(profiles) > 8
    assert sum(event.kind == "step_profiled" for event in events.read()[0]) == len(profiles)
    assert profiles[0].about["clock"] == "CUDA events" and profiles[0].about["device"] == cuda_support.device_name()
    times = np.array([[operation[2] for operation in profile.operations] for profile in profiles[1:]])
    print("median ns:", dict(zip([f"{o[0]} {o[1]}" for o in profiles[1].operations], np.median(times, axis=0))))
    assert (times > 0).all()
    # Launching a kernel from Python takes 20 microseconds and more; these kernels take a few.
    assert np.median(times) < 12_000


def test_the_roofs_of_this_gpu_are_plausible():
    start = time.perf_counter()
    found = ceilings("cuda")
    print(found, f"{time.perf_counter() - start:.2f} s")
    assert 1e11 < found.bandwidth <= found.cache_bandwidth < 1e14 and 1e13 < found.peak < 1e16
    from tinyvllm.bench.ceilings import best_rate
    from tinyvllm.kernels.gemm.cuda import linear_cuda

    weight, x, out = (cuda.device_array(shape, np.uint16) for shape in ((65536, 4096), (1, 4096), (1, 65536)))

    def products(repetitions):
        for _ in range(repetitions):
            linear_cuda(out, x, weight, np.empty(0, np.uint16))
        cuda.synchronize()

    rate = best_rate(2 * 65536 * 4096, products)
    print(f"gemv reads {rate / 1e9:.0f} GB/s, the roof is {found.bandwidth / 1e9:.0f}")
    assert 0.3 * found.bandwidth < rate < 1.15 * found.bandwidth


def test_what_watching_and_looking_cost(folder):
    """Figures for the reader, at the width of Llama 3.2 1B: 16 layers, 32 heads of 64, 1024 tokens."""
    from tinyvllm.kernels.attention.rows import attention_rows_cuda
    from tinyvllm.kernels.keep_rows import keep_rows_cuda

    queries, k_cache = cuda.device_array((16, 1024, 2048), np.uint16), cuda.device_array((16, 64, 8, 16, 64), np.uint16)
    queries.copy_to_device(np.full(queries.shape, 0x3C00, np.uint16))
    k_cache.copy_to_device(np.full(k_cache.shape, 0x3C00, np.uint16))
    table, layers, heads = (cuda.to_device(np.arange(n, dtype=np.int32)) for n in (64, 16, 32))
    source, row = cuda.device_array((1, 3072), np.uint16), cuda.to_device(np.array([5], np.int32))
    nothing = np.empty(0, np.int32)
    for name, rows in (("newest", [1023]), ("sixty-four", list(range(0, 1024, 16)))):
        out = cuda.device_array((16, 32, len(rows), 1024), np.float32)
        statistics = cuda.device_array((16, 32, len(rows), 2), np.float32)
        numbers = cuda.to_device(np.array(rows, np.int32))
        took = []
        for _ in range(5):
            cuda.synchronize()
            start = time.perf_counter()
            attention_rows_cuda(out, statistics, queries, k_cache, table, layers, heads, numbers, 0.125)
            cuda.synchronize()
            took.append(1e6 * (time.perf_counter() - start))
        print(f"attention rows, {name}: {min(took):.0f} us")
        np.testing.assert_allclose(out.copy_to_host().sum(-1), 1, rtol=1e-4)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        for layer in range(16):
            keep_rows_cuda(queries, layer, source, row)
        took.append(1e6 * (time.perf_counter() - start) / 16)
    cuda.synchronize()
    print(f"keep_rows, launched from Python: {min(took):.1f} us; unwatched: ", end="")
    start = time.perf_counter()
    for _ in range(10_000):
        keep_rows_cuda(queries, 0, source, nothing)
    unwatched = (time.perf_counter() - start) / 10_000
    print(f"{1e9 * unwatched:.0f} ns")
    assert unwatched < 5e-6
