"""The forward pass over the NumPy twins: the plainest form of the model, against transformers and the CPU kernels."""

import numpy as np
import pytest

from tests.golden.make_golden import write_case
from tests.parity_cases import CASES, KEPT_ROWS, NUM_NEW_TOKENS, compare
from tests.test_parity import load_golden
from tinyvllm.kernels import cpu_backend, numpy_backend
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.loader.weights import numpy_weights
from tinyvllm.model import llama
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.rope_table import cos_sin_table
from tinyvllm.runner.model_runner import buffer_shapes


def twin_logits(folder, token_ids, rows) -> np.ndarray:
    """float32 logits of the last `rows` rows, the whole sequence in one step."""
    config = ModelConfig.from_folder(folder)
    arrays = numpy_weights(folder, config)
    weights = llama.Weights(**{"lm_head": arrays["embed"], **arrays}, no_bias=np.empty(0, np.uint16),
                            cos_sin=cos_sin_table(config, len(token_ids)))
    count, block_size = len(token_ids), 16
    num_blocks = -(-count // block_size)
    shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
    buffers = llama.Buffers(**{name: np.empty(size, np.uint16) for name, size in
                               buffer_shapes(config, rows, count).items()})

    def ints(values):
        return np.array(values, np.int32)

    batch = llama.Batch(ints(token_ids), ints(range(count)), ints(range(count)), ints([range(num_blocks)]),
                        ints([count]), ints([0, count]), ints(range(count - rows, count)), num_decodes=0)
    dims = llama.Dims(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                      config.head_dim, block_size, config.head_dim**-0.5, config.rms_norm_eps)
    forward = llama.bind(numpy_backend.OPS)
    forward(weights, llama.KVCache(np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)), batch, buffers, dims)
    return bf16_to_float32(buffers.logits)


@pytest.mark.parametrize("case", [case for case in CASES if case.prompt_length < 1000], ids=lambda case: case.name)
def test_numpy_twins_against_golden_logits(case, tmp_path):
    folder = write_case(case, tmp_path / "model")
    oracle = load_golden(case, folder)
    tokens = case.prompt() + oracle["tokens"].tolist()[:-1]
    compare(twin_logits(folder, tokens, KEPT_ROWS + NUM_NEW_TOKENS - 1), oracle)


def test_every_backend_has_every_operation():
    for ops in (numpy_backend.OPS, cpu_backend.OPS):
        assert set(llama.OP_NAMES) <= set(ops) and {"argmax", "sample"} <= set(ops)
    with pytest.raises(ValueError, match="lacks the operation.*attention"):
        llama.bind({name: op for name, op in numpy_backend.OPS.items() if name != "attention"})
