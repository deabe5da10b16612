"""gemm/skinny.py without a GPU: its own code and its own instructions, emulated (hopper_emulator.py).

Clusters that split the sums, clusters that share x, and both; with what the hardware does in its own time done early
and late, and one block behind the others. A protocol that is wrong hangs a GPU, so mistakes are planted here, and have
to be found. tests/gpu has real sizes, on a GPU.
"""

import inspect
import os
import types

import numpy as np
import pytest

from tests.kernel_cases import assert_close, fresh_rng, poisoned, random_bf16

if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the simulator has no inline PTX", allow_module_level=True)
pytest.importorskip("numba_cuda")

from tests import hopper_emulator  # noqa: E402
from tests.hopper_emulator import Emulator  # noqa: E402
from tinyvllm.kernels import hopper  # noqa: E402
from tinyvllm.kernels.bf16 import float32_to_bf16  # noqa: E402
from tinyvllm.kernels.fused.numpy_twin import NO_BIAS, linear_numpy  # noqa: E402
from tinyvllm.kernels.gemm import skinny  # noqa: E402
from tinyvllm.kernels.kv_cache import write_kv_numpy  # noqa: E402
from tinyvllm.kernels.residual_add import residual_add_numpy  # noqa: E402
from tinyvllm.kernels.rope import rope_numpy  # noqa: E402
from tinyvllm.kernels.silu_mul import silu_mul_numpy  # noqa: E402


@pytest.fixture
def rng():
    return fresh_rng()


def launch(kernel, num_rows, x, weight, out, late, slow, addresses=(), numbers=(0, 0, 0)):
    """All clusters of a grid, one after the other."""
    emulator = Emulator(kernel.threads, kernel.shared_bytes, late, slow)
    maps = emulator.map(weight, (kernel.box_rows, 64)), emulator.map(x, (kernel.x_rows, 64))
    emulator.made_before = {maps[1]}
    pointers = [*maps, *(emulator.put(array) for array in (out, *addresses))]
    pointers += [0] * (8 - len(pointers))
    function = emulator.translate(kernel.py_func)
    width, row_blocks, groups = kernel.grid(num_rows, len(weight))
    assert width == kernel.cluster
    for z in range(groups):
        for y in range(row_blocks):
            emulator.run_cluster(function, (*map(np.uint64, pointers), num_rows, *weight.shape, *numbers),
                                 [(i, y, z) for i in range(width)], width)
    return emulator


