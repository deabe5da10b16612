"""Instructions of compute capability 9.0a, for use inside CUDA kernels: the copy engine, barriers, wgmma, clusters.

Three ideas, which gemm/skinny.py, gemm/wgmma.py and attention/prefill_wgmma.py are made of:

    copy engine   one thread asks for a whole box of a matrix (tensor_load); it arrives in shared memory in the
    (TMA)         swizzled layout that the tensor cores read, and reports to a barrier there. The matrix is described
                  by a 128-byte tensor map in global memory (driver.tensor_map_bytes).
    mbarrier      a counter in shared memory with a phase bit: it flips when as many arrivals and bytes have come as
                  were announced. Who waits names the parity of the phase that is to end.
    wgmma         four warps (a warpgroup) multiply a 64 x 16 by a 16 x N tile, both read from shared memory by
                  descriptors, sums in registers. Rows of a tile are 64 values, 128 bytes, swizzled.

The sums of a warpgroup are up to 128 registers a thread: they travel as one tuple of float32, threaded through every
instruction that touches them, because the registers that an asynchronous wgmma writes must be named at every step.

Source: NVIDIA, "Parallel Thread Execution ISA", sections on cp.async.bulk.tensor, mbarrier, wgmma and clusters.
"""

from tinyvllm.kernels import ptx
from tinyvllm.kernels.ptx import INLINE, instruction

__all__ = ["sequence", "zeros", "multiply_64", "multiply_wait", "multiply_wait_all", "multiply_wait_one",
           "barrier_init", "barrier_expect", "barrier_arrive", "barrier_arrive_where_0", "barrier_wait",
           "barrier_arrive_in", "barriers_ready", "tensor_load", "tensor_load_3d", "tensor_load_hinted",
           "tensor_load_for_all", "EVICT_FIRST", "EVICT_NORMAL", "tensor_map_acquire", "tensor_store", "tensor_add",
           "stores_commit", "stores_read", "stores_done", "shared_to_engine", "cluster_arrive",
           "cluster_arrive_relaxed", "cluster_wait", "cluster_leave", "cluster_sum", "put_sums", "descriptor",
           "describe", "DESCRIPTORS", "group_barrier", "emit"]

if INLINE:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature as typing_signature


def emit(builder, text: str, outputs: str, inputs: str, values, *, tied: int = 0, memory: bool = False,
         volatile: bool = False) -> list:
    """Put one inline-assembly call into a function under construction; returns its results."""
    outputs, inputs = outputs.split(), inputs.split()
    results = [ptx._LLVM[name] for name in outputs]
    result = ir.VoidType() if not results else results[0] if len(results) == 1 else ir.LiteralStructType(results)
    constraints = [f"={ptx._REGISTER[name]}" for name in outputs] + [str(i) for i in range(tied)]
    constraints += [ptx._REGISTER[name] for name in inputs[tied:]] + (["~{memory}"] if memory else [])
    function = ir.FunctionType(result, [ptx._LLVM[name] for name in inputs])
    call = builder.call(ir.InlineAsm(function, text, ",".join(constraints), side_effect=memory or volatile), values)
    if memory or volatile:
        call.attributes.add("convergent")
    return [] if not outputs else [call] if len(outputs) == 1 else [builder.extract_value(call, i)
                                                                    for i in range(len(outputs))]


def sequence(outputs: str, inputs: str, build):
    """A function for CUDA kernels made of several instructions.

    outputs, inputs: type names separated by spaces, "f32*64" for a tuple. build(builder, *arguments) emits them: it
    gets each argument as a list of values, one or a tuple's, and returns a list. None where PTX cannot be used.
    """
    if not INLINE:
        return None

    def parse(text):
        name, _, count = text.partition("*")
        return types.UniTuple(ptx._NUMBA[name], int(count)) if count else ptx._NUMBA[name]

    arguments = [parse(word) for word in inputs.split()]
    result = parse(outputs) if outputs else types.void
    call_signature = typing_signature(result, *arguments)

    def codegen(context, builder, signature, values):
        unpacked = [[builder.extract_value(value, i) for i in range(kind.count)] if isinstance(kind, types.UniTuple)
                    else [value] for kind, value in zip(signature.args, values)]
        results = build(builder, *unpacked)
        if not outputs:
            return context.get_dummy_value()
        return context.make_tuple(builder, result, results) if "*" in outputs else results[0]

    names = "".join(f", a{i}" for i in range(len(arguments)))
    namespace = {"result": (call_signature, codegen)}
    exec(f"def ptx_sequence(typingctx{names}):\n    return result\n", namespace)  # noqa: S102
    function = intrinsic(namespace["ptx_sequence"])
    function.sequence = outputs, inputs, build  # for those who read kernels: the emulator of the tests
    return function


