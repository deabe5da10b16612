"""What a warpgroup does with a tile of attention, for prefill_wgmma.py: its two products, and the softmax in registers.

A warpgroup (four warps) holds matrices of 64 rows, 16 a warp, spread over its lanes. With g = lane // 4 and
q = lane % 4, element 4 j + 2 h + e of a lane is

    row g + 8 h, column 8 j + 2 q + e          h, e = 0 or 1: fragment_row, fragment_column

So a lane has parts of two rows (h = 0 and 1), and the four lanes with the same g have a row together. The same
spread serves the scores S (64 x KEYS), the outputs O (64 x head_dim) and, packed to pairs of bf16, the weights P:
what comes out of S = Q K^T is, without any exchange, what O += P V wants as its left side.

Queries, keys and values lie in shared memory as the copy engine leaves them: rows of 64 values (128 bytes; head_dim
128 is two such halves, one behind the other), in which 16-byte chunk c of row r is at place c ^ (r % 8).

    S = Q K^T   both sides lie with the dimension that is summed over, head_dim, along the rows ("K-major")
    O += P V    V's rows are keys, and it is keys that are summed over ("MN-major"): wgmma transposes on the way,
                which costs nothing, so values need no other layout in the cache than keys

Every function is a macro in the sense of hopper.sequence: Python here, straight instructions in the kernel.
"""

from tinyvllm.kernels.hopper import DESCRIPTORS, describe, emit, sequence
from tinyvllm.kernels.ptx import INLINE

if INLINE:
    from llvmlite import ir

__all__ = ["fragment_row", "fragment_column", "swizzled", "multiply_keys", "add_values", "mask_scores", "row_maxima",
           "exponentials", "row_sums", "pack_pairs", "scale_rows", "put_rows"]

ROW_BYTES = 128
GROUP_BYTES = 1024  # eight rows: what the swizzle repeats after
HALF = 64  # values in a row of shared memory


# ---- where things are ----


def fragment_row(lane: int, i: int) -> int:
    """Row, among its warp's 16, of a lane's element i."""
    return lane // 4 + 8 * (i >> 1 & 1)


def fragment_column(lane: int, i: int) -> int:
    """Column of a lane's element i."""
    return i // 4 * 8 + lane % 4 * 2 + (i & 1)


def swizzled(offset: int) -> int:
    """Where the copy engine puts the byte at `offset` of a tile with rows of 128 bytes."""
    return offset ^ (offset >> 7 & 7) << 4


# ---- the two products ----


