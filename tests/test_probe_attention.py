"""The probe on a running engine, on the CPU: what it shows is what the engine computed, and looking changes nothing."""

import numpy as np
import pytest

from tests.probe_case import GREEDY, OPTIONS, PROMPT, SAMPLED, exact_attention, run
from tinyvllm import LLM, SamplingParams
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.loader.resolve import demo_model_folder
from tinyvllm.probe import ProbeError

# ---- looking changes nothing ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_watching_changes_no_token(make_llm, options, params):
    llm = make_llm(**options)
    expected = run(llm, watch=None, params=params)
    llm.reset()

    def look(llm):
        probe = llm.probe
        if probe.kept:
            probe.attention(probe.kept[-1:])
            probe.logits("it"), probe.top("first", 3), probe.hidden(probe.kept[0])

    assert run(llm, until=look, params=params) == expected


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_kept_has_the_same_bits_whatever_the_batch_was(make_llm, options):
    alone = make_llm(enable_prefix_caching=False)
    alone.probe.watch("it")
    tokens = alone.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
    alone.engine.add_request(PROMPT + tokens, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), "it")
    alone.engine.step()
    llm = make_llm(**options)
    assert run(llm)["it"] == tokens
    first = llm.runner.watch.request.num_cached_tokens  # in chunks, it finds what the first request has computed
    assert first == (16 if "max_num_batched_tokens" in options else 0)
    kept = slice(first, len(PROMPT) + len(tokens) - 1)  # the last token was never computed
    assert llm.probe.kept == list(range(kept.start, kept.stop))
    for name in ("queries", "residual"):
        np.testing.assert_array_equal(getattr(llm.runner.watch, name)[:, kept],
                                      getattr(alone.runner.watch, name)[:, kept])


# ---- attention ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_the_softmax_over_the_blocks_the_engine_used(make_llm, options):
    llm = make_llm(**options)
    checked = []

    def check(llm):
        probe = llm.probe
        if not probe.kept or probe.context < 30 or len(checked) > 3:
            return
        rows = [probe.kept[-1], probe.kept[0]]
        weights = probe.attention(rows, layers=[1, 0])
        watch = llm.runner.watch
        assert weights.shape == (2, llm.model_config.num_attention_heads, 2, probe.context)
        assert weights.dtype == np.float32
        for i, layer in enumerate((1, 0)):
            for head in range(weights.shape[1]):
                for r, row in enumerate(rows):
                    exact, *_ = exact_attention(llm, watch.queries, watch.block_ids, layer, head, row)
                    np.testing.assert_allclose(weights[i, head, r, :row + 1], exact, rtol=2e-5, atol=1e-12)
                    assert not weights[i, head, r, row + 1:].any()
        checked.append(probe.context)

    run(llm, until=check)
    assert len(checked) > 3


