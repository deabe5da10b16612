"""The wgmma prefill kernel without a GPU: its own code and its own instructions, emulated (hopper_emulator.py).

Against the NumPy twin, with cache slots that no one may read full of NaN, and with what the hardware does in its own
time done as early and as late as it may be. tests/gpu has many more shapes, on a GPU.
"""

import os

import numpy as np
import pytest

from tests.kernel_cases import POISON, assert_close, attention_case, fresh_rng, poisoned

if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the simulator has no inline PTX", allow_module_level=True)
pytest.importorskip("numba_cuda")

from tests.hopper_emulator import Emulator  # noqa: E402
from tinyvllm.kernels import driver  # noqa: E402
from tinyvllm.kernels.attention import fragments, prefill_wgmma, schedule  # noqa: E402
from tinyvllm.kernels.attention.decode_registers import NO_HINTS  # noqa: E402
from tinyvllm.kernels.attention.numpy_twin import attention_numpy  # noqa: E402
from tinyvllm.kernels.attention.prefill import LOG2_E  # noqa: E402
from tinyvllm.kernels.attention.prefill_layout import can_run, choose_shape, make_layout  # noqa: E402
from tinyvllm.kernels.attention.prefill_wgmma import prefill_wgmma_kernel  # noqa: E402
from tinyvllm.kernels.device_array import DeviceArray  # noqa: E402
from tinyvllm.kernels.fused.operations import FusedOperations  # noqa: E402


@pytest.fixture
def rng():
    return fresh_rng()


# ---- where things are ----


def test_fragments_cover_a_tile_once():
    places = {(fragments.fragment_row(lane, i), fragments.fragment_column(lane, i)) for lane in range(32)
              for i in range(64)}
    assert places == {(row, column) for row in range(16) for column in range(128)} and len(places) == 32 * 64


