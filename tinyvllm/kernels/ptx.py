"""Inline PTX: the GPU instructions that Python has no word for, as functions for use inside CUDA kernels.

PTX is NVIDIA's portable assembly. numba hands a kernel to the compiler as LLVM code, and LLVM lets one
instruction be given as text with slots ($0, $1, ...) for its operands. `instruction` wraps such a text so
that a kernel can call it:

    exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f32", "f32")       y = exp2(x)

Types are named as PTX does: f32, f64, u32, u64, u16. Several outputs come back as a tuple. `memory=True` says that
the text reads or writes memory, so that the compiler does not move other accesses across it; `volatile=True`
that it must run where it stands even if its result looks unused (barriers, and everything a whole warp does
together).

The instructions that matter here:

    mma_m16n8k16     a warp multiplies a 16 x 16 by a 16 x 8 bf16 matrix on the tensor cores and adds a
                     16 x 8 float32 one
    ldmatrix_x4      a warp loads four 8 x 8 bf16 matrices from shared memory in the layout that mma wants
    cp_async_16      global to shared memory, 16 bytes a thread, in the background, past the registers

In all of them the 32 lanes of a warp hold one matrix together. With g = lane // 4 and q = lane % 4, a lane
holds

    A (16 x 16)  four registers of two neighbours:  (g, 2q) (g + 8, 2q) (g, 2q + 8) (g + 8, 2q + 8)
    B (16 x 8)   two registers:                     (k = 2q, n = g) (k = 2q + 8, n = g)
    C (16 x 8)   four floats:                       (g, 2q) (g, 2q + 1) (g + 8, 2q) (g + 8, 2q + 1)

Source: NVIDIA, "Parallel Thread Execution ISA", sections on mma, ldmatrix, cp.async and shfl.
"""

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, device_function, simulated

__all__ = ["widen_cuda", "narrow_cuda", "instruction", "mma_m16n8k16", "ldmatrix_x4",
           "ldmatrix_x4_transposed", "cp_async_16", "cp_async_commit", "cp_async_wait", "load_16_bytes",
           "load_16_bytes_cached", "load_u32", "load_i32", "load_u16", "store_u32", "store_u16", "store_f32",
           "load_f32", "load_shared_f32", "load_shared_u32", "store_shared_f32", "low_bf16", "high_bf16", "pack_bf16",
           "exp2", "divide", "maximum", "shuffle_xor", "thread_index", "lane_index", "block_index_x", "block_index_y",
           "block_index_z", "grid_size_x", "dynamic_shared", "warp_barrier", "load_shared_16_bytes",
           "store_shared_16_bytes", "store_shared_two_f32", "store_16_bytes", "load_8_bytes",
           "store_8_bytes", "wait_for_previous_kernel",
           "let_next_kernel_start", "warp_sum", "warp_max", "same_in_warp", "ballot", "count_bits", "reciprocal",
           "quotient"]

INLINE = cuda is not None and not simulated()  # the simulator runs Python: it knows no PTX

if INLINE:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature as typing_signature

    _NUMBA = {"f32": types.float32, "u32": types.uint32, "i32": types.int32, "u64": types.uint64,
              "u16": types.uint16, "f64": types.float64}
    _LLVM = {"f32": ir.FloatType(), "u32": ir.IntType(32), "i32": ir.IntType(32), "u64": ir.IntType(64),
             "u16": ir.IntType(16), "f64": ir.DoubleType()}
    # LLVM's letters for register classes
    _REGISTER = {"f32": "f", "u32": "r", "i32": "r", "u64": "l", "u16": "h", "f64": "d"}