def zeros(count: int):
    """A tuple of float32 zeros."""
    return sequence(f"f32*{count}", "", lambda builder: [ir.Constant(ir.FloatType(), 0.0)] * count)


# ---- barriers in shared memory ----

barrier_init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "", "u32 u32", memory=True)
# for shared memory only: the fence for all of memory costs what a barrier for the whole GPU does
barriers_ready = instruction("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", "", "",
                             memory=True)
# one arrival, and so many bytes to come
barrier_expect = instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "u32 u32", memory=True)
barrier_arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "", "u32", memory=True)
# (barrier, number): only threads whose number is 0 arrive; no branch, so the compiler keeps products under way
barrier_arrive_where_0 = instruction("{ .reg .pred P; setp.eq.u32 P, $1, 0; "
                                     "@P mbarrier.arrive.shared::cta.b64 _, [$0]; }", "", "u32 u32", memory=True)
barrier_wait = instruction("{ .reg .pred P; W: mbarrier.try_wait.parity.shared::cta.b64 P, [$0], $1, 0x989680; "
                           "@P bra D; bra W; D: }", "", "u32 u32", memory=True, volatile=True)
# (barrier, rank): of the block of that rank in the cluster, at the same place there. Without .release.cluster, which
# would be a barrier for all of memory at every arrival: what has to be ordered, the reads of a product, has been waited
# for.
barrier_arrive_in = instruction("{ .reg .b32 r; mapa.shared::cluster.u32 r, $0, $1; "
                                "mbarrier.arrive.shared::cluster.b64 _, [r]; }", "", "u32 u32", memory=True)
# a barrier of 128 threads, by number (0 is syncthreads)
group_barrier = instruction("bar.sync $0, 128;", "", "u32", memory=True, volatile=True)

# ---- the copy engine: (shared address, map, column, row, barrier) ----

_LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
tensor_load = instruction(f"{_LOAD} [$0], [$1, {{$2, $3}}], [$4];", "", "u32 u64 u32 u32 u32", memory=True)
# of a map with three axes: (shared address, map, column, row, plane, barrier)
tensor_load_3d = instruction(f"{_LOAD.replace('2d', '3d')} [$0], [$1, {{$2, $3, $4}}], [$5];", "",
                             "u32 u64 u32 u32 u32 u32", memory=True)
# (..., hint): what the L2 cache shall push out, of what came this way
tensor_load_hinted = instruction(f"{_LOAD}.L2::cache_hint [$0], [$1, {{$2, $3}}], [$4], $5;", "",
                                 "u32 u64 u32 u32 u32 u64", memory=True)
EVICT_FIRST, EVICT_NORMAL = 0x12F0000000000000, 0x1000000000000000
# (..., mask): into every block of the cluster whose rank is a bit of the mask, at the same place, reporting to the
# barrier at the same place there
tensor_load_for_all = instruction(f"{_LOAD}.multicast::cluster [$0], [$1, {{$2, $3}}], [$4], $5;", "",
                                  "u32 u64 u32 u32 u32 u16", memory=True)
tensor_map_acquire = instruction("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", "", "u64", memory=True)
# (map, column, row, shared address)
tensor_store = instruction("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [$0, {$1, $2}], [$3];", "",
                           "u64 u32 u32 u32", memory=True)
# the same, but added to what is there, rounded to nearest even
tensor_add = instruction("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [$0, {$1, $2}], [$3];", "",
                         "u64 u32 u32 u32", memory=True)
stores_commit = instruction("cp.async.bulk.commit_group;", "", "", memory=True)
stores_read = instruction("cp.async.bulk.wait_group.read 0;", "", "", memory=True)  # shared memory may be overwritten
stores_done = instruction("cp.async.bulk.wait_group 0;", "", "", memory=True)
shared_to_engine = instruction("fence.proxy.async.shared::cta;", "", "", memory=True)

# ---- tensor cores ----


# What wgmma is told of a tile in shared memory is 64 bits. Of tiles with rows of 128 bytes, swizzled, 8 of which make a
# group of 1024 bytes, all have the same upper half; the lower one has the address, in units of 16 bytes. It alone
# travels, and 32-bit arithmetic moves it along a tile: with 64-bit numbers a warp spent a third of its time on them.
descriptor = sequence("u32", "u32", lambda builder, address: [builder.or_(
    builder.lshr(address[0], ir.Constant(ir.IntType(32), 4)), ir.Constant(ir.IntType(32), 1 << 16))])
DESCRIPTORS = "{ .reg .b32 low, high; .reg .b64 da, db; mov.b32 high, 0x40000040; "  # at the beginning of a text