def multiply_keys(KEYS: int, HALVES: int, QUERY_BYTES: int, KEY_BYTES: int):
    """S = multiply(q, k), in the background: 64 rows of queries by KEYS keys. q, k: descriptors.

    QUERY_BYTES, KEY_BYTES: from one half of head_dim to the other. The first step overwrites S, the others add.
    """
    count = KEYS // 2
    registers = ",".join(f"${i}" for i in range(count))

    def build(builder, q, k):
        text = DESCRIPTORS + (".reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0; "
                              "wgmma.fence.sync.aligned; ")
        for half in range(HALVES):
            for step in range(HALF // 16):  # a step takes 16 of head_dim: 32 bytes, in units of 16
                text += (describe("da", f"${count}", (half * QUERY_BYTES + 32 * step) // 16)
                         + describe("db", f"${count + 1}", (half * KEY_BYTES + 32 * step) // 16)
                         + f"wgmma.mma_async.sync.aligned.m64n{KEYS}k16.f32.bf16.bf16 {{{registers}}}, da, db, "
                         f"{'later' if half or step else 'first'}, 1, 1, 0, 0; ")
        text += "wgmma.commit_group.sync.aligned; }"
        return emit(builder, text, "f32 " * count, "u32 u32", q + k, memory=True, volatile=True)

    return sequence(f"f32*{count}", "u32 u32", build)


def add_values(KEYS: int, HALVES: int, VALUE_BYTES: int):
    """O = add(O, P, v), in the background: 64 rows of weights P (pack_pairs) by KEYS values. v: a descriptor.

    VALUE_BYTES: from one half of head_dim to the other; each half has its own products and its own registers of O.
    """
    sums, weights = 32 * HALVES, KEYS // 4
    half_registers = [",".join(f"${i}" for i in range(32 * half, 32 * half + 32)) for half in range(HALVES)]

    def build(builder, outputs, pairs, v):
        text = DESCRIPTORS + ".reg .pred add; setp.ne.b32 add, 1, 0; wgmma.fence.sync.aligned; "
        for step in range(KEYS // 16):  # a step takes 16 keys: two groups of rows
            a = ",".join(f"${2 * sums + 4 * step + i}" for i in range(4))
            for half in range(HALVES):
                offset = half * VALUE_BYTES + step * 2 * GROUP_BYTES
                text += (describe("db", f"${2 * sums + weights}", offset // 16)
                         + "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                         f"{{{half_registers[half]}}}, {{{a}}}, db, add, 1, 1, 1; ")
        text += "wgmma.commit_group.sync.aligned; }"
        return emit(builder, text, "f32 " * sums, "f32 " * sums + "u32 " * weights + "u32", outputs + pairs + v,
                    tied=sums, memory=True, volatile=True)

    return sequence(f"f32*{sums}", f"f32*{sums} u32*{weights} u32", build)


# ---- the softmax of a lane's parts of two rows ----


def mask_scores(count: int):
    """S = mask(S, last_0, last_1): minus infinity where a column, less 2 q, is beyond its row's `last`."""

    def build(builder, scores, last_0, last_1):
        i32, hidden = ir.IntType(32), ir.Constant(ir.FloatType(), float("-inf"))
        last = last_0 + last_1
        return [builder.select(builder.icmp_signed("<=", ir.Constant(i32, fragment_column(0, i)), last[i >> 1 & 1]),
                               score, hidden) for i, score in enumerate(scores)]

    return sequence(f"f32*{count}", f"f32*{count} i32 i32", build)


def _combine(builder, values, text: str):
    """One value of many, in four independent chains: an instruction need not wait for the one before it."""
    chains = list(values[:4])
    for i, value in enumerate(values[4:]):
        chains[i % 4] = emit(builder, text, "f32", "f32 f32", [chains[i % 4], value])[0]
    a, b = (emit(builder, text, "f32", "f32 f32", chains[i:i + 2])[0] for i in (0, 2))
    return emit(builder, text, "f32", "f32 f32", [a, b])[0]


def _of_both_rows(count: int, text: str):
    return sequence("f32*2", f"f32*{count}", lambda builder, values: [
        _combine(builder, [value for i, value in enumerate(values) if i >> 1 & 1 == h], text) for h in (0, 1)])


def row_maxima(count: int):
    """(of row g, of row g + 8), of this lane's columns; NaN is passed over."""
    return _of_both_rows(count, "max.f32 $0, $1, $2;")


def row_sums(count: int):
    """(of row g, of row g + 8), of this lane's columns, always in the same order."""
    return _of_both_rows(count, "add.f32 $0, $1, $2;")


def exponentials(count: int):
    """2 to the power of (scores * scale - m): exponentials(scores, scale, m of row g, m of row g + 8)."""

    def build(builder, scores, scale, m_0, m_1):
        minus = [emit(builder, "neg.f32 $0, $1;", "f32", "f32", m)[0] for m in (m_0, m_1)]
        powers = []
        for i, score in enumerate(scores):
            power = emit(builder, "fma.rn.f32 $0, $1, $2, $3;", "f32", "f32 f32 f32",
                         [score, *scale, minus[i >> 1 & 1]])
            powers += emit(builder, "ex2.approx.ftz.f32 $0, $1;", "f32", "f32", power)
        return powers

    return sequence(f"f32*{count}", f"f32*{count} f32 f32 f32", build)


def pack_pairs(count: int):
    """Neighbours as pairs of bf16, rounded to nearest even."""
    return sequence(f"u32*{count // 2}", f"f32*{count}", lambda builder, values: [
        pair for i in range(0, count, 2)
        for pair in emit(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", "u32", "f32 f32", values[i:i + 2])])


def scale_rows(count: int):
    """Row g times the first factor, row g + 8 times the second."""
    return sequence(f"f32*{count}", f"f32*{count} f32 f32", lambda builder, values, a, b: [
        builder.fmul(value, (a + b)[i >> 1 & 1]) for i, value in enumerate(values)])


# ---- and back to shared memory ----


def put_rows(HALVES: int, HALF_BYTES: int):
    """put(address of row lane % 16, lane // 16, lane % 8, O): a warp's 16 rows as bf16, swizzled as they came in.

    HALF_BYTES: from one half of head_dim to the other.
    """

    def build(builder, address, matrix, swizzle, outputs):
        i32 = ir.IntType(32)
        for half in range(HALVES):
            for pair in range(4):  # of 16-byte chunks; lanes 16 and up give the second's rows
                chunk = builder.xor(builder.add(matrix[0], ir.Constant(i32, 2 * pair)), swizzle[0])
                place = builder.add(address[0], builder.shl(chunk, ir.Constant(i32, 4)))
                first = 32 * half + 8 * pair
                pairs = [emit(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", "u32", "f32 f32", outputs[i:i + 2])[0]
                         for i in range(first, first + 8, 2)]
                text = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0+{half * HALF_BYTES}], {{$1,$2,$3,$4}};"
                emit(builder, text, "", "u32 " * 5, [place, *pairs], memory=True, volatile=True)
        return []

    return sequence("", f"u32 u32 u32 f32*{32 * HALVES}", build)