def test_the_same_weights_in_one_byte_and_pooled(make_llm):
    llm = make_llm()
    run(llm)
    probe = llm.probe
    weights, rows = probe.attention(probe.kept), probe.kept
    rounded = probe.attention_uint8(rows)
    assert rounded.dtype == np.uint8 and rounded.shape == weights.shape
    np.testing.assert_array_equal(rounded, np.floor(weights.astype(np.float64) * 255 + 0.5))
    pooled = probe.attention_uint8(rows, width=10)
    borders = [c * probe.context // 10 for c in range(11)]
    expected = np.stack([rounded[..., a:b].max(-1) for a, b in zip(borders, borders[1:])], axis=-1)
    np.testing.assert_array_equal(pooled, expected)
    assert probe.attention_uint8(rows, width=10**6).shape == weights.shape
    np.testing.assert_array_equal(probe.attention_uint8(rows[:2], 1, [3], 10), pooled[1:2, 3:4, :2])
    assert probe.attention([], None, None).shape == (*weights.shape[:2], 0, probe.context)


def test_every_number_of_a_cell_follows_from_the_one_before(make_llm):
    llm = make_llm(block_size=4)
    run(llm)
    probe, dims = llm.probe, llm.runner.dims
    watch = llm.runner.watch
    weights = probe.attention(probe.kept)
    rng = np.random.default_rng(3)
    for _ in range(40):
        layer, head = int(rng.integers(dims.num_layers)), int(rng.integers(dims.num_heads))
        row, column = int(rng.integers(probe.context)), int(rng.integers(probe.context))
        cell = probe.attention_cell(layer, head, row, column)
        visible, later = max(row, column), column > row
        _, keys, values = exact_attention(llm, watch.queries, watch.block_ids, layer, head, visible)
        np.testing.assert_array_equal(cell["k"], keys[column])
        np.testing.assert_array_equal(cell["value"], values[column])
        np.testing.assert_array_equal(bf16_to_float32(cell["q_bits"]), cell["q"])
        np.testing.assert_array_equal(bf16_to_float32(cell["k_bits"]), cell["k"])
        np.testing.assert_array_equal(bf16_to_float32(cell["value_bits"]), cell["value"])
        np.testing.assert_array_equal(cell["q_bits"],
                                      watch.queries[layer, row, head * dims.head_dim:(head + 1) * dims.head_dim])
        np.testing.assert_array_equal(cell["products"], cell["q"].astype(np.float64) * cell["k"])
        total = np.float32(0)
        for product in cell["products"]:
            total = np.float32(total + product)
        assert cell["dot"] == total and cell["scale"] == np.float32(dims.head_dim ** -0.5)
        assert cell["score"] == np.float32(total * np.float32(cell["scale"]))
        assert cell["masked"] is later
        assert cell["weight"] == weights[layer, head, row, column]  # the very same bits
        if later:
            assert cell["weight"] == cell["exp"] == 0
        else:
            assert cell["score"] <= cell["row_max"] and cell["denominator"] >= 1
            np.testing.assert_allclose(cell["exp"], np.exp(cell["score"] - cell["row_max"]), rtol=1e-6)
            np.testing.assert_allclose(cell["weight"], cell["exp"] / cell["denominator"], rtol=1e-6)
    largest = int(weights[0, 0, 20].argmax())
    cell = probe.attention_cell(0, 0, 20, largest)
    assert cell["score"] == cell["row_max"]  # the kernel added these products in the same order
    np.testing.assert_allclose(weights[0, 0, 20].sum(), 1, rtol=1e-6)


def test_attention_agrees_with_transformers():
    """On the embedded model, whose heads are known: bfloat16 here against float32 there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    llm = LLM("demo", device="cpu", use_tqdm=False)
    prompt = llm.tokenizer.encode_prompt("A fox and an owl lived in the old mill. One day the fox met the owl and")
    llm.probe.watch("it")
    llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=1), "it")
    llm.engine.step()
    ours = llm.probe.attention(llm.probe.kept)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model_folder(), attn_implementation="eager",
                                                              dtype=torch.float32)
    with torch.no_grad():
        output = model(torch.tensor([prompt]), output_attentions=True, output_hidden_states=True)
    theirs = torch.cat(output.attentions).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 2e-3 and np.abs(ours - theirs).max() < 0.15
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.97
    hidden = np.stack([llm.probe.hidden(position) for position in range(len(prompt))], axis=1)
    # transformers' last hidden state is already normed: compare those before it
    for layer, expected in enumerate(output.hidden_states[:-1]):
        expected = expected[0].numpy()
        assert np.linalg.norm(hidden[layer] - expected) < 0.02 * np.linalg.norm(expected)


# ---- bad input loses nothing ----


@pytest.mark.parametrize("arguments, words", [
    (dict(rows=[0, 99]), "row .position of a query. 99 is not there: it can be 0 to 47"),
    (dict(rows=[-1]), "row .position of a query. -1"), (dict(rows=[0.5]), "row .* 0.5"), (dict(rows="3"), "row .* '3'"),
    (dict(rows=[0], layers=2), "layer 2 is not there: it can be 0 to 1"), (dict(rows=[0], heads=[0, 4]), "head 4"),
    (dict(rows=[True]), "row .* True"),
])
def test_rows_layers_and_heads_that_are_not_there_are_refused_by_name(make_llm, arguments, words):
    llm = make_llm()
    run(llm)
    before = llm.probe.attention([3])
    with pytest.raises(ProbeError, match=words):
        llm.probe.attention(**arguments)
    np.testing.assert_array_equal(llm.probe.attention([3]), before)


def test_other_bad_input_is_refused_too(make_llm):
    llm = make_llm()
    run(llm)
    probe = llm.probe
    for call, words in ((lambda: probe.watch(3), "a request id is text"), (lambda: probe.watch("x", 0), "max_tokens"),
                        (lambda: probe.watch("x", 2.5), "max_tokens"), (lambda: probe.hidden(1.5), "position 1.5"),
                        (lambda: probe.attention_cell(0, 0, 3, 48), "column .position of a key. 48"),
                        (lambda: probe.attention_uint8([3], width=0), "width"),
                        (lambda: probe.top("it", 0), "n is how many tokens")):
        with pytest.raises(ProbeError, match=words):
            call()
    assert probe.watched == "it" and probe.kept
