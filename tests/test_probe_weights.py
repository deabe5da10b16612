"""Weights by name: read as the file has them, changed in the running engine, put back."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.golden.make_golden import write_case
from tests.parity_cases import CASES
from tests.teacher_forcing import sequence_logits
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.loader.resolve import demo_model_folder
from tinyvllm.probe import ProbeError

PROMPT = [(7 * i) % 300 + 3 for i in range(37)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
ONE = 0x3F80


def file_tensors(path):
    """{name: (shape, first byte, last byte)} of a safetensors file, read here by hand."""
    data = Path(path).read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    assert all(entry["dtype"] == "BF16" for entry in header.values())
    return {name: (entry["shape"], *(8 + size + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()}


def patched_copy(folder, destination, name, row, column, bits):
    """A copy of a model folder in whose file this one element is another."""
    shutil.copytree(folder, destination)
    path = destination / "model.safetensors"
    shape, first, _ = file_tensors(path)[name]
    data = bytearray(path.read_bytes())
    place = first + 2 * (row if column is None else row * shape[1] + column)
    data[place:place + 2] = struct.pack("<H", bits)
    path.write_bytes(data)
    return destination


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", device="cpu", use_tqdm=False, num_blocks=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders with all that there is: tied, untied, biases."""
    root = tmp_path_factory.mktemp("cases")
    return {case.name: write_case(case, root / case.name) for case in CASES[:3]}


def bits_of(llm):
    """Every byte of every weight array."""
    return [np.array(array).tobytes() for array in llm.runner.weights]


# ---- reading ----


def check_every_tensor(llm, path):
    data, tensors = path.read_bytes(), file_tensors(path)
    assert {name: tuple(shape) for name, (shape, *_) in tensors.items()} == llm.probe.weight_names()
    for name, (shape, first, last) in tensors.items():
        weight = llm.probe.weight(name)
        assert weight.dtype == np.uint16 and weight.shape == tuple(shape)
        assert weight.tobytes() == data[first:last], name


def test_every_tensor_of_the_demo_model_has_the_bytes_of_its_file(demo):
    check_every_tensor(demo, demo_model_folder() / "model.safetensors")


@pytest.mark.parametrize("name", [case.name for case in CASES[:3]])
def test_every_tensor_of_tied_untied_and_biased_models_too(make_llm, folders, name):
    check_every_tensor(make_llm(folders[name]), folders[name] / "model.safetensors")


def test_parts_of_a_weight_are_picked_as_numpy_picks_them(demo):
    probe = demo.probe
    for name in ("model.layers.3.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight", EMBED):
        whole = probe.weight(name)
        for rows, columns in ((slice(5, 20), slice(3, 9)), (slice(None, None, 7), slice(-4, None)), ([3, 1], [0, 2, 2]),
                              (slice(0, 0), slice(None))):
            np.testing.assert_array_equal(probe.weight(name, rows, columns), whole[rows][:, columns])
        np.testing.assert_array_equal(probe.weight(name, 4, -1), whole[4:5, -1:])
    np.testing.assert_array_equal(probe.weight(NORM, slice(2, 5)), probe.weight(NORM)[2:5])


def test_what_is_read_is_a_copy(demo):
    before = bits_of(demo)
    for name in (EMBED, NORM):
        demo.probe.weight(name)[:] = 0
    k, v = demo.probe.kv(0, 0)
    k[:], v[:] = 1, 1
    assert bits_of(demo) == before and not demo.probe.kv(0, 0)[0].any()


# ---- changing ----


ELEMENTS = [(EMBED, 11, 5), ("model.layers.0.self_attn.q_proj.weight", 17, 63),
            ("model.layers.1.self_attn.k_proj.weight", 33, 0), ("model.layers.0.self_attn.v_proj.weight", 1, 31),
            ("model.layers.1.self_attn.o_proj.weight", 63, 127), ("model.layers.0.mlp.gate_proj.weight", 95, 1),
            ("model.layers.1.mlp.up_proj.weight", 0, 2), ("model.layers.0.mlp.down_proj.weight", 40, 95),
            ("model.layers.1.input_layernorm.weight", 9, None),
            ("model.layers.0.post_attention_layernorm.weight", 63, None), (NORM, 0, None)]