def describe(name: str, low: str, units: int) -> str:
    """Text that makes `da` or `db` the descriptor of what lies `units` of 16 bytes behind `low`, a descriptor."""
    if not units:
        return f"mov.b64 {name}, {{{low}, high}}; "
    return f"add.u32 low, {low}, {units}; mov.b64 {name}, {{low, high}}; "


def multiply_64(N: int):
    """sums = multiply(sums, a, b): add the product of 64 x 64 and N x 64 tiles, in the background.

    a, b: descriptors. sums: float32 tuple of N / 2, element 4 j + 2 h + e of a thread being row g + 8 h, column
    8 j + 2 q + e of its warp's 16 rows.
    """
    count = N // 2

    def build(builder, sums, a, b):
        registers = ",".join(f"${i}" for i in range(count))
        text = DESCRIPTORS + ".reg .pred p; setp.ne.b32 p, 1, 0; wgmma.fence.sync.aligned; "
        for step in range(4):  # a step takes 16 columns: 32 bytes
            text += describe("da", f"${2 * count}", 2 * step) + describe("db", f"${2 * count + 1}", 2 * step)
            text += f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{registers}}}, da, db, p, 1, 1, 0, 0; "
        return emit(builder, text + "wgmma.commit_group.sync.aligned; }", "f32 " * count, "f32 " * count + "u32 u32",
                    sums + a + b, tied=count, memory=True, volatile=True)

    return sequence(f"f32*{count}", f"f32*{count} u32 u32", build)


def multiply_wait(count: int, under_way: int = 0, also: str = ""):
    """sums = wait(sums, ...): until at most so many products are under way; `count` registers.

    also: types of further arguments. They are only looked at, which keeps them where they are until the wait (the
    registers that a product reads), or what makes them ahead of it.
    """
    types_of_also = " ".join(f"{name} " * int(times or 1) for name, _, times in
                             (word.partition("*") for word in also.split()))

    def build(builder, sums, *others):
        return emit(builder, f"wgmma.wait_group.sync.aligned {under_way};", "f32 " * count,
                    "f32 " * count + types_of_also, sums + [value for other in others for value in other], tied=count,
                    memory=True, volatile=True)

    return sequence(f"f32*{count}", f"f32*{count} {also}", build)


def multiply_wait_all(count: int):
    """sums = wait(sums): until no product is under way; `count` registers."""
    return multiply_wait(count)


multiply_wait_one = instruction("wgmma.wait_group.sync.aligned 1;", "", "", memory=True, volatile=True)

# ---- clusters: blocks that see each other's shared memory ----

cluster_arrive = instruction("barrier.cluster.arrive.release.aligned;", "", "", memory=True, volatile=True)
# where nothing has been written that others read: not a barrier for memory
cluster_arrive_relaxed = instruction("barrier.cluster.arrive.relaxed.aligned;", "", "", memory=True, volatile=True)
cluster_wait = instruction("barrier.cluster.wait.acquire.aligned;", "", "", memory=True, volatile=True)
cluster_leave = instruction("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;", "", "",
                            memory=True, volatile=True)  # nobody leaves while another may still read


def cluster_sum(blocks: int, apart: int):
    """v = add(address, first): eight float32 of each of so many blocks, added in pairs.

    Four are at a shared address, four `apart` bytes further; the blocks' ranks in the cluster are first, first + 1, ...
    """

    def build(builder, address, first):
        parts, places = [], [address[0]]
        if blocks > 1:
            places = [emit(builder, f"{{ .reg .b32 r; add.u32 r, $2, {i}; mapa.shared::cluster.u32 $0, $1, r; }}",
                           "u32", "u32 u32", address + first)[0] for i in range(blocks)]
        window = "shared::cluster" if blocks > 1 else "shared"
        for place in places:
            parts.append([value for offset in (0, apart) for value in emit(
                builder, f"ld.{window}.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset}];", "f32 " * 4, "u32", [place],
                memory=True)])
        while len(parts) > 1:
            pairs = [[builder.fadd(x, y) for x, y in zip(parts[i], parts[i + 1])] for i in range(0, len(parts) - 1, 2)]
            parts = pairs + parts[2 * len(pairs):]
        return parts[0]

    return sequence("f32*8", "u32 u32", build)


def put_sums(count: int, pitch: int):
    """Store a thread's sums (multiply_64) in a float32 tile in shared memory, transposed: [column][row].

    address: of (column 2 q, this thread's row g); pitch: of a column, in floats.
    """

    def build(builder, address, sums):
        for i, value in enumerate(sums):
            offset = 4 * ((i // 4 * 8 + i % 2) * pitch + 8 * (i // 2 % 2))
            emit(builder, f"st.shared.f32 [$0+{offset}], $1;", "", "u32 f32", [address[0], value], memory=True)
        return []

    return sequence("", f"u32 f32*{count}", build)
