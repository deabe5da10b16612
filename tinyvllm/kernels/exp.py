"""exp for CPU kernels, in steps that LLVM can do on a whole vector (the maths library takes one number).

    exp(x) = 2**n * exp(r),   n = round(x / ln 2),   r = x - n ln 2,   |r| <= ln(2) / 2

exp(r) is a polynomial, 2**n is n written into a float's exponent bits. ln 2 is subtracted in two pieces, the
first with so few bits that n times it is exact (Cody and Waite, "Software Manual for the Elementary
Functions", 1980).
"""

import numpy as np

from tinyvllm.kernels.bf16 import bits_to_float, float_to_bits
from tinyvllm.kernels.jit import cpu_helper

__all__ = ["exp_cpu"]

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2**23)  # adding it pushes the fraction out: the low bits are then the integer
LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)
# exp(r) on |r| <= 0.3466, terms of the Taylor series: what is left out is r**8 / 8!, below 6e-9 of the result
C2, C3, C4, C5, C6, C7 = (np.float32(1 / f) for f in (2, 6, 24, 120, 720, 5040))
ONE, ZERO, INFINITY = np.float32(1), np.float32(0), np.float32(np.inf)


@cpu_helper
def exp_cpu(x):
    """exp of a float32, within 2 units in the last place; 0 below -87.3, infinity above 88.3, NaN of NaN."""
    inside = LOWEST if x < LOWEST else x
    inside = HIGHEST if inside > HIGHEST else inside
    shifted = inside * LOG2_E + ROUND
    n = shifted - ROUND
    r = (inside - n * LN2_HIGH) - n * LN2_LOW
    power = C7
    power = power * r + C6
    power = power * r + C5
    power = power * r + C4
    power = power * r + C3
    power = power * r + C2
    power = power * (r * r) + r + ONE
    # The low bits of `shifted` are n (and those of ROUND, which the shift drops): move them onto the exponent
    # of 1.0.
    result = power * bits_to_float(np.uint32(np.uint32(np.uint32(float_to_bits(shifted) << np.uint32(23)))
                                             + np.uint32(0x3F800000)))
    result = ZERO if x < LOWEST else result
    return INFINITY if x > HIGHEST else result