@pytest.mark.parametrize("case, element", [("tied_gqa", element) for element in ELEMENTS] + [
    ("untied_mqa", ("lm_head.weight", 383, 8)), ("untied_mqa", (EMBED, 11, 5)),
    ("biases", ("model.layers.1.self_attn.k_proj.bias", 3, None)),
    ("biases", ("model.layers.0.mlp.up_proj.bias", 3, None)),
    ("biases", ("model.layers.1.mlp.down_proj.bias", 63, None)),
], ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_patched_engine_computes_what_a_patched_checkpoint_gives(make_llm, folders, tmp_path, case, element):
    """And putting it back leaves every byte as it was."""
    name, row, column = element
    llm, prompt = make_llm(folders[case], max_num_seqs=64), [11, 383, *PROMPT]
    before, plain = bits_of(llm), sequence_logits(llm, prompt, [64])
    old = int(llm.probe.weight(name, row, column).reshape(()))
    new = 0x40C0  # 6: far from anything there
    assert llm.probe.set_weight(name, row, column, new) == old
    assert llm.probe.patches == [(name, row, column, old, new)]
    patched = sequence_logits(llm, prompt, [64])
    other = make_llm(patched_copy(folders[case], tmp_path / "patched", name, row, column, new), max_num_seqs=64)
    assert bits_of(llm) == bits_of(other)
    np.testing.assert_array_equal(patched, sequence_logits(other, prompt, [64]))
    assert (patched != plain).any()
    llm.probe.restore()
    assert bits_of(llm) == before and llm.probe.patches == []
    np.testing.assert_array_equal(sequence_logits(llm, prompt, [64]), plain)


def test_patches_are_remembered_until_they_are_undone(make_llm):
    llm = make_llm()
    probe, before = llm.probe, bits_of(llm)
    first, second = int(probe.weight(NORM, 3)[0]), int(probe.weight(EMBED, 2, 2)[0, 0])
    assert probe.set_weight(NORM, 3, None, 1) == first
    assert probe.set_weight(EMBED, 2, 2, 7) == second
    assert probe.set_weight(NORM, 3, None, 2) == 1
    assert probe.patches == [(NORM, 3, None, first, 2), (EMBED, 2, 2, second, 7)]
    probe.set_weight(EMBED, 2, 2, second)  # by hand
    assert probe.patches == [(NORM, 3, None, first, 2)]
    llm.reset(block_size=8)  # the weights stay, and so must the way back
    assert llm.probe.patches == [(NORM, 3, None, first, 2)] and llm.probe.weight(NORM, 3)[0] == 2
    llm.probe.restore()
    assert bits_of(llm) == before
    llm.probe.restore()  # nothing to do
    assert bits_of(llm) == before


def test_a_tied_model_says_what_its_lm_head_is(make_llm, folders):
    llm = make_llm()
    assert "lm_head.weight" not in llm.probe.weight_names()
    for call in (lambda: llm.probe.weight("lm_head.weight"), lambda: llm.probe.set_weight("lm_head.weight", 0, 0, 1)):
        with pytest.raises(ProbeError, match="no lm_head.weight of its own.*Use model.embed_tokens.weight; a change of "
                                             "it changes both"):
            call()
    assert "lm_head.weight" in make_llm(folders["untied_mqa"]).probe.weight_names()


# ---- what was computed before a patch is not served after it ----


def answers(llm, prompts=(PROMPT,)):
    return [output.outputs[0].token_ids for output in llm.generate([list(p) for p in prompts], GREEDY)]


def test_a_patch_empties_the_prefix_cache(make_llm):
    llm = make_llm(block_size=4)
    events = EventLog()
    llm.engine.listen(events)
    plain = answers(llm)
    hits = llm.engine.stats.prefix_cache_hits
    answers(llm)
    assert llm.engine.stats.prefix_cache_hits > hits  # so that the rest means something
    hits = llm.engine.stats.prefix_cache_hits
    cached = {block.block_id for block in llm.engine.kv_cache_manager.pool.cached_blocks.values()}
    llm.probe.set_weight("model.layers.0.self_attn.k_proj.weight", 0, 0, 0x42C8)
    evicted = [event.a for event in events.read()[0] if event.kind == "blocks_evicted"]
    assert cached and set(evicted[-1]) == cached
    patched = answers(llm)
    assert llm.engine.stats.prefix_cache_hits == hits
    fresh = make_llm(block_size=4)
    fresh.probe.set_weight("model.layers.0.self_attn.k_proj.weight", 0, 0, 0x42C8)
    assert patched == answers(fresh)
    assert patched != plain, "the patch is too small for this test"
    llm.probe.restore()
    assert answers(llm) == plain


def test_what_a_running_request_adds_to_stale_keys_is_never_found(make_llm):
    """A request that has run under the old weights goes on under the new ones: its blocks mix both."""
    llm = make_llm(block_size=4)
    manager = llm.engine.kv_cache_manager
    llm.engine.add_request(PROMPT, GREEDY, "old")
    llm.engine.add_request(PROMPT[:2], GREEDY, "short")  # has not filled a block yet
    llm.engine.step(), llm.engine.step()
    llm.probe.set_weight("model.layers.0.self_attn.k_proj.weight", 0, 0, 0x42C8)
    tokens = {}
    while llm.engine.has_unfinished_requests():
        tokens.update({output.request_id: output.outputs[0].token_ids for output in llm.engine.step()})
    assert not manager.pool.cached_blocks
    fresh = make_llm(block_size=4)
    fresh.probe.set_weight("model.layers.0.self_attn.k_proj.weight", 0, 0, 0x42C8)
    for prompt, name in ((PROMPT, "old"), (PROMPT[:2], "short")):
        again = prompt + tokens[name]
        assert answers(llm, [again]) == answers(fresh, [again])
    assert manager.pool.cached_blocks  # new requests publish as ever
    manager.check()


def test_a_preempted_request_publishes_again_what_it_computed_anew(make_llm):
    llm = make_llm(block_size=4, num_blocks=24)
    llm.engine.add_request(PROMPT, GREEDY, "a")
    llm.engine.step()
    llm.probe.set_weight(NORM, 0, None, ONE)
    request, = llm.engine.scheduler.running
    llm.engine.scheduler.running.remove(request)
    llm.engine.scheduler._preempt(request, type("Output", (), {"preempted": []})())
    llm.engine.step()
    assert len(llm.engine.kv_cache_manager.pool.cached_blocks) == (len(PROMPT) + 1) // 4


# ---- bad input loses nothing ----


@pytest.mark.parametrize("arguments, words", [
    (("model.layers.9.mlp.up_proj.weight", 0, 0, 0), "there is no weight 'model.layers.9.mlp.up_proj.weight'"),
    ((7, 0, 0, 0), "there is no weight 7"),
    ((EMBED, 384, 0, 0), r"embed_tokens.weight has shape \(384, 64\): a row is a whole number from 0 to 383, got 384"),
    ((EMBED, -1, 0, 0), "got -1"), ((EMBED, 0, 64, 0), "a column is .* 0 to 63, got 64"),
    ((EMBED, 0, None, 0), "a column .* got None"), ((EMBED, 0.0, 1, 0), "a row .* got 0.0"),
    ((NORM, 0, 0, 0), r"model.norm.weight is a vector of shape \(64,\): .*got column 0"),
    ((NORM, 0, None, 65536), "from 0 to 65535, got 65536"), ((NORM, 0, None, 1.0), "got 1.0"),
    ((NORM, 0, None, True), "got True"),
])
def test_elements_that_are_not_there_are_refused_with_name_and_shape(make_llm, arguments, words):
    llm = make_llm()
    before = bits_of(llm)
    with pytest.raises(ProbeError, match=words):
        llm.probe.set_weight(*arguments)
    assert bits_of(llm) == before and llm.probe.patches == []


def test_parts_that_are_not_there_are_refused_with_name_and_shape(make_llm):
    probe = make_llm().probe
    for arguments, words in (((EMBED, 384), r"weight has shape \(384, 64\): rows are a slice, .* below 384, got 384"),
                             ((EMBED, [0, 400]), "rows are"), ((EMBED, slice(None), "x"), "columns are"),
                             ((NORM, slice(None), 1), "is a vector"), (("x",), "there is no weight 'x'")):
        with pytest.raises(ProbeError, match=words):
            probe.weight(*arguments)
    for layer, block_id, words in ((2, 0, "layer 2"), (0, 128, "block 128"), (0, -1, "block -1")):
        with pytest.raises(ProbeError, match=words):
            probe.kv(layer, block_id)