def check(rng, shape, after, num_rows, num_outputs, depth, late="copies", slow=None, make=skinny.skinny_kernel):
    """One product against the twins; what lies beyond its rows stays as it was."""
    kernel = make(*shape, 1, after)
    x, weight = random_bf16(rng, num_rows + 3, depth), random_bf16(rng, num_outputs, depth, scale=depth**-0.5)
    product = poisoned(num_rows, num_outputs)
    linear_numpy(product, x[:num_rows], weight, NO_BIAS)
    out = random_bf16(rng, num_rows + 2, num_outputs // 2 if after == "silu" else num_outputs)
    expected = out.copy()
    if after == "silu":
        silu_mul_numpy(expected[:num_rows], product)
    elif after == "add":
        residual_add_numpy(expected[:num_rows], product)
    else:
        expected[:num_rows] = product
    launch(kernel, num_rows, x, weight, out, late, slow)
    assert_close(out[:num_rows], expected[:num_rows], relative=6e-3)
    np.testing.assert_array_equal(out[num_rows:], expected[num_rows:])


# BM, BN, STAGES, SPLIT, SHARE; rows, outputs, columns: rows and tiles that are not full, tiles that do not divide
SHAPES = [((64, 16, 3, 1, 1), "plain", 13, 96, 520), ((64, 16, 2, 2, 1), "add", 21, 64, 448),
          ((64, 16, 2, 1, 2), "plain", 16, 200, 392), ((64, 32, 2, 2, 2), "add", 30, 72, 640),
          ((64, 32, 2, 1, 4), "silu", 37, 144, 320), ((64, 32, 2, 2, 4), "plain", 20, 256, 576),
          ((128, 16, 2, 4, 1), "silu", 9, 200, 1100), ((192, 24, 2, 2, 1), "silu", 29, 208, 456)]


@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize("shape, after, rows, outputs, depth", SHAPES, ids=lambda x: str(x).replace(" ", ""))
def test_split_and_shared_products(rng, shape, after, rows, outputs, depth, late):
    slow = int(rng.integers(shape[3] * shape[4])) if shape[4] > 1 else None
    check(rng, shape, after, rows, outputs, depth, late, slow)


@pytest.mark.parametrize("shape, heads", [((64, 16, 2, 2, 1), (3, 1, 64)), ((64, 32, 2, 1, 2), (2, 1, 64)),
                                          ((128, 16, 2, 1, 1), (3, 1, 64)), ((128, 16, 3, 2, 2), (2, 1, 128))], ids=str)
def test_rotary_embedding_and_cache(rng, shape, heads):
    """Tiles of one head and of two; the last group of tiles goes beyond the heads."""
    (num_heads, num_kv_heads, head_dim), rows, depth, block_size = heads, 19, 200, 4
    width = (num_heads + 2 * num_kv_heads) * head_dim
    x, weight = random_bf16(rng, rows, depth), random_bf16(rng, width, depth, scale=depth**-0.5)
    angles = rng.uniform(0, 6, (50, head_dim // 2))
    cos_sin = float32_to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    positions = rng.integers(0, 50, rows).astype(np.int32)
    slots = rng.permutation(8 * block_size)[:rows].astype(np.int32)
    slots[5] = -1
    qkv, k, v = poisoned(rows, width), *(random_bf16(rng, 8, num_kv_heads, block_size, head_dim) for _ in range(2))
    expected, expected_k, expected_v = poisoned(rows, width), k.copy(), v.copy()
    linear_numpy(expected, x, weight, NO_BIAS)
    rope_numpy(expected, positions, cos_sin, *heads)
    write_kv_numpy(expected_k, expected_v, expected, slots, *heads, block_size)
    launch(skinny.skinny_kernel(*shape, 1, "rope", head_dim), rows, x, weight, qkv, "copies", None,
           (positions, slots, cos_sin, k, v), (num_heads, num_kv_heads, block_size))
    queries = num_heads * head_dim
    assert_close(qkv[:, :queries], expected[:, :queries], relative=6e-3)
    assert (qkv[:, queries:] == poisoned(1)).all()
    for cache, wanted in ((k, expected_k), (v, expected_v)):
        untouched = np.setdiff1d(np.arange(8 * block_size), slots)
        flat, wanted = (c.transpose(0, 2, 1, 3).reshape(8 * block_size, -1) for c in (cache, wanted))
        np.testing.assert_array_equal(flat[untouched], wanted[untouched])
        assert_close(flat, wanted, relative=6e-3)


@pytest.mark.parametrize("rows, hint", [(16, hopper.EVICT_FIRST), (17, hopper.EVICT_NORMAL)])
def test_weights_stay_in_the_cache_where_another_block_of_rows_reads_them(rng, rows, hint):
    kernel = skinny.skinny_kernel(64, 16, 2, 1, 1, 1, "plain")
    x, weight = random_bf16(rng, rows, 256), random_bf16(rng, 64, 256)
    emulator = launch(kernel, rows, x, weight, poisoned(rows, 64), "copies", None)
    assert emulator.hints == {hint}


MODELS = [(2048, 8192, 64, 3072, 128256), (3072, 8192, 128, 5120, 128256), (4096, 14336, 128, 6144, 128256),
          (576, 1536, 64, 960, 49152), (256, 688, 64, 384, 1000)]  # hidden, intermediate, head, qkv, vocabulary


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("num_multiprocessors", [132, 114])
def test_every_choice_is_a_kernel_that_fits(model, num_multiprocessors):
    hidden, intermediate, head_dim, qkv, vocabulary = model
    for outputs, depth, after, size in ((qkv, hidden, "rope", head_dim), (hidden, hidden, "add", 0),
                                        (2 * intermediate, hidden, "silu", 0), (hidden, intermediate, "add", 0),
                                        (vocabulary, hidden, "plain", 0)):
        for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 96, 128, 129, 160, 192, 193, 224, 256, 257, 384, 512, 1000, 5000):
            shape = skinny.choose_shape(rows, outputs, depth, size, num_multiprocessors)
            if shape is None:
                assert rows > 256
                continue
            kernel = skinny.skinny_kernel(*shape, after, size)
            BM, BN, stages, split, share, blocks = shape
            assert blocks * (kernel.shared_bytes + 1024) <= 228 << 10 and stages >= 4
            assert blocks * (BN // 2 + 32) * (2 * BM + 32) <= 65536, "registers for the sums and the rest"
            assert split * share * 4 <= depth // 64 or split * share == 1, "a block has some columns to multiply"
            _, row_blocks, tiles = kernel.grid(rows, outputs)
            assert row_blocks * BN < 2 * max(rows, 16) and (tiles - 1) * BM < outputs


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_no_number_of_rows_changes_the_order_of_a_sum_where_that_is_asked_for(model):
    """The parts of the columns are the same for one row and for thousands; wgmma.py (None) has one part."""
    hidden, intermediate, head_dim, qkv, vocabulary = model
    for outputs, depth, after, size in ((qkv, hidden, "rope", head_dim), (hidden, hidden, "add", 0),
                                        (2 * intermediate, hidden, "silu", 0), (hidden, intermediate, "add", 0),
                                        (vocabulary, hidden, "plain", 0)):
        shapes = [skinny.choose_invariant_shape(rows, outputs, depth, size, 132) for rows in (1, 5, 64, 300, 16384)]
        assert len({1 if shape is None else shape[3] for shape in shapes}) == 1
        for shape in filter(None, shapes):
            kernel = skinny.skinny_kernel(*shape, after, size)
            assert kernel.shared_bytes <= 227 << 10


# ---- mistakes ----

MISTAKES = {  # (old text, new text) ...
    "only its own stage is freed": (
        ("4 * GROUPS * SHARE", "4 * GROUPS"), ("k > start and lane < SHARE", "k > start and lane == 0"),
        ("barrier_arrive_in(used, np.uint32(rank + lane * SPLIT))", "barrier_arrive(used)")),
    "one arrival is enough": (("4 * GROUPS * SHARE", "4 * GROUPS"),),
    "nobody waits for a stage": (("barrier_wait(np.uint32(freed + 8 * stage), phase)", "pass"),),
    "a product is not waited for": (("multiply_wait_one()  #", "pass  #"),),
    "others' barriers may not be there": (("cluster_arrive_relaxed()  # others", "pass  #"),
                                          ("        if SHARE > 1:\n            cluster_wait()\n", "")),
    "blocks leave early": (("cluster_arrive_relaxed()  # nothing", "pass  #"),
                            ("cluster_wait()  # nobody", "pass  #")),
    "x is asked for too early": (("                wait_for_previous_kernel()\n", ""),),
    "everybody sends the same rows": (("first_row + member * X_ROWS", "first_row"),),
    "to the wrong blocks": (("1 << i * SPLIT", "1 << i"),),
    "a part of the bytes is expected": (("np.uint32(STAGE))\n                    load_weights",
                                         "np.uint32(STAGE // 2))\n                    load_weights"),),
    "sums of the wrong tile": (("np.uint32(member * SPLIT), tile", "np.uint32(0), tile"),),
}


def changed(changes):
    """skinny_kernel with other text."""
    source = inspect.getsource(skinny)
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType(skinny.__name__)
    exec(compile(source, "changed skinny.py", "exec"), module.__dict__)  # noqa: S102
    return module.skinny_kernel


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(rng, mistake, monkeypatch):
    monkeypatch.setattr(hopper_emulator, "PATIENCE", 2.0)
    split = 2 if mistake in ("to the wrong blocks", "sums of the wrong tile") else 1
    with pytest.raises((AssertionError, TimeoutError, KeyError, TypeError, RuntimeError)):
        for late, slow in 12 * (("products", 1), ("products", 0), ("copies", 1)):  # some only show now and then
            check(rng, (64, 16, 2, split, 2), "plain", 16, 128, 64 * 6 * split, late, slow, changed(MISTAKES[mistake]))


def test_without_a_mistake_the_same_is_right(rng):
    for late, slow in (("products", 1), ("products", 0), ("copies", 1)):
        for split in (1, 2):
            check(rng, (64, 16, 2, split, 2), "plain", 16, 128, 64 * 6 * split, late, slow, changed(()))
