"""model/llama_fused.py is model/llama.py in other words: over NumPy twins the two give the same bits."""

import numpy as np
import pytest

from tests.forward_case import forward_case, run_forward
from tests.kernel_cases import POISON, fresh_rng, poisoned
from tinyvllm.kernels.fused.numpy_twin import OPS as FUSED_OPS
from tinyvllm.kernels.numpy_backend import OPS
from tinyvllm.model import llama, llama_fused
from tinyvllm.model.llama import Watch


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 10)], ids=str)
@pytest.mark.parametrize("rows, contexts", [((1, 1, 9, 3), (6, 11, 9, 7)), ((1, 1), (5, 9))])
def test_both_forward_passes_give_the_same_bits(heads, rows, contexts):
    """Those of the logits and the cache, and of the rows that are kept of the last request."""
    weights, cache, batch, dims = forward_case(fresh_rng(), *heads, rows=rows, contexts=contexts)
    positions = np.full(sum(rows), -1, np.int32)
    positions[-rows[-1]:] = range(contexts[-1] - rows[-1], contexts[-1])
    kept = []

    def watched():
        kept.append((poisoned(2, 12, heads[0] * heads[2]), poisoned(3, 12, 96)))
        return weights._replace(qkv_bias=weights.o_bias), cache, batch._replace(watch=Watch(*kept[-1], positions)), dims

    expected = run_forward(watched(), OPS, lambda x: x.copy(), lambda x: x, llama.bind)
    got = run_forward(watched(), FUSED_OPS, lambda x: x.copy(), lambda x: x, llama_fused.bind)
    for a, b in zip((*got, *kept[1]), (*expected, *kept[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    mine = np.isin(np.arange(12), positions)
    for rows_kept in kept[1]:
        assert (rows_kept[:, mine] != POISON).any(axis=(0, 2)).all() and (rows_kept[:, ~mine] == POISON).all()


def test_a_missing_operation_is_named():
    with pytest.raises(ValueError, match="linear_add"):
        llama_fused.bind({name: None for name in llama_fused.OP_NAMES if name != "linear_add"})
