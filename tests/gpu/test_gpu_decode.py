"""Decode attention straight into registers, on a GPU: against the NumPy twin at every edge, with every number of warps
that may be chosen, and against decode.py at sizes of use. tests/test_decode_attention.py does the smallest of these
without a GPU.
"""

import numpy as np
import pytest

from tests.gpu.arrays import to_device
from tests.kernel_cases import POISON, assert_close, attention_case, fresh_rng, poisoned, relative_error
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.attention import decode_registers
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.bf16 import bf16_to_float32

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated()
                                 or cuda_support.compute_capability() != (9, 0),
                                 reason="needs a GPU of compute capability 9.0")]
CONTEXTS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 700]
WARPS = [16, 8, 4, 2]
# (query heads, key heads, head_dim), warps: few of them more, for each is a kernel to compile
KERNELS = [*(((8, 2, 64), warps) for warps in WARPS), *(((8, 2, 128), warps) for warps in WARPS[1:]),
           ((4, 4, 64), 16), ((7, 1, 64), 2), ((12, 1, 64), 8), ((36, 2, 64), 4), ((8, 1, 128), 8)]


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(scope="module")
def fused():
    from tinyvllm.kernels.driver import Stream
    from tinyvllm.kernels.fused.operations import FusedOperations

    cuda_support.cuda.current_context()
    return FusedOperations(Stream(), hopper=True)


@pytest.fixture
def shape(monkeypatch):
    """shape(warps, part_keys): what choose_shape says from now on."""
    return lambda *chosen: monkeypatch.setattr(decode_registers, "choose_shape", lambda *sizes: chosen)


def attend(fused, case, times=1, rows_after=5):
    """The kernels' rows; those after them (so many that the neighbours' division of memory is always the same) have
    stayed as they were, and every part was written before it was read."""
    count, width = case[6], case[8] * case[10]
    out, arguments = to_device(poisoned(count + rows_after, width)), [
        to_device(x) if isinstance(x, np.ndarray) else x for x in case]
    for scratch in fused._scratch.values():
        scratch.copy_to_device(np.full(scratch.shape, np.nan, np.float32))
    cuda_support.cuda.synchronize()
    for _ in range(times):
        fused.attention(out, *arguments)
    fused.stream.synchronize()
    result = out.copy_to_host()
    assert (result[count:] == POISON).all()
    return result[:count]


def check(fused, case, relative=4e-3, **options):
    expected = poisoned(case[6], case[8] * case[10])
    attention_numpy(expected, *case)
    assert_close(attend(fused, case, **options), expected, relative=relative)


@pytest.mark.parametrize("heads, warps", KERNELS, ids=str)
def test_every_end_of_a_context(rng, fused, shape, heads, warps):
    """Shuffled block tables, and NaN wherever no token is."""
    case = attention_case(rng, *heads, 16, CONTEXTS, [1] * len(CONTEXTS))
    for part_keys in (1024, 512, 128):
        shape(warps, part_keys)
        check(fused, case)


@pytest.mark.parametrize("block_size", [32, 128])
def test_larger_blocks(rng, fused, shape, block_size):
    shape(8, 256)
    check(fused, attention_case(rng, 8, 2, 64, block_size, CONTEXTS, [1] * len(CONTEXTS)))


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("part_keys", [256, 1024, 16384])
def test_long_contexts_again_and_again(rng, fused, shape, warps, part_keys):
    shape(warps, part_keys)
    check(fused, attention_case(rng, 8, 2, 64, 16, [9000, 4096, 12, 3000, 700], [1] * 5), times=5)


@pytest.mark.parametrize("requests, longest", [(1, 200), (1, 9000), (8, 256), (8, 5000), (40, 500), (70, 250),
                                               (200, 250), (80, 3000), (300, 120)])
@pytest.mark.parametrize("invariant", [False, True], ids=["chosen", "invariant"])
def test_ragged_batches_as_they_are_served(rng, fused, monkeypatch, requests, longest, invariant):
    """By choose_shape itself: each of its branches."""
    monkeypatch.setattr(fused, "batch_invariant", invariant)
    contexts = np.append(rng.integers(1, longest + 1, requests - 1), longest)
    check(fused, attention_case(rng, 8, 2, 64, 16, contexts, [1] * requests), times=2)


