"""Parity with transformers: golden files everywhere, a live comparison where torch and transformers are installed."""

from pathlib import Path

import numpy as np
import pytest

from tests.golden.make_golden import weights_hash, write_case
from tests.model_files import TINY_CONFIG
from tests.parity_cases import CASES, KEPT_ROWS, NUM_NEW_TOKENS, ParityCase, choice_gaps, compare, tolerance
from tests.teacher_forcing import sequence_logits
from tinyvllm import LLM, SamplingParams
from tinyvllm.kernels.bf16 import bf16_to_float32

GOLDEN = Path(__file__).parent / "golden"


def load_golden(case: ParityCase, folder: Path) -> dict:
    data = np.load(GOLDEN / f"{case.name}.npz")
    assert str(data["weights"]) == weights_hash(folder), "other weights than the golden file's: run make_golden again"
    return {"tokens": data["tokens"], "logits": bf16_to_float32(data["logits"]), "truth": data["truth"]}


def make_llm(folder, case: ParityCase, **options) -> LLM:
    max_model_len = min(8448, case.overrides.get("max_position_embeddings", TINY_CONFIG["max_position_embeddings"]))
    return LLM(folder, device="cpu", max_num_seqs=512, max_num_batched_tokens=512, max_model_len=max_model_len,
               num_blocks=560, use_tqdm=False, **options)


def check(case: ParityCase, folder: Path, oracle: dict, **options) -> None:
    llm = make_llm(folder, case, **options)
    prompt, new = case.prompt(), oracle["tokens"].tolist()
    forced = prompt + new[:-1]
    rows = KEPT_ROWS + NUM_NEW_TOKENS - 1
    # The prompt at once and then token by token, as the oracle did; and all of it in odd chunks.
    stepwise = sequence_logits(llm, forced, [512] * (len(prompt) // 512) + [len(prompt) % 512, 1], rows)
    compare(stepwise, oracle)
    chunked = sequence_logits(llm, forced, [17, 64, 33, 500], rows)
    assert np.array_equal(chunked, stepwise), "the logits depend on how the sequence was chunked"

    # The engine's own greedy run: equal up to the first choice that bfloat16 error could turn.
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True))[0]
    ours = output.outputs[0].token_ids
    differs = np.flatnonzero(np.array(ours) != oracle["tokens"])
    if len(differs):
        gap = choice_gaps(oracle)[KEPT_ROWS - 1 + differs[0]]
        assert gap <= tolerance(oracle), f"greedy text differs at token {differs[0]}, a clear choice"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case, tmp_path):
    folder = write_case(case, tmp_path / "model")
    check(case, folder, load_golden(case, folder))


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_eager_is_the_same_function(case, tmp_path):
    folder = write_case(case, tmp_path / "model")
    tokens = case.prompt() + load_golden(case, folder)["tokens"].tolist()
    compiled = sequence_logits(make_llm(folder, case), tokens, [50, 1])
    eager = sequence_logits(make_llm(folder, case, enforce_eager=True), tokens, [50, 1])
    assert np.array_equal(compiled, eager)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_live(case, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_oracle import run_oracle

    # Other weights and another prompt than the golden file's, so that this is a second sample and not a repeat.
    case = ParityCase(case.name, case.overrides, case.dtype, case.shards, case.prompt_length, case.seed + 100)
    folder = write_case(case, tmp_path / "model")
    check(case, folder, run_oracle(folder, case.prompt()))
