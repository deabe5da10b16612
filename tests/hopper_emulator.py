"""Runs a kernel of compute capability 9.0 without a GPU: its own Python code and the text of its own instructions.

The threads of a block, or of a cluster of blocks, are Python threads. Where the kernel calls an instruction, its PTX
is interpreted here; where it calls a hopper.sequence, that is built with a builder that computes instead of writing
LLVM code. Shared memory is bytes: the copy engine puts boxes there as the hardware swizzles them, and wgmma reads
them as its descriptors say.

What a GPU does in its own time happens as early and as late as it may. late="copies": copies are done when somebody
waits for them, products at once: what is used before it was waited for is not there. late="products": the other way
round, and who frees memory steps back for the others: what is overwritten too early is gone. slow: the rank of a
block that does everything a little later than the others of its cluster. idler: a thread that looks at a barrier
only when no other thread can do anything more without it.

Sums of a product that nobody has waited for are no numbers here, and using them is an error. So are a barrier that
never completes, threads of a warp or warpgroup that do not come together at the same instruction, reading or writing
outside of an array, copying over what a product under way still reads, reaching into another block before its
barriers are there or after its threads have left, and touching what the kernel before makes (made_before) without
having waited for it. Rounding is as on the GPU but for the last bits of sums and of 2^x.

Some 100,000 instructions a second, of all threads together.
"""

import math
import threading
import time
import types

import numpy as np

from tests.hopper_instructions import SHARED_AT, WINDOW, ClusterBarrier, Instructions, Meeting, Pending

PATIENCE = 120.0  # seconds until a wait counts as for ever

_NUMPY = {"u16": np.uint16, "u32": np.uint32, "i32": np.int32, "u64": np.uint64, "f32": np.float32}
_MASK = {"u16": 0xFFFF, "u32": 0xFFFFFFFF, "i32": 0xFFFFFFFF, "u64": (1 << 64) - 1}


