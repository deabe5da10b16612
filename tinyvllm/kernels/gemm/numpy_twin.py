"""The matrix product of every linear layer, in NumPy: the oracle of the kernels beside it.

    out[t, n] = bf16( sum over k of x[t, k] * weight[n, k]  +  bias[n] )

Checkpoints store a weight as [outputs, inputs], so the product is x @ weight.T: both operands have their k
axis last, and every kernel here reads both along rows. Inputs are bf16, the sum is float32 (products of two
bf16 are exact in it), and one rounding ends it.
"""

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16

__all__ = ["linear_numpy"]


def linear_numpy(out, x, weight, bias):
    """out uint16 [T, N] from x uint16 [T, K], weight uint16 [N, K] and bias uint16 [N] or [0] (all bf16
    bits)."""
    product = bf16_to_float32(x) @ bf16_to_float32(weight).T
    if bias.shape[0]:
        product += bf16_to_float32(bias)
    out[...] = float32_to_bf16(product)
