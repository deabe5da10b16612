"""The fused operations, the driver's launches and graphs on a GPU: against NumPy twins, and against eager steps."""

import numpy as np
import pytest

from tests.forward_case import forward_case, run_forward
from tests.gpu.arrays import to_device
from tests.kernel_cases import assert_close, attention_case, fresh_rng, poisoned, random_bf16, sampling_case, ulps
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.argmax import argmax_numpy
from tinyvllm.kernels.fused import numpy_twin
from tinyvllm.kernels.fused.take_sampled import take_sampled_numpy
from tinyvllm.model import llama, llama_fused

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(),
                                 reason="needs a GPU")]
ROWS = [1, 2, 3, 5, 8, 9, 33, 64, 130, 256, 300]


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(scope="module", params=[None, False], ids=["best", "sm_80"])
def fused(request):
    """The kernels for this GPU, and those that any GPU from compute capability 8.0 on can run."""
    from tinyvllm.kernels.driver import Stream
    from tinyvllm.kernels.fused.operations import FusedOperations

    cuda_support.cuda.current_context()
    return FusedOperations(Stream(), hopper=request.param)


def run_both(fused, name, outs, *arguments):
    """(GPU results, twin results) of the arrays in `outs`."""
    device_outs = [to_device(x) for x in outs]
    getattr(fused, name)(*device_outs, *(to_device(x) if isinstance(x, np.ndarray) else x for x in arguments))
    fused.stream.synchronize()
    host_outs = [x.copy() for x in outs]
    twins = {**numpy_twin.OPS, "argmax": argmax_numpy, "take_sampled": take_sampled_numpy}
    twins[name](*host_outs, *(x.copy() if isinstance(x, np.ndarray) else x for x in arguments))
    return [x.copy_to_host() for x in device_outs], host_outs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden, outputs", [(64, 40), (200, 72), (2048, 2048), (8192, 2048), (4096, 1000),
                                             (1000, 520)])