def instruction(text: str, outputs: str, inputs: str, *, volatile: bool = False, memory: bool = False,
                tied: int = 0):
    """A function for CUDA kernels that emits `text`.

    text: PTX with $0, $1, ... for the outputs and then the inputs; outputs, inputs: type names separated by
    spaces. tied: the first so many inputs share registers with the outputs of the same place (accumulators).
    Arguments are converted to the types named. Returns None where inline PTX cannot be used.
    """
    if not INLINE:
        return None
    outputs, inputs = outputs.split(), inputs.split()
    result = [_NUMBA[name] for name in outputs]
    if len(result) > 1:
        result = types.UniTuple(result[0], len(result))
    else:
        result = result[0] if result else types.void
    call_signature = typing_signature(result, *(_NUMBA[name] for name in inputs))
    constraints = [f"={_REGISTER[name]}" for name in outputs] + [str(i) for i in range(tied)]
    constraints += [_REGISTER[name] for name in inputs[tied:]] + (["~{memory}"] if memory else [])

    def codegen(context, builder, signature, arguments):
        llvm_result = (ir.VoidType() if not outputs else _LLVM[outputs[0]] if len(outputs) == 1
                       else ir.LiteralStructType([_LLVM[name] for name in outputs]))
        function = ir.FunctionType(llvm_result, [_LLVM[name] for name in inputs])
        assembly = ir.InlineAsm(function, text, ",".join(constraints), side_effect=volatile or memory)
        call = builder.call(assembly, arguments)
        if volatile:
            call.attributes.add("convergent")  # all lanes of the warp together: not to be moved into a branch
        if not outputs:
            return context.get_dummy_value()
        if len(outputs) == 1:
            return call
        return context.make_tuple(builder, signature.return_type,
                                  [builder.extract_value(call, i) for i in range(len(outputs))])

    # numba counts the parameters of an intrinsic, so it is built with as many as the instruction has inputs.
    names = "".join(f", a{i}" for i in range(len(inputs)))
    namespace = {"result": (call_signature, codegen)}
    exec(f"def ptx_instruction(typingctx{names}):\n    return result\n", namespace)  # noqa: S102
    function = intrinsic(namespace["ptx_instruction"])
    function.ptx = text, outputs, inputs  # for those who read kernels: the emulator of the tests
    return function


# ---- bf16, for all kernels: an instruction on the GPU, the arithmetic of bf16.py in the simulator ----

if INLINE:
    # One bfloat16 (uint16) as float32: the upper half of a register whose lower half is zero.
    widen_cuda = instruction("{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "f32", "u16")
    # One float32 as bfloat16, to nearest even; NaN stays NaN.
    narrow_cuda = instruction("cvt.rn.bf16.f32 $0, $1;", "u16", "f32")
else:

    @device_function
    def widen_cuda(bits):
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

    @device_function
    def narrow_cuda(value):
        if value != value:
            return np.uint16(0x7FFF)  # what the instruction makes of any NaN
        bits = int(np.float32(value).view(np.uint32))
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


# ---- tensor cores ----

# d0..d3 = mma_m16n8k16(c0..c3, a0..a3, b0, b1)
mma_m16n8k16 = instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};",
    "f32 f32 f32 f32", "f32 f32 f32 f32 u32 u32 u32 u32 u32 u32", tied=4)
# Lane i gives the address of row i % 8 of matrix i // 8; matrix j comes back in register j, with row g and
# columns 2q, 2q + 1 in lane 4g + q.
ldmatrix_x4 = instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
                          "u32 u32 u32 u32", "u32", volatile=True, memory=True)
ldmatrix_x4_transposed = instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
                                     "u32 u32 u32 u32", "u32", volatile=True, memory=True)

# ---- asynchronous copies ----

# cp_async_16(shared address, global address, bytes): copies `bytes` (0 or 16) and fills the rest of 16 with
# zeros.
cp_async_16 = instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;", "", "u32 u64 u32",
                          memory=True)
cp_async_commit = instruction("cp.async.commit_group;", "", "", memory=True)


def _cp_async_wait(pending: int):
    """Wait until at most `pending` of this thread's committed groups are unfinished."""
    return instruction(f"cp.async.wait_group {pending};", "", "", memory=True)


cp_async_wait = tuple(_cp_async_wait(pending) for pending in range(6))

# ---- memory ----

# Weights are read once: they pass the L1 cache by, and neighbours come along into L2.
load_16_bytes = instruction("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0,$1,$2,$3}, [$4];",
                            "u32 u32 u32 u32", "u64", volatile=True)
load_16_bytes_cached = instruction("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", "u32 u32 u32 u32", "u64",
                                   memory=True)
load_u32 = instruction("ld.global.b32 $0, [$1];", "u32", "u64", memory=True)
load_i32 = instruction("ld.global.b32 $0, [$1];", "i32", "u64", memory=True)
load_u16 = instruction("ld.global.b16 $0, [$1];", "u16", "u64", memory=True)
load_f32 = instruction("ld.global.f32 $0, [$1];", "f32", "u64", memory=True)
store_u32 = instruction("st.global.b32 [$0], $1;", "", "u64 u32", memory=True)
store_u16 = instruction("st.global.b16 [$0], $1;", "", "u64 u16", memory=True)
store_f32 = instruction("st.global.f32 [$0], $1;", "", "u64 f32", memory=True)
load_shared_f32 = instruction("ld.shared.f32 $0, [$1];", "f32", "u32", memory=True)
store_shared_f32 = instruction("st.shared.f32 [$0], $1;", "", "u32 f32", memory=True)

