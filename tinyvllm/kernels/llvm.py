"""Small pieces of LLVM's language, for the few CPU loops that have to be written in it.

numba compiles Python to LLVM instructions, which LLVM compiles to the processor's. Mostly that is enough. It
is not where sums must stay in vector registers throughout a loop, or where an instruction has no Python
spelling. There a function marked `@intrinsic` emits the instructions itself (llvmlite's IRBuilder), and njit
code calls it like any other.

A vector here has 16 lanes of 32 bits: one AVX-512 register. On a smaller machine LLVM uses two or four.
"""

from llvmlite import ir

__all__ = ["LANES", "I8P", "I32", "I64", "F32", "F32X16", "I32X16", "array_pointers", "function",
           "broadcast", "load", "store", "element", "halves", "counted_loop"]

LANES = 16
I8P, I32, I64, F32 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64), ir.FloatType()
F32X16, I32X16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def array_pointers(context, builder, signature, args, count):
    """(address as i8*, its shape as i64 values) of each of the first `count` arguments, which are arrays."""
    pointers, shapes = [], []
    for kind, argument in zip(signature.args[:count], args[:count], strict=True):
        array = context.make_array(kind)(context, builder, argument)
        pointers.append(builder.bitcast(array.data, I8P))
        shapes.append([builder.extract_value(array.shape, i) for i in range(kind.ndim)])
    return pointers, shapes


def function(builder, name, result, arguments):
    """An LLVM function by name, declared in this module at its first use."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def broadcast(builder, scalar):
    """A vector with `scalar` in all lanes."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    vector = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(vector, undefined, ir.Constant(I32X16, [0] * LANES))


def load(builder, kind, base, offset, align=4):
    """A value of LLVM type `kind` from `offset` bytes after `base` (an i8*)."""
    value = builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()))
    value.align = align
    return value


def store(builder, value, base, offset, align=4):
    """Write a value `offset` bytes after `base` (an i8*)."""
    builder.store(value, builder.bitcast(builder.gep(base, [offset]), value.type.as_pointer())).align = align


def element(builder, row, width, column, size):
    """Offset in bytes of [row, column] in a C-contiguous matrix with `width` columns of `size` bytes."""
    return builder.mul(builder.add(builder.mul(row, width), column), I64(size))


def halves(builder, vector):
    """The lower and the upper half of a vector's lanes."""
    count = vector.type.count // 2
    for first in (0, count):
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
        yield builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def counted_loop(builder, start, stop, initial, body):
    """for i in start .. stop: values = body(i, values), which start as `initial` and stay in registers.

    Runs at least once. Returns the last values; the builder then stands behind the loop.
    """
    before = builder.block
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(I64)
    values = [builder.phi(value.type) for value in initial]
    updated = body(i, values)
    following = builder.add(i, I64(1))
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
    for phi, first, later in zip([i, *values], [start, *initial], [following, *updated], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    builder.position_at_end(after)
    return updated
