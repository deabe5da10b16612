"""Prefill attention by wgmma on a GPU: against the NumPy twin at every edge, and against prefill.py at sizes of use.

In the order in which to look when something is wrong: one tile, several, several requests, the rest. The tests of
tests/test_prefill_wgmma.py do the smallest of these without a GPU.
"""

import numpy as np
import pytest

from tests.gpu.arrays import to_device
from tests.kernel_cases import POISON, assert_close, attention_case, fresh_rng, poisoned, relative_error
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.attention import prefill_wgmma
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.bf16 import bf16_to_float32

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated()
                                 or cuda_support.compute_capability() != (9, 0),
                                 reason="needs a GPU of compute capability 9.0")]
# (query heads, key heads, head_dim): groups of 1, 2, 4, 8, 7
HEADS = [(4, 4, 64), (4, 2, 64), (8, 2, 64), (8, 1, 64), (7, 1, 64), (2, 2, 128), (4, 2, 128), (8, 2, 128),
         (16, 2, 128), (7, 1, 128)]
ROWS = [2, 15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 600]
CONTEXTS = [0, 1, 15, 16, 17, 500]  # tokens before the chunk
SHAPES = {64: [(1, 128, 3, 2), (1, 96, 4, 2), (2, 128, 5, 1), (3, 80, 6, 1)],
          128: [(2, 96, 3, 1), (2, 64, 5, 1), (2, 80, 4, 1), (1, 64, 2, 2)]}


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(scope="module")
def fused():
    from tinyvllm.kernels.driver import Stream
    from tinyvllm.kernels.fused.operations import FusedOperations

    cuda_support.cuda.current_context()
    operations = FusedOperations(Stream(), hopper=True)
    operations.wgmma_prefill_rows = 0  # also for the smallest
    return operations


def attend(fused, case, rows_after=3):
    """The kernels' rows; those after them have stayed as they were."""
    qkv, (num_heads, _, head_dim) = case[0], case[8:11]
    out = to_device(poisoned(len(qkv) + rows_after, num_heads * head_dim))
    fused.attention(out[:len(qkv)], *(to_device(x) if isinstance(x, np.ndarray) else x for x in case))
    fused.stream.synchronize()
    result = out.copy_to_host()
    assert (result[len(qkv):] == POISON).all()
    return result[:len(qkv)]


def check(fused, case):
    expected = poisoned(len(case[0]), case[8] * case[10])
    attention_numpy(expected, *case)
    assert_close(attend(fused, case), expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_one_tile(rng, fused, heads):
    check(fused, attention_case(rng, *heads, 16, [9], [9]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 2, 128)], ids=str)
def test_one_request_after_every_context(rng, fused, heads, rows):
    for context in CONTEXTS:
        check(fused, attention_case(rng, *heads, 16, [context + rows], [rows]))


@pytest.mark.parametrize("heads, block_size", [*((heads, 16) for heads in HEADS), ((8, 2, 64), 8), ((7, 1, 128), 8),
                                               ((8, 2, 64), 32), ((8, 2, 128), 32), ((8, 2, 64), 128)], ids=str)
def test_several_requests_after_decodes(rng, fused, heads, block_size):
    """Shuffled block tables, and NaN wherever no token is."""
    for count in range(1, 6):
        rows = rng.choice(ROWS, count)
        contexts = rows + rng.choice(CONTEXTS, count)
        decodes = rng.integers(0, 4)
        case = attention_case(rng, *heads, block_size, [*rng.integers(1, 300, decodes), *contexts],
                              [1] * int(decodes) + list(rows))
        check(fused, case)


def test_many_requests_of_all_lengths(rng, fused):
    """More than a warp has lanes, so that the search for a tile goes round more than once."""
    rows = np.concatenate([[300], rng.integers(2, 70, 90)])
    contexts = rows + rng.choice(CONTEXTS, 91)
    check(fused, attention_case(rng, 8, 2, 64, 16, [5, *contexts], [1, *rows]))


@pytest.mark.parametrize("head_dim, shape", [(d, shape) for d, shapes in SHAPES.items() for shape in shapes], ids=str)
def test_other_shapes_of_tile(rng, fused, monkeypatch, head_dim, shape):
    monkeypatch.setattr(prefill_wgmma, "choose_shape", lambda d, block_size: shape)
    check(fused, attention_case(rng, 8, 2, head_dim, 16, [700, 20, 129, 333], [1, 20, 100, 333]))


def test_what_it_cannot_take_goes_to_the_other_kernel(rng, fused):
    for heads, block_size in (((3, 1, 80), 16), ((8, 2, 64), 5), ((8, 2, 128), 128)):
        check(fused, attention_case(rng, *heads, block_size, [40, 100], [40, 30]))


def test_large_scores(rng, fused):
    case = attention_case(rng, 8, 2, 64, 16, [3000], [700], scale=3.0)
    expected = poisoned(700, 512)
    attention_numpy(expected, *case)
    assert_close(attend(fused, case), expected, relative=6e-3)


@pytest.mark.parametrize("heads", [(8, 2, 64), (7, 1, 64), (4, 2, 128)], ids=str)
def test_a_row_does_not_depend_on_batch_or_chunk(rng, fused, heads):
    qkv, k, v, tables, lens, starts, decodes, scale, *sizes = attention_case(rng, *heads, 16, [90, 500], [77, 200])
    whole = attend(fused, (qkv, k, v, tables, lens, starts, decodes, scale, *sizes))
    for first, last in ((0, 2), (2, 38), (38, 200)):  # the second request in chunks
        part = (qkv[77 + first:77 + last], k, v, tables[1:], np.array([300 + last], np.int32),
                np.array([0, last - first], np.int32), 0, scale, *sizes)
        np.testing.assert_array_equal(attend(fused, part), whole[77 + first:77 + last])


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 1, 128)], ids=str)
def test_a_nan_stays_in_its_request_and_head(rng, fused, heads):
    case = list(attention_case(rng, *heads, 16, [80, 300], [80, 50]))
    case[2] = case[2].copy()
    case[2][case[3][0, 0], 0, 3, 7] = POISON  # a value of the first request's first key head
    out = bf16_to_float32(attend(fused, case)).reshape(130, heads[0], heads[2])
    group = heads[0] // heads[1]
    assert np.isnan(out[3:80, :group, 7]).all() and np.isfinite(out[:, group:]).all() and np.isfinite(out[80:]).all()


def test_spare_columns_of_the_block_table_are_not_followed(rng, fused):
    case = list(attention_case(rng, 8, 2, 64, 16, [33, 400], [33, 99]))
    expected = poisoned(132, 512)
    attention_numpy(expected, *case)
    case[3] = case[3].copy()
    for table, length in zip(case[3], case[4]):
        table[-(-length // 16):] = 2**31 - 1
    assert_close(attend(fused, case), expected)


@pytest.mark.parametrize("heads", [(32, 8, 64), (32, 8, 128)], ids=str)
@pytest.mark.parametrize("count, length", [(4, 2048), (16, 512)])
def test_it_agrees_with_the_other_kernel_at_sizes_of_use(rng, fused, heads, count, length):
    """Both round the weights to bf16, at different places of the online softmax."""
    case = attention_case(rng, *heads, 16, [length] * count, [length] * count)
    by_wgmma = attend(fused, case)
    fused.wgmma_prefill_rows = 10**9
    try:
        by_mma = attend(fused, case)
    finally:
        fused.wgmma_prefill_rows = 0
    assert relative_error(by_wgmma, by_mma) < 4e-3
    assert (by_wgmma != by_mma).any(), "the same kernel ran twice"