def names_in(code):
    """Global names that a function uses, and the functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


class Block:
    """What the threads of one block have to themselves."""

    def __init__(self, emulator, index, rank):
        size = emulator.num_threads
        self.index, self.rank, self.running = index, rank, size
        self.reached, self.left = 0, math.inf  # the cluster's barriers that it has to wait for; that its threads did
        self.shared = np.full(emulator.shared_bytes, 0xFF, np.uint8)  # NaN, if anybody looks
        self.barriers = {}
        self.warps = [Meeting(emulator, 32) for _ in range(size // 32)]
        self.named = {0: Meeting(emulator, size)}
        self.named.update({i: Meeting(emulator, 128) for i in range(1, 16)})
        self.warpgroups = [(Meeting(emulator, 128), []) for _ in range(size // 128)]

    def part(self, address, size):
        start = address - SHARED_AT
        assert 0 <= start and start + size <= self.shared.size and address % min(size, 16) == 0, hex(address)
        return self.shared[start:start + size]


class Emulator(Instructions):
    def __init__(self, threads, shared_bytes, late="copies", slow=None, idler=None):
        assert late in ("copies", "products")
        self.num_threads, self.shared_bytes, self.late, self.slow = threads, shared_bytes, late, slow
        self.idler, self.num_steps = idler, 0
        self.arrays, self.maps, self.next_address = [], {}, 1 << 32
        self.made_before = set()  # maps that only the kernel before fills
        self.hints = set()  # that copies gave the L2 cache
        self.local, self.lock = threading.local(), threading.Condition()
        self.failure = None
        self.translated = {}

    @property
    def here(self):
        return self.local.block

    # ---- memory ----

    def put(self, array):
        """Address of a (C-contiguous) array; kernels read and write the array itself."""
        address, self.next_address = self.next_address, self.next_address + (array.nbytes + 8191) // 4096 * 4096
        self.arrays.append((address, array.reshape(-1).view(np.uint8)))
        return address

    def map(self, array, box):
        """A tensor map of an array, and boxes of it in the order of its axes."""
        address = self.put(np.zeros(128, np.uint8))
        self.maps[address] = array, box
        return address

    def bytes_at(self, address, size):
        for start, data in self.arrays:
            if start <= address and address + size <= start + data.size:
                return data[address - start:address - start + size]
        raise IndexError(f"{size} bytes at {address:#x} belong to no array")

    def block_of(self, address):
        """(block, address there) of an address in the cluster's shared memory."""
        if address < WINDOW:
            return self.here, address
        block = self.cluster[address // WINDOW - 1]
        self.reach(block)
        return block, address % WINDOW

    def reach(self, block):
        """Into another block: it has to be there, and has to stay until a barrier that comes after this."""
        if block is not self.here:
            assert block.running and self.local.waits, f"the block of rank {block.rank} may not be there"
            block.reached = max(block.reached, self.local.phase + 1)

    def shared_at(self, address, size):
        return self.here.part(address, size)

    @staticmethod
    def operand_addresses(descriptor, rows, depth, transposed):
        """Of what wgmma reads, [rows, depth]. Rows are of the left side, or columns of the right one."""
        assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0, "128-byte swizzle, no base offset"
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        r, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
        if transposed:  # 64 of `rows` lie side by side, k goes down
            assert rows == 64
            r, k = k, r
        address = start + r // 8 * stride + r % 8 * 128 + 2 * k
        return address ^ (address >> 7 & 7) << 4

    def operand(self, *what):
        """uint16 [rows, depth]."""
        return self.here.shared.view(np.uint16)[(self.operand_addresses(*what) - SHARED_AT) // 2]

    def copy_box(self, block, to, array, box, corner):
        """A box of the copy engine into shared memory: zeros beyond the array, 16-byte chunks swizzled."""
        content = np.zeros(box, np.uint16)
        here = tuple(slice(max(0, min(c, n)), max(0, min(c + b, n))) for c, b, n in zip(corner, box, array.shape))
        there = tuple(slice(s.start - c, s.stop - c) for s, c in zip(here, corner))
        if all(s.stop > s.start for s in here):
            content[there] = array[here]
        assert box[-1] == 64 and to % 128 == 0
        address = to + np.arange(content.size * 2)
        for _, pending in block.warpgroups:
            assert not any(group.reads(to, to + content.nbytes) for group in pending), "a product still reads this"
        block.shared[(address ^ (address >> 7 & 7) << 4) - SHARED_AT] = content.reshape(-1).view(np.uint8)

    # ---- running ----

    def run(self, function, arguments, block=0, num_blocks=1):
        """One block, each of whose threads calls a (translated) function with these arguments."""
        self.run_cluster(function, arguments, [(block, 0, 0)], num_blocks)

    def run_cluster(self, function, arguments, indices, num_blocks):
        """Blocks that run together, by their indices (x, y, z) in a grid of num_blocks along x."""
        self.num_blocks = num_blocks
        self.cluster = [Block(self, index, rank) for rank, index in enumerate(indices)]
        self.cluster_barrier = ClusterBarrier(self, self.num_threads * len(indices))

        def work(block, thread):
            self.local.block, self.local.thread, self.local.waited = block, thread, False
            self.local.phase = self.local.waits = 0
            try:
                self.step_back()
                with np.errstate(over="raise", invalid="ignore"):
                    function(*arguments)
            except BaseException as error:
                with self.lock:
                    self.failure = self.failure or error
                    self.lock.notify_all()
            with self.lock:
                block.left = min(block.left, self.local.waits)
                block.running -= 1

        threads = [threading.Thread(target=work, args=(b, t), daemon=True)
                   for b in self.cluster for t in range(self.num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        assert all(block.left >= block.reached for block in self.cluster), "a block leaves while others may need it"

    def step_back(self):
        """The slow block gives the others time."""
        if self.here.rank == self.slow:
            time.sleep(0.003)

    def idle(self):
        """The idler lets the others go on until they need it; on a busy machine, until they seem to."""
        while self.local.thread == self.idler:
            before = self.num_steps
            time.sleep(0.1)
            if self.num_steps == before:
                return

    def wait_for(self, condition, until, what):
        waited = 0.0
        while not condition.wait_for(until, timeout=0.5):
            waited += 0.5
            if self.failure is not None:
                raise RuntimeError("another thread failed")
            if waited >= PATIENCE:
                raise TimeoutError(f"thread {self.local.thread} waits for ever: {what}")

    def translate(self, value):
        """A kernel's function, or what it refers to, with instructions replaced by their emulation."""
        if id(value) in self.translated:
            return self.translated[id(value)][0]
        result = value
        if hasattr(value, "ptx"):
            text, outputs, inputs = value.ptx

            def result(*arguments):
                values = self.execute(text, [self.raw(a, k) for a, k in zip(arguments, inputs, strict=True)],
                                      len(outputs))
                values = tuple(self.typed(v, k) for v, k in zip(values, outputs, strict=True))
                return values if len(values) > 1 else values[0] if values else None
        elif hasattr(value, "sequence"):
            result = self.sequence(*value.sequence)
        elif hasattr(value, "py_func"):
            result = self.translate(value.py_func)
        elif getattr(value, "__name__", None) == "emit" or getattr(value, "_name", None) == "emit":
            def result(builder, text, outputs, inputs, values, *, tied=0, memory=False, volatile=False):
                raws = [self.raw(v, k) for v, k in zip(values, inputs.split(), strict=True)]
                found = self.execute(text, raws, len(outputs.split()), tied)
                return [self.typed(v, k) for v, k in zip(found, outputs.split(), strict=True)]
        elif isinstance(value, types.FunctionType) and value.__module__.startswith("tinyvllm"):
            scope = {n: self.translate(value.__globals__[n]) for n in names_in(value.__code__)
                     if n in value.__globals__}
            cells = tuple(types.CellType(self.translate(c.cell_contents)) for c in value.__closure__ or ())
            result = types.FunctionType(value.__code__, {**scope, "__builtins__": __builtins__}, value.__name__,
                                        value.__defaults__, cells)
            result.__kwdefaults__ = value.__kwdefaults__
        elif getattr(value, "_name", None) == "dynamic_shared":
            def result():
                return np.uint32(SHARED_AT)
        elif getattr(value, "__name__", None) == "numba.cuda":
            result = types.SimpleNamespace(syncthreads=lambda: self.meet(self.here.named[0], "syncthreads"))
        self.translated[id(value)] = result, value
        return result

    def sequence(self, outputs, inputs, build):
        build, builder = self.translate(build), Builder()
        kinds = [word.partition("*")[0] for word in inputs.split()]

        def call(*arguments):
            lists = [[self.typed(self.raw(v, kind), kind) for v in (a if isinstance(a, tuple) else (a,))]
                     for a, kind in zip(arguments, kinds, strict=True)]
            results = build(builder, *lists)
            kind, _, count = outputs.partition("*")
            results = [self.typed(self.raw(v, kind), kind) for v in results]
            assert not count or len(results) == int(count)
            return tuple(results) if count else results[0] if results else None

        return call

    @staticmethod
    def raw(value, kind):
        value = getattr(value, "constant", value)
        if isinstance(value, Pending):
            return value
        return np.float32(value) if kind == "f32" else int(value) & _MASK[kind]

    @staticmethod
    def typed(value, kind):
        if kind == "f32" and isinstance(value, int):  # a register's bits
            return np.uint32(value).view(np.float32)
        if kind == "i32":
            return np.int32(value - (1 << 32) if value >> 31 else value)
        return value if isinstance(value, Pending) else _NUMPY[kind](value)


class Builder:
    """As much of llvmlite's IRBuilder as the sequences use, on numbers."""

    @staticmethod
    def _number(value):
        value = getattr(value, "constant", value)
        if isinstance(value, Pending):
            raise TypeError("sums that nobody has waited for")
        return value if isinstance(value, np.floating | float) else int(value)

    def __getattr__(self, name):
        number = self._number
        return {"add": lambda a, b: number(a) + number(b), "xor": lambda a, b: number(a) ^ number(b),
                "shl": lambda a, b: number(a) << number(b), "lshr": lambda a, b: number(a) >> number(b),
                "and_": lambda a, b: number(a) & number(b), "or_": lambda a, b: number(a) | number(b),
                "zext": lambda a, kind: number(a), "fmul": lambda a, b: np.float32(number(a) * number(b)),
                "fadd": lambda a, b: np.float32(number(a) + number(b)),
                "icmp_signed": lambda how, a, b: {"<=": number(a) <= number(b)}[how],
                "select": lambda condition, a, b: number(a) if condition else number(b)}[name]