def test_linear_add(rng, fused, rows, hidden, outputs):
    residual, x = random_bf16(rng, rows, outputs), random_bf16(rng, rows, hidden)
    weight = random_bf16(rng, outputs, hidden, scale=hidden**-0.5)
    (got, _), (expected, _) = run_both(fused, "linear_add", (residual, poisoned(rows, outputs)), x, weight)
    assert_close(got, expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden, inner", [(64, 96), (200, 72), (2048, 8192), (512, 1016)])
def test_norm_gate_up(rng, fused, rows, hidden, inner):
    residual, norm = random_bf16(rng, rows, hidden, scale=3), random_bf16(rng, hidden)
    weight = random_bf16(rng, 2 * inner, hidden, scale=hidden**-0.5)
    outs = poisoned(rows, inner), poisoned(rows, 2 * inner), poisoned(rows, hidden)
    got, expected = run_both(fused, "norm_gate_up", outs, residual, norm, weight, 1e-5)
    assert_close(got[0], expected[0], relative=6e-3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [(4, 2, 32), (32, 8, 64), (6, 2, 80), (8, 1, 128)], ids=str)
@pytest.mark.parametrize("hidden", [96, 2048])
def test_norm_qkv_rope_write(rng, fused, rows, heads, hidden):
    num_heads, num_kv_heads, head_dim = heads
    width, block_size = (num_heads + 2 * num_kv_heads) * head_dim, 16
    residual, norm = random_bf16(rng, rows, hidden, scale=3), random_bf16(rng, hidden)
    weight = random_bf16(rng, width, hidden, scale=hidden**-0.5)
    slots = rng.permutation(20 * block_size)[:rows].astype(np.int32)
    slots[rows // 2] = -1
    angles = rng.uniform(0, 6, (9000, head_dim // 2))
    cos_sin = random_bf16(rng, 1, 1)
    from tinyvllm.kernels.bf16 import float32_to_bf16

    cos_sin = float32_to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    caches = [poisoned(20, num_kv_heads, block_size, head_dim) for _ in range(2)]
    outs = poisoned(rows, width), *caches, poisoned(rows, hidden)
    got, expected = run_both(fused, "norm_qkv_rope_write", outs, residual, norm, weight,
                             rng.integers(0, 9000, rows).astype(np.int32), slots, cos_sin, 1e-5, *heads, block_size)
    queries = num_heads * head_dim
    assert_close(got[0][:, :queries], expected[0][:, :queries], relative=6e-3)
    for cache, wanted in zip(got[1:3], expected[1:3]):
        written = np.zeros((20, block_size), bool)
        written[np.divmod(slots[slots >= 0], block_size)] = True
        written = np.broadcast_to(written[:, None, :, None], cache.shape)
        np.testing.assert_array_equal(cache[~written], wanted[~written])
        if written.any():
            assert_close(cache[written], wanted[written], relative=6e-3)


SHAPES = [(64, 16, 11, 4, 1, 1), (64, 64, 6, 2, 2, 1), (64, 32, 4, 1, 4, 1), (64, 128, 6, 1, 1, 1),
          (64, 128, 6, 2, 4, 1), (128, 128, 3, 4, 2, 2), (128, 128, 6, 4, 1, 1), (192, 192, 4, 1, 1, 1),
          (128, 192, 5, 4, 2, 1), (128, 256, 4, 1, 2, 1), (128, 256, 4, 8, 1, 1)]


@pytest.mark.parametrize("rows", [13, 128, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_whose_sums_are_split_and_whose_x_is_shared(rng, fused, monkeypatch, shape, rows):
    """Every way of working in clusters, also those that no size chooses today. The last tiles are not full."""
    from tinyvllm.kernels.gemm import skinny

    if not fused.hopper:
        pytest.skip("clusters are of compute capability 9.0")
    monkeypatch.setattr(skinny, "choose_shape", lambda *sizes: shape)
    residual, x = random_bf16(rng, rows, 840), random_bf16(rng, rows, 1096)
    weight = random_bf16(rng, 840, 1096, scale=1096**-0.5)
    (got, _), (expected, _) = run_both(fused, "linear_add", (residual, poisoned(rows, 840)), x, weight)
    assert_close(got, expected)
    test_norm_gate_up(rng, fused, rows, 712, 1016)
    test_norm_qkv_rope_write(rng, fused, rows, (10, 3, 64), 712)


@pytest.mark.parametrize("rows, wanted", [(1, 1), (8, 8), (30, 3), (30, 12), (8, 0), (300, 100), (300, 300)])
def test_norm_logits_takes_the_rows_asked_for(rng, fused, rows, wanted):
    residual, norm = random_bf16(rng, rows, 256), random_bf16(rng, 256)
    weight, indices = random_bf16(rng, 1000, 256, scale=1 / 16), rng.permutation(rows)[:wanted].astype(np.int32)
    outs = poisoned(wanted, 1000), poisoned(wanted, 256)
    got, expected = run_both(fused, "norm_logits", outs, residual, indices, norm, weight, 1e-5)
    if wanted:
        assert_close(got[0], expected[0], relative=6e-3)


def test_the_norm_gives_the_same_bits_for_few_and_for_many_rows(rng, fused):
    """An identity for a weight shows the normalised rows of the fused kernel."""
    hidden = 2048
    residual, norm = random_bf16(rng, 9, hidden, scale=3), random_bf16(rng, hidden)
    identity = np.where(np.eye(hidden, dtype=bool), np.uint16(0x3F80), np.uint16(0))
    indices = np.arange(9, dtype=np.int32)
    whole = run_both(fused, "norm_logits", (poisoned(9, hidden), poisoned(9, hidden)), residual, indices, norm,
                     identity, 1e-5)[0]
    np.testing.assert_array_equal(whole[0], whole[1])
    for rows in (1, 2, 4, 8):
        few = run_both(fused, "norm_logits", (poisoned(rows, hidden), poisoned(rows, hidden)), residual[:rows],
                       indices[:rows], norm, identity, 1e-5)[0]
        np.testing.assert_array_equal(few[0], whole[0][:rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width, pitch", [(40, 40), (200, 264), (2048, 3072), (4096, 4096)])
def test_keep_rows(rng, fused, rows, width, pitch):
    source, kept = random_bf16(rng, rows, pitch), poisoned(3, rows + 7, width)
    positions = rng.permutation(rows + 7)[:rows].astype(np.int32)
    positions[rng.random(rows) < 0.5] = -1
    for kept_at in (positions, np.full(rows, -1, np.int32), positions[:0]):
        (got,), (expected,) = run_both(fused, "keep_rows", (kept,), 1, source, kept_at)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows", [1, 255, 256, 300])
def test_take_sampled(rng, fused, rows):
    ids, sampled = rng.integers(0, 1000, rows).astype(np.int32), rng.integers(0, 1000, rows).astype(np.int32)
    late = rng.random(rows) < 0.5
    ids[late] = -1 - rng.permutation(rows)[late]
    for some in (ids, np.abs(ids), np.full(rows, -rows, np.int32)):
        (got,), (expected,) = run_both(fused, "take_sampled", (some.astype(np.int32),), sampled)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("vocab_size", [40, 2048, 128256])
@pytest.mark.parametrize("rows", [6, 64])
def test_argmax_in_parts(rng, fused, vocab_size, rows):
    logits = sampling_case(rng, rows, vocab_size)[0]
    (got,), (expected,) = run_both(fused, "argmax", (np.full(rows, -7, np.int32),), logits)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("heads", [(8, 2, 64), (32, 8, 64), (3, 1, 80), (4, 2, 128)], ids=str)
def test_attention_with_split_contexts_and_rows_without_any(rng, fused, heads):
    contexts = [1, 17, 700, 256, 257, 5, 64, 65, 300, 3000]
    case = list(attention_case(rng, *heads, 16, contexts, [1, 1, 1, 1, 1, 5, 64, 30, 1, 129]))
    (got,), (expected,) = run_both(fused, "attention", (poisoned(234, heads[0] * heads[2]),), *case)
    assert_close(got, expected)
    case = list(attention_case(rng, *heads, 16, [2000, 40, 300, 16], [1, 1, 1, 1]))
    case[4] = case[4].copy()
    case[4][[1, 3]] = 0  # padding rows of a graph
    out = poisoned(4, heads[0] * heads[2])
    got = run_both(fused, "attention", (out,), *case[:4], np.array([2000, 40, 300, 16], np.int32), *case[5:])[1][0]
    device_out = to_device(out)
    fused.attention(device_out, *(to_device(x) if isinstance(x, np.ndarray) else x for x in case))
    fused.stream.synchronize()
    padded = device_out.copy_to_host()
    assert_close(padded[[0, 2]], got[[0, 2]])
    np.testing.assert_array_equal(padded[[1, 3]], out[[1, 3]])


@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 2, 80), (8, 1, 32)], ids=str)
@pytest.mark.parametrize("rows, contexts", [((1, 1, 9, 3), (6, 11, 9, 7)), ((1, 1, 1), (5, 9, 2)), ((60, 1), (60, 3))])
def test_the_fused_forward_pass_matches_the_twins(rng, fused, heads, rows, contexts):
    from tinyvllm.kernels.numpy_backend import OPS as NUMPY_OPS

    weights, *rest = forward_case(rng, *heads, rows=rows, contexts=contexts)
    weights = weights._replace(qkv_bias=weights.o_bias)
    expected, expected_k = run_forward((weights, *rest), NUMPY_OPS, lambda x: x.copy(), lambda x: x, llama.bind)
    logits, k = run_forward((weights, *rest), fused.table, to_device, lambda x: x.copy_to_host(), llama_fused.bind)
    assert_close(k, expected_k, relative=2e-2)
    assert_close(logits, expected, relative=2e-2)


def test_a_graph_replays_what_was_captured_with_new_inputs(rng, fused):
    x, weight = random_bf16(rng, 4, 256), random_bf16(rng, 512, 256, scale=1 / 16)
    device_x, device_weight = to_device(x), to_device(weight)
    out, scratch = to_device(poisoned(4, 512)), to_device(poisoned(4, 512))
    zero = np.zeros((4, 512), np.uint16)
    out.copy_to_device(zero)
    fused.linear_add(out, scratch, device_x, device_weight)
    with fused.stream.capture() as captured:
        fused.linear_add(out, scratch, device_x, device_weight)
    for _ in range(3):
        x = random_bf16(rng, 4, 256)
        device_x.copy_to_device(x)
        out.copy_to_device(zero)
        captured.graph.launch(fused.stream)
        fused.stream.synchronize()
        expected = zero.copy()
        numpy_twin.OPS["linear_add"](expected, poisoned(4, 512), x, weight)
        assert_close(out.copy_to_host(), expected)


def test_device_arrays_slice_as_numpy_does(rng):
    host = random_bf16(rng, 6, 4, 8)
    array = to_device(host)
    for index in (0, 5, -1, slice(2, 5), slice(None, 3), slice(4, None), slice(3, 3)):
        np.testing.assert_array_equal(array[index].copy_to_host(), host[index])
    np.testing.assert_array_equal(array[1][2:].copy_to_host(), host[1][2:])
    np.testing.assert_array_equal(array[2:4].reshape(2, 32).copy_to_host(), host[2:4].reshape(2, 32))
    assert ulps(host, host) == 0
    with pytest.raises(IndexError):
        array[6]
    with pytest.raises(ValueError):
        array.reshape(5, 5)