load_shared_u32 = instruction("ld.shared.b32 $0, [$1];", "u32", "u32", memory=True)
load_shared_16_bytes = instruction("ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];", "u32 u32 u32 u32", "u32", memory=True)
store_shared_16_bytes = instruction("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", "", "u32 u32 u32 u32 u32", memory=True)
store_shared_two_f32 = instruction("st.shared.v2.f32 [$0], {$1,$2};", "", "u32 f32 f32", memory=True)
load_8_bytes = instruction("ld.global.v2.b32 {$0,$1}, [$2];", "u32 u32", "u64", memory=True)
store_8_bytes = instruction("st.global.v2.b32 [$0], {$1,$2};", "", "u64 u32 u32", memory=True)
store_16_bytes = instruction("st.global.v4.b32 [$0], {$1,$2,$3,$4};", "", "u64 u32 u32 u32 u32", memory=True)

# ---- programmatic dependent launch (compute capability 9.0): see driver.py ----

wait_for_previous_kernel = instruction("griddepcontrol.wait;", "", "", volatile=True, memory=True)
let_next_kernel_start = instruction("griddepcontrol.launch_dependents;", "", "", volatile=True, memory=True)

# ---- bf16 pairs in a 32-bit register, arithmetic ----

low_bf16 = instruction("shl.b32 $0, $1, 16;", "f32", "u32")  # the lower half of a pair, widened
high_bf16 = instruction("and.b32 $0, $1, 0xffff0000;", "f32", "u32")
pack_bf16 = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "u32", "f32 f32")  # (low, high), to nearest even
exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f32", "f32")
# 1 / x, the last bit perhaps off; Python's division would be a call, and the compiler keeps no wgmma under way over one
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f32", "f32")
# To 2 ulp, and inline: the division operator is a call on a GPU, and a call makes the assembler end every wgmma first.
quotient = instruction("div.full.f32 $0, $1, $2;", "f32", "f32 f32")
# Python's // checks for a zero divisor and rounds down; for sizes, which are positive, one instruction does.
divide = instruction("div.u32 $0, $1, $2;", "u32", "u32 u32")
maximum = instruction("max.f32 $0, $1, $2;", "f32", "f32 f32")
shuffle_xor = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "f32", "f32 u32", volatile=True)

# ---- all 32 lanes of a warp together ----

warp_sum = instruction("redux.sync.add.u32 $0, $1, 0xffffffff;", "u32", "u32", volatile=True)
warp_max = instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", "u32", "u32", volatile=True)
# same_in_warp(x): x, which is the same in all lanes; now the assembler knows it, and what follows from it is computed
# once for the warp, in registers that the warp has together
same_in_warp = instruction("redux.sync.or.b32 $0, $1, 0xffffffff;", "u32", "u32", volatile=True)
# bit i of the result: whether lane i's number is not zero
ballot = instruction("{ .reg .pred P; setp.ne.u32 P, $1, 0; vote.sync.ballot.b32 $0, P, 0xffffffff; }", "u32", "u32",
                     volatile=True)
count_bits = instruction("popc.b32 $0, $1;", "u32", "u32")

# ---- who am I ----

thread_index = instruction("mov.u32 $0, %tid.x;", "u32", "")
lane_index = instruction("mov.u32 $0, %laneid;", "u32", "")
block_index_x = instruction("mov.u32 $0, %ctaid.x;", "u32", "")
block_index_y = instruction("mov.u32 $0, %ctaid.y;", "u32", "")
block_index_z = instruction("mov.u32 $0, %ctaid.z;", "u32", "")
grid_size_x = instruction("mov.u32 $0, %nctaid.x;", "u32", "")
warp_barrier = instruction("bar.warp.sync 0xffffffff;", "", "", volatile=True, memory=True)


def _dynamic_shared():
    """Address (u32, in the shared window) of the memory that the launch asked for, aligned to 1024 bytes: what the
    copy engine's swizzle wants."""
    if not INLINE:
        return None

    @intrinsic
    def dynamic_shared(typingctx):
        def codegen(context, builder, signature, arguments):
            name = "tinyvllm_dynamic_shared"
            if name in builder.module.globals:
                memory = builder.module.globals[name]
            else:
                memory = ir.GlobalVariable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
                memory.linkage, memory.align = "external", 1024
            return builder.ptrtoint(memory, ir.IntType(32))

        return typing_signature(types.uint32), codegen

    return dynamic_shared


dynamic_shared = _dynamic_shared()
