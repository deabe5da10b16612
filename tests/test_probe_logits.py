"""Logits of the last step, the most likely tokens, and the logit lens."""

import numpy as np

from tests.golden.make_golden import write_case
from tests.parity_cases import CASES
from tests.probe_case import GREEDY, OTHERS, PROMPT
from tinyvllm import SamplingParams
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from tinyvllm.probe.lens import top

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def test_logits_and_top_are_those_of_the_last_step(make_llm):
    llm = make_llm(max_num_batched_tokens=32, max_num_seqs=8)
    probe = llm.probe
    llm.engine.add_request(PROMPT, GREEDY, "long")
    llm.engine.add_request(OTHERS[1], GREEDY, "other")
    llm.engine.step()
    assert probe.logits("long") is None and probe.top("long") is None and probe.logits("nobody") is None
    while llm.engine.has_unfinished_requests():
        outputs = {o.request_id: o.outputs[0].token_ids for o in llm.engine.step()}
        for request_id, token_ids in outputs.items():
            logits = probe.logits(request_id)
            assert logits.dtype == np.float32 and logits.shape == (llm.model_config.vocab_size,)
            ids, best, total = probe.top(request_id, 5)
            assert ids[0] == token_ids[-1] and (np.diff(best) <= 0).all()
            np.testing.assert_array_equal(best, logits[ids])
            order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
            np.testing.assert_array_equal(ids, order[:5])
            np.testing.assert_allclose(total, np.log(np.exp(logits.astype(np.float64)).sum()), rtol=1e-9)
    assert probe.top("long", 10**9) is None or len(probe.top("long", 10**9)[0]) == llm.model_config.vocab_size


def test_the_last_layer_of_the_lens_is_the_models_own_answer(make_llm):
    llm = make_llm(max_num_seqs=64)
    llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.step()
    ids, logits, total = llm.probe.logit_lens(len(PROMPT) - 1, n=7)
    layers = llm.model_config.num_hidden_layers
    assert ids.shape == logits.shape == (layers + 1, 7) and total.shape == (layers + 1,)
    own = llm.probe.top("it", 7)
    np.testing.assert_array_equal(ids[-1], own[0])
    np.testing.assert_array_equal(logits[-1], own[1])
    assert total[-1] == own[2]


def test_each_layer_of_the_lens_is_norm_and_projection_of_what_hidden_shows(make_llm, tmp_path):
    llm = make_llm(write_case(CASES[1], tmp_path / "untied"))
    llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.step()
    hidden = llm.probe.hidden(20).astype(np.float64)
    assert hidden.shape == (llm.model_config.num_hidden_layers + 1, 64)
    norm, head = (bf16_to_float32(llm.probe.weight(name)).astype(np.float64) for name in (NORM, "lm_head.weight"))
    np.testing.assert_array_equal(float32_to_bf16(hidden[0]), llm.probe.weight(EMBED, PROMPT[20])[0])
    exact = hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + llm.model_config.rms_norm_eps) * norm @ head.T
    ids, logits, total = llm.probe.logit_lens(20, n=384)
    got = np.empty_like(exact)
    np.put_along_axis(got, ids, logits, axis=1)
    # Three roundings to bfloat16 (row, weighted row, logit), each within 2**-9 of its value.
    scale = np.linalg.norm(exact, axis=1, keepdims=True) / np.sqrt(exact.shape[1])
    assert (np.abs(got - exact) <= 2.0**-7 * (np.abs(exact) + 2 * scale)).all()
    np.testing.assert_allclose(total, np.log(np.exp(got).sum(1)), rtol=1e-6)


def test_logits_of_the_watched_request_stay_when_others_run_on(make_llm):
    llm = make_llm(enable_prefix_caching=False)
    llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.add_request(PROMPT[5:9], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), "other")
    last = None
    while llm.engine.has_request("it"):
        llm.engine.step()
        last = llm.probe.logits("it")
    llm.engine.step()
    assert [request.request_id for request in llm.runner.last_sampled] == ["other"]
    np.testing.assert_array_equal(llm.probe.logits("it"), last)
    llm.probe.unwatch()
    assert llm.probe.logits("it") is None


def test_infinite_and_broken_logits_do_not_break_top():
    logits = np.array([[1, np.nan, 3, 3, -np.inf], [np.inf, 0, 0, 0, 0], [-np.inf] * 5], np.float32)
    ids, best, total = top(logits, 3)
    assert ids.tolist() == [[2, 3, 0], [0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(total[0], np.log(np.exp([1.0, 3, 3]).sum()))


def test_ties_fall_to_the_lower_id():
    logits = np.random.default_rng(1).integers(0, 5, (3, 1000)).astype(np.float32)
    ids, *_ = top(logits, 700)
    np.testing.assert_array_equal(ids, [np.lexsort((np.arange(1000), -row))[:700] for row in logits])