def test_the_swizzle_keeps_rows_and_spreads_columns_over_banks():
    offsets = np.arange(4096)
    moved = np.array([fragments.swizzled(int(x)) for x in offsets])
    assert (np.sort(moved) == offsets).all() and (moved // 128 == offsets // 128).all()
    assert all(len({fragments.swizzled(128 * row + 16 * c) // 16 % 8 for row in range(8)}) == 8 for c in range(8))


@pytest.mark.parametrize("head_dim, group, page", [(64, 4, 16), (64, 7, 8), (128, 1, 32), (128, 16, 16)])
def test_shared_memory_is_divided_without_overlap(head_dim, group, page):
    consumers, keys, stages, blocks = choose_shape(head_dim, page)
    layout = make_layout(head_dim, group, page, consumers, keys, stages)
    tiles, ring = stages * layout.MATRIX, 8 * stages
    parts = [(0, 2 * layout.QUERIES), (layout.KEYS_AT, tiles), (layout.VALUES_AT, tiles),
             (layout.Q_ARRIVED, 16), (layout.Q_FREED, 16), (layout.K_ARRIVED, ring), (layout.K_FREED, ring),
             (layout.V_ARRIVED, ring), (layout.V_FREED, ring), (layout.ENTRIES_AT, 64), (layout.SHARED, 0)]
    assert all(start + size == following for (start, size), (following, _) in zip(parts, parts[1:]))
    assert all(size % 1024 == 0 for size in (layout.QUERY_HALF, layout.KEY_HALF, layout.BOX * layout.PAGES))
    assert layout.ENTRIES_AT % 16 == 0 and blocks * (layout.SHARED + 1024) <= 228 * 1024
    assert layout.TOKENS * group <= layout.ROWS < (layout.TOKENS + 1) * group


def test_what_the_kernel_can_run():
    assert all(can_run(32, 8, d, page) for d in (64, 128) for page in (8, 16, 32))
    assert all(can_run(32, 8, d, 64) for d in (64, 128))
    assert not can_run(32, 8, 80, 16) and not can_run(32, 8, 64, 5) and not can_run(32, 8, 128, 128)
    assert can_run(192, 1, 64, 16) and not can_run(193, 1, 64, 16)
    assert can_run(128, 1, 128, 16) and not can_run(129, 1, 128, 16)


def test_tensor_maps_are_described_with_the_last_axis_first(monkeypatch):
    seen = []

    class Driver:
        def cuTensorMapEncodeTiled(self, place, kind, axes, address, sizes, pitches, box, steps, *rest):
            seen.append((axes.value, address.value, list(sizes), list(pitches), list(box), list(steps),
                         [x.value for x in rest]))
            return 0

    monkeypatch.setattr(driver, "driver", Driver)
    assert len(driver.tensor_map_bytes(4096, (300, 2048), (128, 64))) == 128
    driver.tensor_map_bytes(4096, (300, 48, 64), (16, 4, 64))
    assert seen[0] == (2, 4096, [2048, 300], [4096], [64, 128], [1, 1], [0, 3, 3, 0])
    assert seen[1] == (3, 4096, [64, 48, 300], [128, 6144], [64, 4, 16], [1, 1, 1], [0, 3, 3, 0])


# ---- the order of work ----


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 132])
def test_blocks_take_turns_in_both_directions(num_blocks):
    turns = [[int(schedule.item_of_turn.py_func(turn, block, num_blocks)) for block in range(num_blocks)]
             for turn in range(4)]
    assert [sorted(turn) for turn in turns] == [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(4)]
    assert turns[1] == sorted(turns[1], reverse=True) and turns[2] == sorted(turns[2])


@pytest.mark.parametrize("num_requests", [1, 3, 40])
def test_every_tile_is_found_once_and_the_longest_first(rng, num_requests):
    tokens = int(rng.integers(1, 65))
    rows = rng.integers(1, 400 if num_requests < 10 else 50, num_requests)
    lens = (rows + rng.choice([0, 0, 1, 500], num_requests)).astype(np.int32)
    starts = (np.concatenate([[0], np.cumsum(rows)]) + 3).astype(np.int32)  # after three decodes
    wanted = sorted((-(int(lens[r] - rows[r]) + min(first + tokens, int(rows[r]))), r)
                    for r in range(num_requests) for first in range(0, int(rows[r]), tokens))
    emulator = Emulator(32, 0)
    shape, count, most, find = map(emulator.translate, (schedule.shape_of, schedule.count_tiles, schedule.most_keys,
                                                        schedule.find_tile))
    starts_at, lens_at = np.uint64(emulator.put(starts)), np.uint64(emulator.put(lens))
    found = [[] for _ in range(32)]

    def search():
        lane = np.uint32(emulator.local.thread)
        requests = np.uint32(num_requests)
        own, keys = shape(starts_at, lens_at, requests, lane), most(lens_at, requests, lane)
        for number in range(count(0, own, starts_at, lens_at, requests, lane, tokens)):
            request, keys = find(np.uint32(number), keys, own, starts_at, lens_at, requests, lane, tokens)
            found[lane].append((-int(keys), int(request)))

    emulator.run(search, ())
    assert all(lane == wanted for lane in found)


# ---- the kernel ----


def check(rng, shape, contexts, rows, num_kv_heads, num_blocks, late, change=lambda case: None, idler=None):
    """One launch of prefill_wgmma_kernel(*shape) against the twin; rows that are not its own stay as they were."""
    head_dim, group, page = shape[:3]
    num_heads = group * num_kv_heads
    case = attention_case(rng, num_heads, num_kv_heads, head_dim, page, contexts, rows)
    qkv, k, v, tables, lens, starts, num_decodes, scale, *_ = case
    expected, out = poisoned(len(qkv), num_heads * head_dim), poisoned(len(qkv) + 5, num_heads * head_dim)
    attention_numpy(expected, *case)
    change(case)
    kernel = prefill_wgmma_kernel(*shape)
    emulator = Emulator(kernel.threads, kernel.shared_bytes, late, idler=idler)
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    addresses = (emulator.map(heads, (kernel.tokens, group, 64)),
                 *(emulator.map(cache.reshape(-1, head_dim), (page, 64)) for cache in (k, v)),
                 *map(emulator.put, (out, tables, lens, starts)))
    function = emulator.translate(kernel.py_func)
    for block in range(num_blocks):
        emulator.run(function, (*map(np.uint64, addresses), num_decodes, len(lens), tables.shape[1],
                                np.float32(scale * LOG2_E), num_heads, num_kv_heads), block, num_blocks)
    first = starts[num_decodes]
    assert_close(out[first:len(qkv)], expected[first:])
    assert (out[:first] == POISON).all() and (out[len(qkv):] == POISON).all()


SMALL = [  # head_dim, group, page, consumers, keys, stages, blocks; contexts, rows, key heads, blocks of the grid
    ((64, 2, 16, 1, 32, 2, 2), [1, 33, 60, 7], [1, 33, 35, 2], 2, 2),
    ((64, 7, 16, 2, 64, 3, 1), [70, 31], [40, 30], 1, 2),
    ((64, 1, 8, 3, 16, 2, 1), [80, 9], [80, 5], 1, 1),
    ((128, 8, 32, 1, 32, 3, 1), [1, 1, 65, 96], [1, 1, 2, 20], 1, 3),
]


@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: "-".join(map(str, case[0])))
def test_small_tiles_at_every_edge(rng, case, late):
    check(rng, *case, late)


@pytest.mark.parametrize("head_dim, group, contexts, rows, late", [(64, 4, [40, 131, 130], [1, 35, 2], "products"),
                                                                   (128, 4, [1, 97, 200], [1, 40, 5], "copies")])
def test_the_tiles_in_use(rng, head_dim, group, contexts, rows, late):
    check(rng, (head_dim, group, 16, *choose_shape(head_dim)), contexts, rows, 1, 1, late)


def test_lanes_with_nothing_to_load_keep_up(rng):
    """Such a lane of the producer could look at a barrier when that has completed twice, and would wait for ever."""
    shape = (64, 2, 16, 1, 32, 2, 2)
    layout = make_layout(*shape[:-1])
    assert layout.HALVES * layout.PAGES < 32, "the last lane has nothing to load"
    check(rng, shape, [150], [33], 1, 1, "copies", idler=layout.PRODUCER + 31)


def test_spare_columns_of_the_block_table_are_not_followed(rng):
    def change(case):
        for table, length in zip(case[3], case[4]):
            table[-(-length // 16):] = 2**31 - 1

    check(rng, (64, 2, 16, 1, 32, 2, 2), [33, 20], [5, 20], 1, 1, "copies", change)


def test_the_launch_that_the_fused_operations_make(rng, monkeypatch):
    """Which maps, which numbers, how many blocks; switched off, prefill.py does it."""
    case = attention_case(rng, 4, 2, 64, 16, [1, 50, 40, 33], [1, 1, 40, 9])
    expected, out = poisoned(51, 256), poisoned(51, 256)
    attention_numpy(expected, *case)
    launched = []

    class Maps:
        def of(self, array, *box):
            content = emulator.bytes_at(array.address, array.nbytes).view(np.uint16)
            return emulator.map(content.reshape(array.shape), (*box, 64))

    def launch(kernel, grid, threads, shared_bytes, *arguments, dependent=None):
        launched.append((kernel.__name__, grid))
        if hasattr(kernel, "tokens"):
            assert (threads, shared_bytes, grid[1:]) == (kernel.threads, kernel.shared_bytes, (1, 1))
            names = zip(arguments, kernel.numba_signature().args, strict=True)
            values = [np.uint64(x) if str(name) == "uint64" else np.float32(x) if str(name) == "float32" else int(x)
                      for x, name in names]
            for block in range(grid[0]):
                emulator.run(emulator.translate(kernel.py_func), values, block, grid[0])

    monkeypatch.setattr(prefill_wgmma, "choose_shape", lambda head_dim, block_size: (1, 32, 2, 2))
    kernel = prefill_wgmma_kernel(64, 2, 16, 1, 32, 2, 2)
    emulator = Emulator(kernel.threads, kernel.shared_bytes)
    fused = object.__new__(FusedOperations)  # without a GPU there is no stream
    fused.hopper, fused.dependent, fused.batch_invariant, fused.hints = True, True, False, NO_HINTS
    fused.num_multiprocessors, fused.maps, fused._run = 1, Maps(), launch
    arrays = [DeviceArray(emulator.put(x), x.shape, x.dtype, x) if isinstance(x, np.ndarray) else x
              for x in (out, *case)]
    for fused.wgmma_prefill_rows in (50, 49):  # there are 49
        fused.attention(*arrays)
    assert [name for name, _ in launched] == ["decode", "prefill", "decode", "prefill"]
    assert launched[1][1][1] == 2 and launched[3][1] == (2, 1, 1)
    assert_close(out[2:], expected[2:])
    assert (out[:2] == POISON).all()