@pytest.mark.parametrize("part_keys", [256, 8192])
def test_any_order_gives_the_same_bits(rng, fused, shape, monkeypatch, part_keys):
    """Also with rows that are not there at its end."""
    shape(8, part_keys)
    contexts = [*rng.integers(1, 3000, 90).tolist(), 0, 0]
    case = list(attention_case(rng, 8, 2, 64, 16, [max(1, n) for n in contexts], [1] * len(contexts)))
    case[4] = np.array(contexts, np.int32)
    plain = attend(fused, case)
    for order in (np.argsort(-case[4]), rng.permutation(len(contexts))):
        monkeypatch.setattr(fused, "hints", decode_registers.Hints(to_device(order.astype(np.int32))))
        np.testing.assert_array_equal(attend(fused, case), plain)


@pytest.mark.parametrize("warps", WARPS)
def test_rows_without_a_context_are_left_alone(rng, fused, shape, warps):
    shape(warps, 256)
    case = list(attention_case(rng, 8, 2, 64, 16, [2000, 40, 300, 16], [1] * 4))
    whole = attend(fused, case)
    case[4] = np.array([2000, 0, 300, 0], np.int32)
    out = attend(fused, case)
    np.testing.assert_array_equal(out[[0, 2]], whole[[0, 2]])
    assert (out[[1, 3]] == POISON).all()


@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 2, 128)], ids=str)
def test_batch_invariant_rows_are_the_same_bits_in_any_batch_and_table(rng, fused, monkeypatch, heads):
    """Alone in a table that it needs, alone in wider ones, among 2 and among 300 others."""
    monkeypatch.setattr(fused, "batch_invariant", True)
    others = rng.integers(1, 400, 300)
    contexts = [90, 1500, 333, *others]
    qkv, k, v, tables, lens, _, _, *sizes = attention_case(rng, *heads, 16, contexts, [1] * len(contexts))

    def rows(which, width):
        table = np.zeros((len(which), width), np.int32)
        table[:, :min(width, tables.shape[1])] = tables[which, :width]
        case = qkv[which], k, v, table, lens[which], np.arange(len(which) + 1, dtype=np.int32), len(which), *sizes
        return attend(fused, case)

    for i, context in enumerate(contexts[:3]):
        alone = rows([i], -(-context // 16))[0]
        for width in (96, 256, 700):
            np.testing.assert_array_equal(rows([i], width)[0], alone, f"{context} keys, a table of {width} blocks")
        np.testing.assert_array_equal(rows([0, 1, 2], 128)[i], alone, f"{context} keys, among 2 others")
        np.testing.assert_array_equal(rows(list(range(len(contexts))), 128)[i], alone, f"{context} keys, among 302")


@pytest.mark.parametrize("warps", WARPS)
def test_a_nan_stays_in_its_request_and_head(rng, fused, shape, warps):
    shape(warps, 256)
    case = list(attention_case(rng, 8, 2, 64, 16, [80, 300], [1, 1]))
    case[2] = case[2].copy()
    case[2][case[3][0, 0], 0, 3, 7] = POISON  # a value of the first request's first key head
    out = bf16_to_float32(attend(fused, case)).reshape(2, 8, 64)
    assert np.isnan(out[0, :4, 7]).all() and np.isfinite(out[0, 4:]).all() and np.isfinite(out[1]).all()
    assert np.isfinite(np.delete(out[0, :4], 7, axis=1)).all()


@pytest.mark.parametrize("warps", WARPS)
def test_spare_columns_of_the_block_table_are_not_followed(rng, fused, shape, warps):
    shape(warps, 128)
    case = list(attention_case(rng, 8, 2, 64, 16, [33, 400], [1, 1]))
    case[3] = case[3].copy()
    for table, length in zip(case[3], case[4]):
        table[-(-length // 16):] = 2**31 - 1
    check(fused, case)


@pytest.mark.parametrize("warps", WARPS)
def test_large_scores(rng, fused, shape, warps):
    shape(warps, 1024)
    check(fused, attention_case(rng, 8, 2, 64, 16, [3000, 70], [1, 1], scale=3.0), relative=6e-3)


@pytest.mark.parametrize("heads", [(32, 8, 64), (32, 8, 128)], ids=str)
def test_it_agrees_with_the_other_kernel_at_sizes_of_use(rng, fused, monkeypatch, heads):
    """Both round the weights to bf16, at different places of the online softmax."""
    case = attention_case(rng, *heads, 16, rng.integers(1, 2000, 48), [1] * 48)
    mine = attend(fused, case)
    monkeypatch.setattr(fused, "hopper", False)
    other = attend(fused, case)
    assert relative_error(mine, other) < 4e-3
    assert (mine != other).any(), "the same kernel ran twice"
