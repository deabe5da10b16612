"""The instructions that hopper_emulator.py can do: PTX text, what it means for a thread, and for those it meets.

Written after the PTX ISA manual (wgmma's fragments, matrix descriptors, swizzling), and independent of
tinyvllm.kernels.attention.fragments.
"""

import re
import threading
import time
from functools import cache

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16

SHARED_AT = 4096  # address of dynamic shared memory
WINDOW = 1 << 24  # the shared memory of the block of rank r in the cluster is also at (r + 1) * WINDOW


class Pending:
    """A register that a product will write. No arithmetic: that raises TypeError, which is the point."""

    def __init__(self, group, place):
        self.group, self.place = group, place


class Meeting:
    """`size` threads come together; the last one combines what they brought for all."""

    def __init__(self, emulator, size):
        self.emulator, self.size, self.brought, self.round = emulator, size, {}, 0
        self.condition = threading.Condition()

    def join(self, who, what, value, combine):
        with self.condition:
            assert who not in self.brought
            self.brought[who] = what, value
            if len(self.brought) == self.size:
                texts = {text for text, _ in self.brought.values()}
                assert len(texts) == 1, f"threads that must do the same do {texts}"
                self.result = combine({k: v for k, (_, v) in sorted(self.brought.items())})
                self.brought, self.round = {}, self.round + 1
                self.condition.notify_all()
                return self.result
            mine = self.round
            self.emulator.wait_for(self.condition, lambda: self.round != mine, what)
            return self.result


class ClusterBarrier:
    """barrier.cluster: all threads of all blocks arrive, and later wait for the others to have arrived."""

    def __init__(self, emulator, size):
        self.emulator, self.size, self.arrived, self.phase = emulator, size, 0, 0
        self.condition = threading.Condition()

    def arrive(self, thread):
        with self.condition:
            assert thread.phase == self.phase, "arrived twice, or left out a wait"
            thread.phase += 1
            self.arrived += 1
            if self.arrived == self.size:
                self.arrived, self.phase = 0, self.phase + 1
                self.condition.notify_all()

    def wait(self, thread):
        with self.condition:
            phase = thread.phase
            self.emulator.wait_for(self.condition, lambda: self.phase >= phase, "barrier.cluster")
            thread.waits = phase


class MBarrier:
    def __init__(self, count):
        self.count = self.left = count
        self.bytes = self.phase = 0
        self.copies = []  # late: not done yet

    def update(self, arrivals=0, num_bytes=0):
        before = self.phase
        self.left -= arrivals
        self.bytes += num_bytes
        assert self.left >= 0, "more arrivals than a phase has"
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left = self.phase ^ 1, self.count
        return self.phase != before


