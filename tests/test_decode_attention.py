"""The decode kernel of few instructions a key, without a GPU: its own code, emulated (hopper_emulator.py).

Launched as FusedOperations launches it; against the NumPy twin, with cache slots that no one may read full of NaN, and
what the kernel before writes there as late as it may be. tests/gpu/test_gpu_decode.py has many more shapes, on a GPU.
"""

import os
import types

import numpy as np
import pytest

from tests.kernel_cases import POISON, assert_close, attention_case, fresh_rng, poisoned

if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the simulator has no inline PTX", allow_module_level=True)
pytest.importorskip("numba_cuda")

from tests.hopper_emulator import Emulator  # noqa: E402
from tinyvllm.kernels.attention import decode_registers  # noqa: E402
from tinyvllm.kernels.attention.numpy_twin import attention_numpy  # noqa: E402
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16  # noqa: E402
from tinyvllm.kernels.fused import operations  # noqa: E402


class DecodeEmulator(Emulator):
    """Also mma.sync and what goes with it, and grids of three axes."""

    before = staticmethod(lambda done: None)  # what the kernel before leaves, when it has not ended and when it has

    def translate(self, value):
        if getattr(value, "__name__", None) == "numba.cuda":
            def array(shape, dtype):
                return np.full(shape, POISON << 16, np.uint32).view(dtype)

            return types.SimpleNamespace(syncthreads=lambda: self.meet(self.here.named[0], "syncthreads"),
                                         local=types.SimpleNamespace(array=array))
        return super().translate(value)

    def run_grid(self, function, arguments, grid):
        """All blocks, one after the other, in a random order."""
        blocks = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        for i in np.random.default_rng().permutation(len(blocks)):
            self.before(False)
            self.run_cluster(function, arguments, [blocks[i]], grid[0])
        self.before(True)

    def step(self, opcode, operands, registers, products):
        def get(name):
            return registers[name] if name in registers else int(name, 0)

        if opcode == "cvt.rn.bf16.f32":
            registers[operands[0]] = int(float32_to_bf16(np.array([get(operands[1])], np.float32))[0])
        elif opcode == "prmt.b32":
            low, high, places = (get(x) for x in operands[1:])
            data = low | high << 32
            registers[operands[0]] = sum((data >> 8 * (places >> 4 * i & 15) & 0xFF) << 8 * i for i in range(4))
        else:
            super().step(opcode, operands, registers, products)

    def do_st(self, opcode, operands, registers, get, _):
        assert ".shared" in opcode or self.local.waited, "before the kernel ahead has ended"
        if opcode.endswith(".b16"):
            self.bytes_at(get(operands[0][0]), 2).view(np.uint16)[:] = get(operands[1])
        else:
            super().do_st(opcode, operands, registers, get, _)

    def do_griddepcontrol(self, opcode, *rest):
        super().do_griddepcontrol(opcode, *rest)
        if self.local.waited:
            self.before(True)

    def do_shfl(self, opcode, operands, registers, get, _):
        if ".idx" not in opcode:
            super().do_shfl(opcode, operands, registers, get, _)
            return
        lane, thread = get(operands[2]), self.local.thread
        everybody = self.warp(opcode, get(operands[1]), lambda v: v)
        registers[operands[0]] = everybody[thread - thread % 32 + lane % 32]

    def do_movmatrix(self, opcode, operands, registers, get, _):
        def combine(values):
            rows = np.array(list(values.values()), np.uint32).reshape(8, 4).view(np.uint16)
            return np.ascontiguousarray(rows.T).view(np.uint32)

        lane = self.local.thread % 32
        registers[operands[0]] = int(self.warp(opcode, get(operands[1]), combine)[lane // 4, lane % 4])

    def do_mma(self, opcode, operands, registers, get, _):
        assert opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"

        def combine(lanes):
            a, b, c = np.zeros((16, 16), np.uint16), np.zeros((16, 8), np.uint16), np.zeros((16, 8), np.float32)
            for lane, (left, right, sums) in enumerate(lanes.values()):
                g, q = lane // 4, lane % 4
                for i, pair in enumerate(left):
                    a[g + i % 2 * 8, 2 * q + i // 2 * 8:][:2] = pair & 0xFFFF, pair >> 16
                for i, pair in enumerate(right):
                    b[2 * q + 8 * i:, g][:2] = pair & 0xFFFF, pair >> 16
                c[g, 2 * q:2 * q + 2], c[g + 8, 2 * q:2 * q + 2] = sums[:2], sums[2:]
            return bf16_to_float32(a) @ bf16_to_float32(b) + c

        values = [[get(x) for x in names] for names in operands[1:4]]
        result = self.warp(opcode, values, combine)
        lane = self.local.thread % 32
        g, q = lane // 4, lane % 4
        found = result[g, 2 * q], result[g, 2 * q + 1], result[g + 8, 2 * q], result[g + 8, 2 * q + 1]
        registers.update(zip(operands[0], map(np.float32, found), strict=True))


@pytest.fixture
def rng():
    return fresh_rng()


def attend(monkeypatch, case, shape=None, *, fresh=False, order=None, rows_after=2):
    """(rows that the kernels leave, those of `case` and a few after them; the kernels).

    shape: (warps, keys a part) in place of choose_shape's; None: batch_invariant. fresh: queries and the newest keys
    and values are there after a wait only. order: of the requests, as it is told where more blocks begin than fit.
    """
    qkv, k, v, tables, lens, _, num_decodes, scale, num_heads, num_kv_heads, head_dim, block_size = case
    emulator, made = DecodeEmulator(32, 0), []
    out = poisoned(len(qkv) + rows_after, num_heads * head_dim)
    if fresh:
        newest = [(tables[i, (n - 1) // block_size], slice(None), (n - 1) % block_size) for i, n in enumerate(lens)]
        places = [(qkv, ...)] + [(cache, place) for cache in (k, v) for place in newest]
        contents = [array[place].copy() for array, place in places]

        def before(done):
            for (array, place), content in zip(places, contents):
                array[place] = content if done else POISON

        emulator.before = before

    def run(kernel, grid, threads, shared_bytes, *arguments):
        made.append((kernel.__name__, threads, grid))
        emulator.num_threads, emulator.shared_bytes = threads, shared_bytes
        kinds = {"uint64": np.uint64, "int32": int, "float32": np.float32}
        emulator.run_grid(emulator.translate(kernel.py_func), [
            kinds[name](x) for name, x in zip(kernel._signature, arguments, strict=True)], grid)

    def array(content):
        return types.SimpleNamespace(address=emulator.put(content), shape=content.shape)

    device = types.SimpleNamespace(MULTIPROCESSOR_COUNT=132)
    monkeypatch.setattr(operations, "cuda", types.SimpleNamespace(get_current_device=lambda: device))
    fused = operations.FusedOperations(None, hopper=True, batch_invariant=shape is None)
    monkeypatch.setattr(fused, "_run", run)
    monkeypatch.setattr(fused, "_workspace", lambda size: emulator.put(np.full(size, np.nan, np.float32)))
    if shape is not None:
        monkeypatch.setattr(decode_registers, "choose_shape", lambda *sizes: shape)
    if order is not None:
        fused.hints = decode_registers.Hints(array(np.array(order, np.int32)))
        fused.num_multiprocessors = 1
    fused.attention(array(out), *(array(x) if isinstance(x, np.ndarray) else x for x in case))
    assert [name for name, *_ in made] == ["decode", "combine_parts"][:len(made)]
    return out, made


@pytest.fixture
def check(rng, monkeypatch):
    def run(heads, contexts, warps, part_keys, change=lambda case: None, block_size=16, **options):
        case = attention_case(rng, *heads, block_size, contexts, [1] * len(contexts))
        expected = poisoned(len(contexts), heads[0] * heads[2])
        attention_numpy(expected, *case)
        change(case)
        out, made = attend(monkeypatch, case, (warps, part_keys), **options)
        assert made[0][1] == 32 * warps and len(made) == 1 + (case[3].shape[1] * block_size > part_keys)
        assert_close(out[:len(contexts)], expected)
        assert (out[len(contexts):] == POISON).all()

    return run


@pytest.mark.parametrize("heads", [(1, 1, 64), (4, 1, 64), (7, 1, 64), (10, 1, 64), (18, 1, 64), (8, 2, 128)], ids=str)
def test_groups_of_heads(check, heads):
    check(heads, [37], 2, 64)


@pytest.mark.parametrize("contexts", [[1, 15, 16], [17, 31, 32], [33, 48, 65]], ids=str)
@pytest.mark.parametrize("warps", [1, 2])
def test_ends_of_contexts(check, contexts, warps):
    check((4, 2, 64), contexts, warps, 128)


def test_as_many_warps_as_there_may_be(check):
    """Most of them without a key."""
    check((4, 1, 64), [40], 16, 512)


def test_parts_are_combined(check):
    check((4, 1, 64), [1, 31, 32, 33, 64, 97], 2, 32)


def test_more_parts_than_a_warp_has_lanes(check):
    check((1, 1, 64), [16 * 38 - 3], 1, 16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_tiles_than_a_warp_has_lanes(check, head_dim):
    """So that the block table is looked up several times."""
    check((2, 1, head_dim), [16 * 67 - 5], 1, 4096)


def test_tiles_within_a_larger_block(check):
    check((4, 2, 64), [70, 33], 2, 64, block_size=32)


@pytest.mark.parametrize("part_keys", [64, 512])
def test_any_order_gives_the_same(check, part_keys):
    check((4, 2, 64), [40, 3, 130, 17], 2, part_keys, order=[2, 0, 3, 1])


def test_requests_are_taken_in_the_order_that_is_told(rng, monkeypatch):
    """So those that it leaves out are not computed."""
    case = attention_case(rng, 4, 2, 64, 16, [40, 3, 130, 17], [1] * 4)
    whole, _ = attend(monkeypatch, case, (2, 512))
    out, _ = attend(monkeypatch, case, (2, 512), order=[2, 0, 2, 0])
    np.testing.assert_array_equal(out[[0, 2]], whole[[0, 2]])
    assert (out[[1, 3]] == POISON).all()


def test_rows_without_a_context_are_left_alone(rng, monkeypatch):
    case = list(attention_case(rng, 4, 1, 64, 16, [40, 20, 33], [1, 1, 1]))
    expected = poisoned(3, 256)
    attention_numpy(expected, *case)
    case[4] = np.array([40, 0, 33], np.int32)
    out, _ = attend(monkeypatch, case, (2, 32))
    assert_close(out[[0, 2]], expected[[0, 2]])
    assert (out[[1, 3, 4]] == POISON).all()


def test_spare_columns_of_the_block_table_are_not_followed(check):
    def change(case):
        for table, length in zip(case[3], case[4]):
            table[-(-length // 16):] = 2**31 - 1

    check((2, 1, 64), [33, 70], 2, 64, change)


@pytest.mark.parametrize("contexts", [[1, 16, 17], [32, 33, 80], [129, 96]], ids=str)
def test_what_the_kernel_before_writes_is_not_read_before_it_has_ended(check, contexts):
    """Queries, and the newest keys and values."""
    check((2, 1, 64), contexts, 2, 64, fresh=True)


@pytest.mark.parametrize("context", [150, 290])
def test_batch_invariant_rows_depend_neither_on_the_batch_nor_on_the_table(rng, monkeypatch, context):
    """Alone in a table that it needs; in one with room for three parts; among shorter and longer ones."""
    qkv, k, v, tables, lens, _, _, *sizes = attention_case(rng, 2, 1, 64, 16, [33, context, 530], [1] * 3)

    def rows(which, width):
        case = (qkv[which], k, v, np.ascontiguousarray(tables[which, :width]), lens[which],
                np.arange(len(which) + 1, dtype=np.int32), len(which), *sizes)
        out, made = attend(monkeypatch, case)
        assert made[0][1] == 32 * decode_registers.INVARIANT_SHAPE[0]
        assert made[0][2] == (1, -(-width * 16 // decode_registers.INVARIANT_SHAPE[1]), len(which))
        return out

    alone = rows([1], -(-context // 16))[0]
    np.testing.assert_array_equal(rows([1], 34)[0], alone)
    np.testing.assert_array_equal(rows([0, 1, 2], 34)[1], alone)


# ---- the choice: (requests, key heads, width) -> (warps, keys a part), on 132 multiprocessors ----


@pytest.mark.parametrize("requests, width, shape", [
    (1, 256, (16, 512)), (1, 8192, (16, 512)), (8, 256, (16, 512)), (16, 8192, (16, 8192)), (32, 512, (8, 8192)),
    (64, 4096, (8, 8192)), (128, 256, (2, 8192)), (256, 256, (2, 8192)), (256, 2048, (8, 8192)), (64, 512, (4, 8192))])
def test_the_choice_is_the_best_one_measured(requests, width, shape):
    """But where few kernels are worth more: with 1 warp in place of 2, 256 x 256 would take 32.0 us, not 32.7."""
    assert decode_registers.choose_shape(8 * requests, width, 132, 16) == shape


@pytest.mark.parametrize("contexts, wanted", [
    ([4000] + [200] * 63, 2), ([4000] + [500] * 63, 2), ([7800] + [4000] * 15, 2), ([4000] + [1000] * 63, 1),
    (range(100, 4096, 62), 1), ([2000] + [100] * 127, 1), ([1000] + [100] * 63, 1), (range(100, 2000, 48), 1),
    ([4000] * 64, 0), ([4000] * 8, 0), ([4000], 0), ([400, 10], 0), (range(200, 2048, 8), 0), ([1], 0)], ids=str)
def test_contexts_are_uneven_if_one_would_be_left_alone(contexts, wanted):
    assert decode_registers.unevenness(max(contexts), sum(contexts), len(contexts), 8, 132) == wanted


@pytest.mark.parametrize("requests, width, shape", [(64, 4096, (8, 1024)), (64, 512, (4, 512)), (16, 8192, (16, 2048)),
                                                    (256, 65536, (8, 8192)), (1, 8192, (16, 512))])
def test_uneven_contexts_are_cut_in_four(requests, width, shape):
    assert decode_registers.choose_shape(8 * requests, width, 132, 16, in_parts=True) == shape


@pytest.mark.parametrize("head_dim, group", [(64, 1), (64, 4), (64, 16), (128, 8)])
def test_whatever_is_chosen_fits(head_dim, group):
    """And at least half of the GPU has something to do, but where contexts are too short to be split for it."""
    at_once, warps_seen = decode_registers.warps_at_once(head_dim, group), set()
    for multiprocessors in (1, 78, 132):
        for contexts in (*range(1, 300), 1000, 2048, 100_000):
            for width in (16, 256, 512, 1000, 4096, 131_072):
                for in_parts in (False, True):
                    warps, part_keys = decode_registers.choose_shape(contexts, width, multiprocessors, at_once,
                                                                     in_parts)
                    assert part_keys % 16 == 0 and -(-width // part_keys) < 2**16
                    warps_seen.add(warps)
                warps, part_keys = decode_registers.choose_shape(contexts, width, multiprocessors, at_once)
                assert part_keys % 16 == 0 and -(-width // part_keys) < 2**16
                blocks = contexts * -(-width // part_keys)
                assert part_keys == decode_registers.SHORTEST_PART or blocks > multiprocessors / 2
    assert warps_seen == ({16, 8, 4, 2} if at_once == 16 else {8, 4, 2})


def test_where_it_cannot_run():
    can_run = decode_registers.can_run
    assert can_run(64, 40, 16) and can_run(128, 8, 48)
    assert not (can_run(80, 4, 16) or can_run(64, 4, 24) or can_run(128, 16, 16))
