"""proto"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_F32X16, _I32X16 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _BF16(ir.Type):
    """LLVM's bfloat type, which llvmlite has no class for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BF16)

    def __hash__(self):
        return hash(_BF16)


_BF16X32 = ir.VectorType(_BF16(), 2 * LANES)


def _splat(builder, scalar):
    vector = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(_I32X16, [0] * LANES))


def _step_dpbf16(builder, acc, w, x):
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_F32X16, [_F32X16, _BF16X32, _BF16X32]), name)
    return builder.call(function, [acc, w, x])


def make_tile(rows, panels, path):
    @intrinsic
    def tile(typingctx, acc, x, w, row, last_row, panel, pair0, pair1):
        def codegen(context, builder, signature, args):
            arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:3], args[:3])]
            acc, x, w = (builder.bitcast(a.data, ir.IntType(8).as_pointer()) for a in arrays)
            row, last_row, panel, pair0, pair1 = args[3:]
            k = builder.extract_value(arrays[1].shape, 1)
            pairs = builder.extract_value(arrays[2].shape, 1)

            def at(base, offset):
                return builder.gep(base, [offset])
            def load(p, t, align):
                v = builder.load(builder.bitcast(p, t.as_pointer())); v.align = align; return v
            xs = []
            for m in range(rows):
                index = builder.add(row, _I64(m))
                index = builder.select(builder.icmp_signed("<", index, last_row), index, last_row)
                xs.append(at(x, builder.mul(builder.mul(index, k), _I64(2))))
            ws = [at(w, builder.mul(builder.mul(builder.add(panel, _I64(v)), pairs), _I64(64))) for v in range(panels)]
            tiles = [(m, v) for m in range(rows) for v in range(panels)]
            spots = {t: at(acc, _I64((t[0] * panels + t[1]) * 64)) for t in tiles}
            start = {t: load(spots[t], _F32X16, 4) for t in tiles}
            before = builder.block
            body = builder.append_basic_block("pairs")
            after = builder.append_basic_block("done")
            builder.branch(body)
            builder.position_at_end(body)
            j = builder.phi(_I64); j.add_incoming(pair0, before)
            sums = {}
            for t in tiles:
                sums[t] = builder.phi(_F32X16); sums[t].add_incoming(start[t], before)
            wv = [load(at(p, builder.mul(j, _I64(64))), _I32X16, 2) for p in ws]
            xoff = builder.mul(j, _I64(4))
            new = {}
            if path == "dp":
                wv = [builder.bitcast(v, _BF16X32) for v in wv]
                for m in range(rows):
                    xv = builder.bitcast(_splat(builder, load(at(xs[m], xoff), _I32, 2)), _BF16X32)
                    for v in range(panels):
                        new[m, v] = _step_dpbf16(builder, sums[m, v], wv[v], xv)
            else:
                c16 = ir.Constant(_I32X16, [16] * 16); mask = ir.Constant(_I32X16, [0xffff0000] * 16)
                lo = [builder.bitcast(builder.shl(v, c16), _F32X16) for v in wv]
                hi = [builder.bitcast(builder.and_(v, mask), _F32X16) for v in wv]
                for m in range(rows):
                    xp = load(at(xs[m], xoff), _I32, 2)
                    x0 = _splat(builder, builder.bitcast(builder.shl(xp, _I32(16)), _F32))
                    x1 = _splat(builder, builder.bitcast(builder.and_(xp, _I32(0xffff0000)), _F32))
                    for v in range(panels):
                        s = builder.fadd(sums[m, v], builder.fmul(x0, lo[v], flags=["contract"]), flags=["contract"])
                        new[m, v] = builder.fadd(s, builder.fmul(x1, hi[v], flags=["contract"]), flags=["contract"])
            for t in tiles:
                sums[t].add_incoming(new[t], body)
            nxt = builder.add(j, _I64(1)); j.add_incoming(nxt, body)
            builder.cbranch(builder.icmp_signed("<", nxt, pair1), body, after)
            builder.position_at_end(after)
            for t in tiles:
                st = builder.store(new[t], builder.bitcast(spots[t], _F32X16.as_pointer())); st.align = 4
            return context.get_dummy_value()
        i = types.intp
        return types.void(acc, x, w, i, i, i, i, i), codegen
    return tile