class Group:
    """The products that a warpgroup committed together, and each thread's sums before them."""

    def __init__(self, emulator, threads):
        self.emulator, self.threads, self.sums = emulator, threads, None

    def reads(self, start, end):
        """Whether these products read shared memory from start to end."""
        for _, a, b, _, n, transposed in next(iter(self.threads.values()))[0] if self.threads else ():
            for what in ([(a, 64, 16, False)] if isinstance(a, int) else []) + [(b, n, 16, transposed)]:
                addresses = self.emulator.operand_addresses(*what)
                if addresses.min() < end and addresses.max() >= start:
                    return True
        return False

    def compute(self):
        if self.sums is not None:
            return
        lanes = sorted(self.threads)
        self.sums = {t: {name: value.group.sums[t][value.place] if isinstance(value, Pending) else value
                         for name, value in self.threads[t][1].items()} for t in lanes}
        for step in range(len(self.threads[lanes[0]][0])):
            ops = [self.threads[t][0][step] for t in lanes]
            registers, a, b, add, n, transposed = ops[0]
            assert all(op[0] == registers and op[2:] == (b, add, n, transposed) for op in ops)
            if isinstance(a, int):
                assert all(op[1] == a for op in ops)
                left = self.emulator.operand(a, 64, 16, False)
            else:
                left = np.zeros((64, 16), np.uint16)
                for i, op in enumerate(ops):
                    for r, pair in enumerate(op[1]):
                        row, column = 16 * (i // 32) + i % 32 // 4 + 8 * (r % 2), i % 4 * 2 + 8 * (r // 2)
                        left[row, column], left[row, column + 1] = pair & 0xFFFF, pair >> 16
            product = bf16_to_float32(left) @ bf16_to_float32(self.emulator.operand(b, n, 16, transposed)).T
            for i, t in enumerate(lanes):
                mine = self.sums[t]
                for r, name in enumerate(registers):
                    value = product[16 * (i // 32) + i % 32 // 4 + 8 * (r // 2 % 2), r // 4 * 8 + i % 4 * 2 + r % 2]
                    mine[name] = np.float32(mine[name] + value) if add else value


@cache
def parse(text):
    """[(label or None, (predicate, opcode, operands))] of PTX; operands are names, or lists of them."""
    statements = []
    if text.startswith("{"):  # a scope, for registers of its own
        text = text[1:text.rindex("}")]
    for part in (p.strip() for p in text.split(";")):
        if not part or part.startswith(".reg"):
            continue
        label = None
        if found := re.match(r"(\w+):\s*", part):
            label, part = found[1], part[found.end():]
        predicate = None
        if found := re.match(r"@(!?\w+)\s+", part):
            predicate, part = found[1], part[found.end():]
        opcode, _, rest = part.partition(" ")
        operands, stack = [], [[]]
        for token in re.findall(r"[\[\]{}]|[^\s,\[\]{}]+", rest):
            if token in "[{":
                stack.append([])
            elif token in "]}":
                inner = stack.pop()
                stack[-1].append(inner)
            else:
                stack[-1].append(token)
        operands = stack[0]
        statements.append((label, (predicate, opcode, operands)))
    return statements


class Instructions:
    """Of an Emulator, which has the memory, the barriers and the threads."""

    def meet(self, meeting, what, value=None, combine=lambda values: None):
        return meeting.join(self.local.thread, what, value, combine)

    def execute(self, text, values, num_outputs, tied=0):
        """The outputs of PTX for this thread; values: its inputs as integers and float32."""
        registers = {f"${num_outputs + i}": value for i, value in enumerate(values)}
        registers.update({f"${i}": values[i] for i in range(tied)})
        products = []
        statements = parse(text)
        labels = {label: i for i, (label, _) in enumerate(statements) if label}
        place = 0
        while place < len(statements):
            predicate, opcode, operands = statements[place][1]
            place += 1
            if predicate and not registers[predicate]:
                continue
            if opcode == "bra":
                place = labels[operands[0]]
            elif opcode:
                self.step(opcode, operands, registers, products)
        return [registers[f"${i}"] for i in range(num_outputs)]

    def step(self, opcode, operands, registers, products):
        def get(name):
            if name in registers:
                return registers[name]
            base, plus, offset = name.partition("+")
            return registers[base] + int(offset) if plus else int(name, 0)

        self.num_steps += 1
        name = opcode.split(".")[0]
        handler = getattr(self, "do_" + name, None)
        if handler is not None:
            handler(opcode, operands, registers, get, products)
            return
        thread = self.local.thread
        special = {"%tid.x": thread, "%laneid": thread % 32, "%nctaid.x": self.num_blocks,
                   **{f"%ctaid.{axis}": i for axis, i in zip("xyz", self.here.index)}}
        if name == "mov" and isinstance(operands[1], list):  # two halves
            low, high = map(get, operands[1])
            registers[operands[0]] = high << 32 | low
            return
        a = [special[x] if x in special else get(x) for x in operands[1:]]
        f32 = opcode.endswith(".f32")
        if any(isinstance(x, Pending) for x in a):
            raise TypeError(f"{opcode} of sums that nobody has waited for")
        if name == "mov":
            result = a[0]
        elif opcode.startswith("cvt.rn.bf16x2"):  # the second operand is the lower half
            high, low = (int(float32_to_bf16(np.array([x], np.float32))[0]) for x in a)
            result = high << 16 | low
        elif name == "setp":
            result = {"eq": a[0] == a[1], "ne": a[0] != a[1]}[opcode.split(".")[1]]
        else:
            compute = {"add": lambda x, y: x + y, "neg": lambda x: -x, "fma": lambda x, y, z: x * y + z,
                       "ex2": np.exp2, "rcp": lambda x: np.float32(1) / x, "max": np.fmax,
                       "popc": lambda x: x.bit_count(), "div": lambda x, y: x / y if f32 else x // y,
                       "shl": lambda x, y: x << y & 0xFFFFFFFF, "and": lambda x, y: x & y}[name]
            result = np.float32(compute(*a)) if f32 else compute(*a)
        registers[operands[0]] = result

    def do_fence(self, *_):
        pass

    def do_ld(self, opcode, operands, registers, get, _):
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        address = get(operands[1][0])
        assert address % (4 * len(names)) == 0
        find = self.finder(opcode)
        registers.update(zip(names, map(int, find(address, 4 * len(names)).view(np.uint32)), strict=True))

    def do_st(self, opcode, operands, registers, get, _):
        values = [get(x) for x in (operands[1] if isinstance(operands[1], list) else [operands[1]])]
        address = get(operands[0][0])
        assert address % (4 * len(values)) == 0
        assert ".shared" in opcode or self.local.waited or not self.made_before, "before the kernel ahead has ended"
        find = self.finder(opcode)
        kind = np.float32 if opcode.endswith(".f32") else np.uint32
        find(address, 4 * len(values))[:] = np.array(values, kind).view(np.uint8)

    def finder(self, opcode):
        if ".shared::cluster" in opcode:
            return lambda address, size: self.part_of(*self.block_of(address), size)
        return self.shared_at if ".shared" in opcode else self.bytes_at

    @staticmethod
    def part_of(block, address, size):
        return block.part(address, size)

    def do_mapa(self, opcode, operands, registers, get, _):
        address, rank = get(operands[1]), get(operands[2])
        assert address < WINDOW and rank < len(self.cluster)
        registers[operands[0]] = (rank + 1) * WINDOW + address

    def do_griddepcontrol(self, opcode, *_):
        self.local.waited |= opcode.endswith(".wait")

    def do_barrier(self, opcode, operands, registers, get, _):
        assert opcode.startswith("barrier.cluster.")
        if ".arrive" in opcode:
            self.cluster_barrier.arrive(self.local)
        else:
            self.cluster_barrier.wait(self.local)
            self.step_back()

    def warp(self, what, value, combine):
        return self.meet(self.here.warps[self.local.thread // 32], what, value, combine)

    def do_shfl(self, opcode, operands, registers, get, _):
        lanes, thread = get(operands[2]), self.local.thread
        registers[operands[0]] = self.warp(f"{opcode} {lanes}", get(operands[1]), lambda v: v)[thread ^ lanes]

    def do_redux(self, opcode, operands, registers, get, _):
        combine = sum if ".add" in opcode else max
        registers[operands[0]] = self.warp(opcode, get(operands[1]), lambda v: combine(v.values()))

    def do_vote(self, opcode, operands, registers, get, _):
        registers[operands[0]] = self.warp(opcode, bool(registers[operands[1]]),
                                           lambda v: sum(bit << t % 32 for t, bit in v.items()))

    def do_bar(self, opcode, operands, registers, get, _):
        if opcode.startswith("bar.warp"):
            self.warp(opcode, None, lambda v: None)
        else:
            assert get(operands[1]) == 128 and get(operands[0]) > 0
            self.meet(self.here.named[get(operands[0])], opcode)

    def do_stmatrix(self, opcode, operands, registers, get, _):
        values = [get(x) for x in operands[1]]

        def combine(all_lanes):
            lanes = list(all_lanes.values())
            for matrix in range(4):
                for row in range(8):
                    line = np.array([lanes[4 * row + q][1][matrix] for q in range(4)], np.uint32)
                    self.shared_at(lanes[8 * matrix + row][0], 16)[:] = line.view(np.uint8)

        self.warp(opcode, (get(operands[0][0]), values), combine)

    def do_mbarrier(self, opcode, operands, registers, get, _):
        if ".try_wait" in opcode:
            self.idle()
        completed, place = False, operands[1 if ".init" not in opcode else 0][0]
        assert ".shared::cluster" in opcode or get(place) < WINDOW
        with self.lock:
            block, address = self.block_of(get(place))
            if ".init" in opcode:
                block.barriers[address] = MBarrier(get(operands[1]))
            elif ".try_wait" in opcode:
                barrier, parity = block.barriers[address], get(operands[2])
                for copy in barrier.copies:
                    self.finish_copy(barrier, copy)
                barrier.copies = []
                self.wait_for(self.lock, lambda: barrier.phase != parity or barrier.copies,
                              f"barrier at {address - SHARED_AT} of block {block.rank}, parity {parity}")
                registers[operands[0]] = barrier.phase != parity
            else:
                expected = get(operands[2]) if "expect_tx" in opcode else 0
                completed = block.barriers[address].update(1, expected)
            self.lock.notify_all()
        if completed and self.late == "products":
            time.sleep(0.002)
        if ".try_wait" in opcode:
            self.step_back()

    def finish_copy(self, barrier, copy):
        block, to, array, box, corner = copy
        self.copy_box(block, to, array, box, corner)
        barrier.update(0, -2 * int(np.prod(box)))

    def do_cp(self, opcode, operands, registers, get, _):
        address = get(operands[1][0])
        array, box = self.maps[address]
        assert self.local.waited or address not in self.made_before, "before the kernel ahead has made it"
        corner = [get(x) for x in operands[1][1]][::-1]
        corner = [c - (1 << 32) if c >> 31 else c for c in corner]
        receivers = [self.here]
        if ".L2::cache_hint" in opcode:
            self.hints.add(get(operands[-1]))
        if ".multicast" in opcode:
            mask = get(operands[3])
            assert 0 < mask < 1 << len(self.cluster)
            receivers = [block for block in self.cluster if mask >> block.rank & 1]
        with self.lock:
            for block in receivers:
                self.reach(block)
                barrier = block.barriers[get(operands[2][0])]
                copy = block, get(operands[0][0]), array, box, corner
                if self.late == "copies":
                    barrier.copies.append(copy)
                else:
                    self.finish_copy(barrier, copy)
            self.lock.notify_all()

    def do_wgmma(self, opcode, operands, registers, get, products):
        meeting, pending = self.here.warpgroups[self.local.thread // 128]
        if ".mma_async" in opcode:
            n = int(re.search(r"m64n(\d+)k16", opcode)[1])
            from_registers = isinstance(operands[1], list)
            a = tuple(get(x) for x in operands[1]) if from_registers else get(operands[1])
            assert [get(x) for x in operands[4:6]] == [1, 1] and len(operands[0]) == n // 2
            transposed = bool(get(operands[-1]))
            assert from_registers or not get(operands[6])
            products.append((tuple(operands[0]), a, get(operands[2]), bool(registers[operands[3]]), n, transposed))
        elif ".commit" in opcode:
            names = dict.fromkeys(name for product in products for name in product[0])
            before = {name: registers.get(name) for name in names}

            def commit(threads):
                group = Group(self, threads)
                pending.append(group)
                if self.late != "products":
                    group.compute()
                return group

            # products on the same sums may follow each other: the tensor cores do them in order
            for name, value in before.items():
                assert not isinstance(value, Pending) or value.place == name, "sums in other registers than before"
            group = self.meet(meeting, opcode, (tuple(products), before), commit)
            registers.update({name: Pending(group, name) for name in names})
        elif ".wait_group" in opcode:
            left = get(operands[0])

            def finish(_):
                while len(pending) > left:
                    group = pending.pop(0)
                    group.compute()
                    group.done = True

            self.meet(meeting, f"{opcode} {left}", None, finish)
            for name, value in registers.items():
                if isinstance(value, Pending) and getattr(value.group, "done", False):
                    registers[name] = value.group.sums[self.local.thread][value.place]
