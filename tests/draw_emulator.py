"""Runs the kernels of tinyvllm/kernels/fused/draw.py and its neighbours without a GPU, on hopper_emulator.py.

Their own Python code, block by block, with the instructions that the Hopper kernels do not have. Grids are two-
dimensional here. Memory that no one has written is NaN, and reading outside of an array is an error.
"""

import math
from types import SimpleNamespace

import numpy as np

from tests.hopper_emulator import Emulator
from tinyvllm.kernels.fused import draw, key_bins, thresholds
from tinyvllm.kernels.fused.draw import choose_kernel, draw_kernel
from tinyvllm.kernels.fused.key_bins import count_kernel, record_bytes
from tinyvllm.kernels.fused.thresholds import find_kernel
from tinyvllm.kernels.ptx import load_u16, store_f32

TINY = SimpleNamespace(SMALLEST=126 << 7, DENSE=3 << 7, BINS=1024, COUNT_THREADS=64, DRAW_THREADS=64)  # 0.5 up to 4
FULL = SimpleNamespace(SMALLEST=key_bins.SMALLEST, DENSE=key_bins.DENSE, BINS=key_bins.BINS,
                       COUNT_THREADS=key_bins.COUNT_THREADS, DRAW_THREADS=draw.DRAW_THREADS)


class DrawEmulator(Emulator):
    def __init__(self, threads, shared_bytes):
        super().__init__(threads, shared_bytes)
        self.handlers = {function.ptx[0]: handler for function, handler in (
            (load_u16, lambda at: self.number(self.bytes_at(at, 2), np.uint16)),
            (draw.load_u64, lambda at: self.number(self.bytes_at(at, 8), np.uint64)),
            (store_f32, lambda at, x: self.write(self.bytes_at(at, 4), np.float32(x))),
            (thresholds.load_shared_u64, lambda at: self.number(self.shared_at(at, 8), np.uint64)),
            (thresholds.store_shared_u64, lambda at, x: self.write(self.shared_at(at, 8), np.uint64(x))),
            (thresholds.load_shared_f64, lambda at: self.number(self.shared_at(at, 8), np.uint64)),
            (thresholds.store_shared_f64, lambda at, x: self.write(self.shared_at(at, 8), np.float64(x))),
            (thresholds.add_shared_u64, lambda at, x: self.add(at, x, np.uint64)),
            (key_bins.add_one_shared, lambda at: self.add(at, 1, np.uint32)),
            (key_bins.take_number_shared, lambda at: self.add(at, 1, np.uint32)),
            (thresholds.shuffle_down_u64, lambda x, by: self.shuffle("down", x, lambda lane: lane + by)),
            (thresholds.shuffle_from_u64, lambda x, lane: self.shuffle("from", x, lambda _: lane % 32)),
            (draw.shuffle_xor_u32, lambda x, by: self.shuffle(f"xor {by}", x, lambda lane: lane ^ by)),
            (draw.multiply, lambda a, b: (a * b & 0xFFFFFFFF, a * b >> 32)),
            (draw.log2, lambda x: np.float32(np.log2(x))),
            (draw.bits_of_f64, lambda x: x if isinstance(x, int) else int(x.view(np.uint64))))}  # and f64_of_bits

    def execute(self, text, values, num_outputs, tied=0):
        if text not in self.handlers:
            return super().execute(text, values, num_outputs, tied)
        result = self.handlers[text](*values)
        return list(result) if isinstance(result, tuple) else [result][:num_outputs]

    @staticmethod
    def raw(value, kind):
        return np.float64(value) if kind == "f64" else Emulator.raw(value, kind)

    @staticmethod
    def typed(value, kind):
        if kind == "f64":
            return np.uint64(value).view(np.float64) if isinstance(value, int) else value  # a register's bits
        return Emulator.typed(value, kind)

    @staticmethod
    def number(data, dtype):
        return int(data.view(dtype)[0])

    @staticmethod
    def write(data, value):
        data[:] = np.array([value]).view(np.uint8)

    def add(self, at, value, dtype):
        with self.lock:
            place = self.shared_at(at, np.dtype(dtype).itemsize).view(dtype)
            before = int(place[0])
            place[0] = dtype((before + value) % 2 ** (8 * place.itemsize))
        return before

    def shuffle(self, what, value, source):
        lane = self.local.thread % 32
        values = list(self.meet(self.here.warps[self.local.thread // 32], what, value, lambda v: v).values())
        return values[source(lane)] if source(lane) < 32 else value

    def launch(self, kernel, grid, *arguments):
        """Block after block, as `kernel.direct.launch` of a two-dimensional grid."""
        function = self.translate(kernel.py_func)

        def run(*arguments):
            with np.errstate(all="ignore"):  # uint32 wraps, and float32 overflows to infinity, as on a GPU
                function(*arguments)

        for y in range(grid[1]):
            for x in range(grid[0]):
                self.run_cluster(run, arguments, [(x, y, 0)], grid[0])


def sample_emulated(ids, logits, temperature, top_k, top_p, seed, position, shape=TINY, count_parts=4, draw_parts=3):
    """sample_numpy by the kernels; returns the thresholds that they have found, float32 [rows]."""
    rows, vocab_size = logits.shape
    found, vectors = np.full(rows, np.nan, np.float32), vocab_size // 8
    records = np.full(rows * count_parts * record_bytes(shape.BINS), 0xFF, np.uint8)
    parts = np.full((rows, draw_parts, 2), 2**64 - 1, np.uint64)
    parameters = [np.ascontiguousarray(x) for x in (temperature, top_k, top_p)]
    count = count_kernel(False, shape.SMALLEST, shape.DENSE, shape.BINS, shape.COUNT_THREADS)
    find = find_kernel(False, shape.SMALLEST, shape.DENSE, shape.BINS)
    draws = draw_kernel(False, shape.DRAW_THREADS)

    def run(kernel, threads, grid, *arguments):
        emulator = DrawEmulator(threads, getattr(kernel, "shared_bytes", 0))
        emulator.launch(kernel, grid, *(np.uint64(emulator.put(x)) if isinstance(x, np.ndarray) else np.int32(x)
                                        for x in arguments))

    run(count, shape.COUNT_THREADS, (count_parts, rows), records, logits, *parameters, vocab_size,
        math.ceil(vectors / count_parts))
    run(find, find.threads, (rows, 1), found, records, logits, *parameters, vocab_size, count_parts)
    run(draws, shape.DRAW_THREADS, (draw_parts, rows), parts, found, logits, *parameters, seed, position, vocab_size,
        math.ceil(vectors / draw_parts))
    run(choose_kernel(False), 32, (rows, 1), ids, parts, draw_parts)
    return found
