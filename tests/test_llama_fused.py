"""model/llama_fused.py is model/llama.py in other words: over NumPy twins the two give the same bits."""

import numpy as np
import pytest

from tests.forward_case import forward_case, run_forward
from tests.kernel_cases import fresh_rng
from tinyvllm.kernels.fused.numpy_twin import OPS as FUSED_OPS
from tinyvllm.kernels.numpy_backend import OPS
from tinyvllm.model import llama, llama_fused


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 10)], ids=str)
@pytest.mark.parametrize("rows, contexts", [((1, 1, 9, 3), (6, 11, 9, 7)), ((1, 1), (5, 9))])
def test_both_forward_passes_give_the_same_bits(heads, rows, contexts):
    weights, *rest = forward_case(fresh_rng(), *heads, rows=rows, contexts=contexts)
    case = weights._replace(qkv_bias=weights.o_bias), *rest
    expected = run_forward(case, OPS, lambda x: x.copy(), lambda x: x, llama.bind)
    got = run_forward(case, FUSED_OPS, lambda x: x.copy(), lambda x: x, llama_fused.bind)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_missing_operation_is_named():
    with pytest.raises(ValueError, match="linear_add"):
        llama_fused.bind({name: None for name in llama_fused.OP_NAMES if name != "linear_add"})
