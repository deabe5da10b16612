"""batch_invariant=True on a GPU: the same bits for a request alone and in company."""

import numpy as np
import pytest

from tests.gpu.arrays import to_device
from tests.kernel_cases import fresh_rng, poisoned
from tests.model_files import write_tiny_model
from tests.parity_cases import CASES
from tinyvllm import LLM, SamplingParams
from tinyvllm.errors import ConfigError
from tinyvllm.kernels import cuda_support

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(),
                                                  reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", head_dim=64, hidden_size=256,
                            intermediate_size=512)


def make_llm(folder, **options):
    return LLM(folder, device="cuda", use_tqdm=False, skip_tokenizer_init=True, batch_invariant=True, **{
        "num_blocks": 900, "max_num_seqs": 300, "max_num_batched_tokens": 2048, "max_model_len": 512, **options})


def logits_of(llm, prompt, company):
    """uint16 [25, V] of a request, of which there are some among others that come and go."""
    engine, rows = llm.engine, []
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
    engine.add_request(prompt, params, "it")
    for i, other in enumerate(company):
        engine.add_request(other, SamplingParams(temperature=0, max_tokens=3 + i % 30, ignore_eos=True), f"other{i}")
    while engine.has_request("it"):
        for output in engine.step(ahead=False):
            if output.request_id == "it":
                row = [request.request_id for request in llm.runner.last_sampled].index("it")
                rows.append(llm.runner.backend.download(llm.runner.buffers.logits[row]).copy())
    while engine.has_unfinished_requests():
        engine.step()
    return np.array(rows)


def test_logits_are_the_same_bits_alone_and_in_company(folder):
    """Prompts of many lengths, so that steps have from one row to 2,048."""
    rng = fresh_rng()
    prompt = rng.integers(0, 370, 300).tolist()
    alone = logits_of(make_llm(folder), prompt, [])
    assert len(alone) == 25
    for count in (1, 6, 40, 250):
        company = [rng.integers(0, 370, int(rng.integers(2, 60))).tolist() for _ in range(count)]
        np.testing.assert_array_equal(logits_of(make_llm(folder), prompt, company), alone, f"beside {count} others")


def test_logits_do_not_depend_on_how_a_prompt_was_cut(folder):
    prompt = fresh_rng().integers(0, 370, 500).tolist()
    whole = logits_of(make_llm(folder), prompt, [])
    np.testing.assert_array_equal(logits_of(make_llm(folder, max_num_batched_tokens=64, max_num_seqs=4), prompt, []),
                                  whole)


@pytest.mark.parametrize("num_outputs, depth", [(3072, 2048), (2048, 2048), (2048, 8192), (16384, 2048)])
def test_products_of_the_1b_shape_are_the_same_bits_for_any_number_of_rows(num_outputs, depth):
    from tinyvllm.kernels.driver import Stream
    from tinyvllm.kernels.fused.operations import FusedOperations

    cuda_support.cuda.current_context()
    rng, fused = fresh_rng(), FusedOperations(Stream(), batch_invariant=True)
    x = (rng.standard_normal((5000, depth), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weight = to_device((rng.standard_normal((num_outputs, depth), np.float32).view(np.uint32) >> 16).astype(np.uint16))
    residual = (rng.standard_normal((5000, num_outputs), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    x_device, first = to_device(x), None
    for rows in (1, 2, 7, 16, 33, 64, 130, 256, 257, 600, 5000):
        out, hidden = to_device(residual[:rows].copy()), to_device(poisoned(rows, num_outputs))
        fused.linear_add(out, hidden, x_device[:rows], weight)
        fused.stream.synchronize()
        result = out.copy_to_host()
        first = result[0] if first is None else first
        np.testing.assert_array_equal(result[0], first, f"row 0 of {rows}")
        last = to_device(residual[rows - 1:rows].copy())
        fused.linear_add(last, hidden, x_device[rows - 1:rows], weight)
        fused.stream.synchronize()
        np.testing.assert_array_equal(result[-1], last.copy_to_host()[0], f"the last row of {rows}")


def test_what_cannot_be_had_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="enforce_eager"):
        make_llm(folder, enforce_eager=True)
    biases = write_tiny_model(tmp_path / "biases", **next(c for c in CASES if c.name == "biases").overrides)
    with pytest.raises(ConfigError, match="biases"):
        make_llm(biases)
