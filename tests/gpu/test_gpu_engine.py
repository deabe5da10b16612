"""The whole engine on a GPU: against the golden logits, against the CPU backend, and at the true 1B shape."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.make_golden import write_case
from tests.model_files import write_tiny_model
from tests.parity_cases import CASES, KEPT_ROWS, NUM_NEW_TOKENS, choice_gaps, compare, tolerance
from tests.teacher_forcing import sequence_logits
from tests.test_parity import load_golden
from tests.test_parity import make_llm as make_cpu_llm
from tinyvllm import LLM, SamplingParams
from tinyvllm.errors import OutOfDeviceMemoryError

pytestmark = pytest.mark.gpu
LLAMA_1B = Path(__file__).parents[1] / "data" / "llama-3.2-1b"


@pytest.fixture(scope="module", autouse=True)
def gpu():
    from tinyvllm.kernels.cuda_support import cuda_available

    if not cuda_available():
        pytest.skip("needs an NVIDIA GPU")


def make_llm(folder, case=None, **options) -> LLM:
    max_position = 512 if case is None else case.overrides.get("max_position_embeddings", 512)
    options = {"max_num_seqs": 512, "max_num_batched_tokens": 512, "max_model_len": min(8448, max_position),
               "num_blocks": 560, "use_tqdm": False, **options}
    return LLM(folder, device="cuda", **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_logits_stepwise_and_chunked(case, tmp_path):
    folder = write_case(case, tmp_path / "model")
    oracle = load_golden(case, folder)
    llm = make_llm(folder, case)
    prompt = case.prompt()
    forced = prompt + oracle["tokens"].tolist()[:-1]
    rows = KEPT_ROWS + NUM_NEW_TOKENS - 1
    compare(sequence_logits(llm, forced, [512] * (len(prompt) // 512) + [len(prompt) % 512, 1], rows), oracle)
    compare(sequence_logits(llm, forced, [17, 64, 33, 500], rows), oracle)


ENGINE_OPTIONS = [dict(), dict(max_num_batched_tokens=16, max_num_seqs=8), dict(num_blocks=9, max_num_seqs=8),
                  dict(enable_prefix_caching=False), dict(block_size=8), dict(block_size=32), dict(max_num_seqs=2),
                  dict(scheduling_policy="static", max_num_seqs=3),
                  dict(use_kv_cache=False, enable_prefix_caching=False)]


@pytest.mark.parametrize("options", ENGINE_OPTIONS, ids=str)
def test_chunks_prefix_hits_and_preemption_agree_with_the_cpu_backend(options, tmp_path):
    """Equal greedy tokens up to the first choice that bfloat16 error could turn."""
    case = CASES[0]
    folder = write_case(case, tmp_path / "model")
    limit = tolerance(load_golden(case, folder))
    cpu, gpu = make_cpu_llm(folder, case), make_llm(folder, case, **options)
    shared = case.prompt()
    prompts = [shared + [i, 2 * i] for i in range(6)] + [shared[:16 + i] for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = cpu.generate(prompts, params)
    # Two waves: the first one's blocks are there for the second to find.
    outputs = gpu.generate(prompts[:3], params) + gpu.generate(prompts[3:], params)
    same = 0
    for prompt, want, got in zip(prompts, expected, outputs):
        want, got = want.outputs[0].token_ids, got.outputs[0].token_ids
        assert len(got) == 40
        differs = np.flatnonzero(np.array(want) != np.array(got))
        same += not len(differs)
        if len(differs):
            logits = sequence_logits(cpu, prompt + want[:differs[0]], [512], last_rows=1)
            assert choice_gaps({"logits": logits})[0] <= limit, f"differs at token {differs[0]}, a clear choice"
    stats = gpu.engine.stats
    assert stats.num_free_blocks == stats.num_blocks
    if options.get("num_blocks") == 9:
        assert stats.num_preemptions > 0
    if options == {}:
        assert stats.prefix_cache_hits > 0


def test_seeded_sampling_draws_the_same_tokens_as_the_cpu_backend(tmp_path):
    """Given equal logits the draws are equal by construction; here logits differ by bf16 noise, so most agree."""
    folder = write_tiny_model(tmp_path / "model")
    params = [SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=i, max_tokens=8, ignore_eos=True)
              for i in range(16)]
    prompts = [f"The fox number {i} went" for i in range(16)]
    ours = [o.outputs[0].token_ids for o in make_llm(folder).generate(prompts, params)]
    again = [o.outputs[0].token_ids for o in make_llm(folder).generate(prompts[::-1], params[::-1])][::-1]
    cpu = LLM(folder, device="cpu", num_blocks=128, use_tqdm=False).generate(prompts, params)
    assert ours == again
    first_tokens_equal = sum(a[0] == b.outputs[0].token_ids[0] for a, b in zip(ours, cpu))
    assert first_tokens_equal >= 13, first_tokens_equal


def test_out_of_gpu_memory_says_what_was_asked_for_and_what_is_free(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    with pytest.raises(OutOfDeviceMemoryError, match=r"does not fit.*KV-cache blocks.* [GT]iB .* are free"):
        make_llm(folder, num_blocks=10**9)
    from tinyvllm.runner.cuda import CUDABackend

    with pytest.raises(OutOfDeviceMemoryError, match=r"909,494\.70 TiB asked for, [\d.]+ GiB of [\d.]+ GiB free"):
        CUDABackend().empty((10**18,), np.uint8)
    assert make_llm(folder).generate("still works", SamplingParams(temperature=0, max_tokens=4))


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory):
    """The Llama-3.2-1B-Instruct shape with random weights, as a Hugging Face folder."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from tinyvllm.model.config import ModelConfig
    from tinyvllm.model.llama_weights import expected_tensors

    folder = tmp_path_factory.mktemp("llama-1b")
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((LLAMA_1B / name).read_text())
    config = ModelConfig.from_folder(folder)
    generator = torch.Generator("cuda").manual_seed(0)
    scale = 1.6 / config.hidden_size**0.5
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator, device="cuda")
        values = 1 + 0.1 * values if len(shape) == 1 else scale * values
        tensors[name] = values.to(torch.bfloat16).cpu()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def test_llama_1b_shape_against_transformers_on_the_same_gpu(llama_1b):
    pytest.importorskip("transformers")
    import torch

    from tests.hf_oracle import run_oracle

    prompt = np.random.default_rng(5).integers(0, 128000, 300).tolist()
    oracle = run_oracle(llama_1b, prompt, device="cuda")
    torch.cuda.empty_cache()
    llm = LLM(llama_1b, device="cuda", skip_tokenizer_init=True, use_tqdm=False, max_model_len=4096, num_blocks=256,
              max_num_seqs=512, max_num_batched_tokens=512)
    forced = prompt + oracle["tokens"].tolist()[:-1]
    rows = KEPT_ROWS + NUM_NEW_TOKENS - 1
    stepwise = sequence_logits(llm, forced, [300, 1], rows)
    # Random weights over 128,256 candidates: few choices are clear, and those are compared.
    compare(stepwise, oracle, min_clear=0.1)
    compare(sequence_logits(llm, forced, [100, 17, 300], rows), oracle, min_clear=0.1)
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True))[0]
    differs = np.flatnonzero(np.array(output.outputs[0].token_ids) != oracle["tokens"])
    if len(differs):
        assert choice_gaps(oracle)[KEPT_ROWS - 1 + differs[0]] <= tolerance(oracle)
    errors = {name: float(np.abs(logits - oracle["truth"]).mean())
              for name, logits in (("tinyvllm", stepwise), ("transformers", oracle["logits"]))}
    print(json.dumps({"mean_abs_error_to_float32": errors, "equal_greedy_tokens": NUM_NEW_TOKENS if not len(differs)
                      else int(differs[0])}))
