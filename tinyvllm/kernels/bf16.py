"""bfloat16 as raw bits: the upper half of a float32, rounded to nearest even.

    float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm      1 + 8 + 23 bits
    bfloat16  s eeeeeeee mmmmmmm                      1 + 8 +  7 bits

NumPy has no bfloat16, so tinyvllm keeps such tensors as uint16 arrays of bit patterns. Widening is exact (append
16 zero bits). Narrowing drops 16 bits: round to nearest, and a tie goes to the pattern whose last bit is 0, as
IEEE 754 asks and as the hardware's `cvt.rn.bf16.f32` does. Truncation instead would bias every value toward zero.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["float32_to_bf16", "bf16_to_float32", "round_to_bf16", "widen", "narrow", "bits_to_float", "float_to_bits"]


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns (uint16, any shape) to float32. Exact."""
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        raise TypeError(f"bfloat16 bits are a uint16 array, got {bits.dtype}")
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 values (any shape) to the nearest bfloat16, ties to even; returns uint16 bit patterns.

    NaN stays NaN (its quiet bit is set, so that dropping the payload's low half cannot make it infinite);
    values beyond the largest bfloat16 become infinity; subnormals are kept.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    # Adding 0x7fff plus the last kept bit carries into the kept half exactly when the dropped half is above one
    # half, or equal to one half with an odd last bit.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x0040), rounded)
    return rounded.astype(np.uint16)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16 and widened again: a rounding point of the reference, in float32."""
    return bf16_to_float32(float32_to_bf16(values))


# ---- the same for use inside numba.njit kernels: one scalar at a time, vectorised by LLVM ----


@intrinsic
def bits_to_float(typingctx, bits):
    """uint32 bits -> the float32 with those bits (a register move: no memory, no conversion)."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), codegen


@intrinsic
def float_to_bits(typingctx, value):
    """float32 -> its uint32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def widen(bits):
    """One bfloat16 (uint16) as float32."""
    return bits_to_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit(inline="always")
def narrow(value):
    """One float32 as bfloat16 (uint16), to nearest even; NaN stays NaN."""
    bits = float_to_bits(np.float32(value))
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x0040))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
