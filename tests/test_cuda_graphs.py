"""Which graph replays which step, without a GPU: the fused forward pass over NumPy twins, captured as a list of calls.

Device memory is host memory here, a graph is the list of calls that were made with the addresses of then, and replaying
it makes them again. So a graph that was captured for other memory, or without a row that is to be kept, shows.
"""

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from tests.model_files import write_tiny_model
from tinyvllm import SamplingParams
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.kernels import numpy_backend
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.kernels.fused import numpy_twin
from tinyvllm.loader.weights import numpy_weights
from tinyvllm.model import llama, llama_fused
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.rope_table import cos_sin_table
from tinyvllm.runner import cuda_graphs
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.watch import RequestWatch

PROMPTS = {"it": [3, 5, 8, 13, 21, 34, 55], "other": [7, 70], "third": [9, 90, 99]}
BLOCK_SIZE, NUM_BLOCKS, MAX_TOKENS = 16, 24, 30


def view(array):
    """The NumPy array over a DeviceArray's memory."""
    if not isinstance(array, DeviceArray) or not array.size:
        return np.empty(array.shape, array.dtype) if isinstance(array, DeviceArray) else array
    memory = (ctypes.c_char * array.nbytes).from_address(array.address)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


class HostStream:
    """A Stream that runs what it is given at once, or records it."""

    def __init__(self):
        self.calls = None

    def run(self, function, arguments):
        if self.calls is None:
            function(*map(view, arguments))
        else:
            self.calls.append((function, arguments))

    def synchronize(self):
        pass

    def copy_to_device(self, address, host_address, size):
        ctypes.memmove(address, host_address, size)

    def copy_to_host(self, host_address, address, size):
        ctypes.memmove(host_address, address, size)

    @contextlib.contextmanager
    def capture(self):
        self.calls = calls = []
        captured = SimpleNamespace()
        yield captured
        self.calls = None
        captured.graph = SimpleNamespace(launch=lambda stream: [stream.run(*call) for call in calls], calls=calls)


def attention_without_padding(out, qkv, k, v, tables, seq_lens, starts, num_decodes, *rest):
    """As the kernels: rows without a context are passed over."""
    real = int((seq_lens > 0).sum())
    rows = starts[real]
    numpy_twin.OPS["attention"](out[:rows], qkv[:rows], k, v, tables[:real], seq_lens[:real], starts[:real + 1],
                                min(num_decodes, real), *rest)


class HostBackend:
    """A CUDABackend in host memory. graphs=False: llama.forward, one operation at a time."""

    name = "cuda"

    def __init__(self, graphs: bool):
        self.graphs = graphs
        self.stream = HostStream()
        self.fused = SimpleNamespace(stream=self.stream)
        fused = {**numpy_twin.OPS, "attention": attention_without_padding}
        operations = numpy_backend.OPS
        self.forward = (llama_fused.bind({name: self._queued(fused[name]) for name in llama_fused.OP_NAMES}) if graphs
                        else llama.bind({name: self._queued(operations[name]) for name in llama.OP_NAMES}))
        self.argmax, self.sample = self._queued(operations["argmax"]), self._queued(operations["sample"])

    def _queued(self, operation):
        return lambda *arguments: self.stream.run(operation, arguments)

    def decode_graphs(self, runner):
        return cuda_graphs.DecodeGraphs(runner, self) if self.graphs else None

    def empty(self, shape, dtype):
        array = np.full(shape, 77, dtype)
        return DeviceArray(array.ctypes.data, tuple(shape), array.dtype, array)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        view(array)[...] = 0
        return array

    def put(self, destination, row_offset, rows):
        view(destination)[row_offset:row_offset + len(rows)] = rows

    def upload(self, destination, host):
        part = destination[:host.size].reshape(host.shape)
        view(part)[...] = host
        return part

    def download(self, source):
        return view(source).copy()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("graphs") / "model")
    config = ModelConfig.from_folder(folder)
    arrays = numpy_weights(folder, config)
    weights = llama.Weights(**{"lm_head": arrays["embed"], **arrays}, no_bias=np.empty(0, np.uint16),
                            cos_sin=cos_sin_table(config, 64))
    return config, llama.Weights(*(DeviceArray(x.ctypes.data, x.shape, x.dtype, x) for x in weights))


@pytest.fixture
def make_engine(model, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "cuda", SimpleNamespace(current_context=lambda: None))
    monkeypatch.setattr(cuda_graphs, "pinned_buffer", lambda size: (ctypes.c_char * size)())
    config, weights = model

    def make(graphs=True):
        runner = ModelRunner(config, weights, HostBackend(graphs), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
                             max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
        return LLMEngine(runner, vocab_size=config.vocab_size, eos_token_ids=(), num_blocks=NUM_BLOCKS,
                         block_size=BLOCK_SIZE, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32,
                         enable_prefix_caching=False)

    return make


def watch_of(engine, request_id, max_tokens=MAX_TOKENS):
    runner = engine.runner
    return RequestWatch(request_id, max_tokens, runner.dims, runner.config.hidden_size, runner.backend)


def add(engine, names, count=14, **params):
    for name in names:
        engine.add_request(PROMPTS[name], SamplingParams(max_tokens=count, ignore_eos=True, **params), name)


def run(engine, before=lambda step: None):
    tokens, step = {}, 0
    while engine.has_unfinished_requests():
        before(step)
        tokens.update({o.request_id: o.outputs[0].token_ids for o in engine.step()})
        step += 1
    return tokens


def keys(engine):
    return set(engine.runner._graphs._graphs)


def assert_kept_alike(ours, theirs):
    np.testing.assert_array_equal(ours.is_kept, theirs.is_kept)
    kept = np.flatnonzero(ours.is_kept)
    assert len(kept) > 10
    for name in ("queries", "residual"):
        ours_now, theirs_now = view(getattr(ours, name)), view(getattr(theirs, name))
        np.testing.assert_array_equal(ours_now[:, kept], theirs_now[:, kept])
        assert (np.delete(ours_now, kept, axis=1) == 77).all(), "a place that is nobody's was written"


@pytest.mark.parametrize("params", [dict(temperature=0), dict(temperature=0.8, seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("names", [["it"], ["other", "it", "third"], ["other", "it"]], ids=len)
def test_replayed_steps_keep_what_eager_ones_keep_and_give_the_same_tokens(make_engine, names, params):
    plain, watched, eager = make_engine(), make_engine(), make_engine(graphs=False)
    for engine in (watched, eager):
        engine.runner.watch = watch_of(engine, "it")
    tokens = []
    for engine in (plain, watched, eager):
        add(engine, names, **params)
        tokens.append(run(engine))
    assert tokens[0] == tokens[1] == tokens[2]
    assert_kept_alike(watched.runner.watch, eager.runner.watch)
    assert watched.runner._graphs.last_graph is not None
    assert {key[3] for key in keys(plain)} == {False} and {key[3] for key in keys(watched)} == {True}


def test_a_graph_of_a_step_that_nobody_watches_has_no_operation_more(make_engine):
    """Also while another request is watched, or the watched one has more tokens than are kept."""
    keep = numpy_twin.OPS["keep_rows"]
    plain, watched = make_engine(), make_engine()
    watched.runner.watch = watch_of(watched, "it", max_tokens=len(PROMPTS["it"]) + 3)
    for engine in (plain, watched):
        add(engine, ["it", "other"])
        run(engine)
    unwatched = plain.runner._graphs._graphs
    assert unwatched.keys() == {key for key in keys(watched) if not key[3]}
    for graphs in (unwatched, watched.runner._graphs._graphs):
        for key, graph in graphs.items():
            kept = [function for function, _ in graph.calls].count(keep)  # those without positions do nothing
            positions = [arguments[3].shape[0] for function, arguments in graph.calls if function is keep]
            layers = watched.runner.dims.num_layers
            assert kept == 2 * layers + 1 and set(positions) == {key[0] if key[3] else 0}


def test_a_new_watch_with_other_memory_lets_the_old_graphs_go(make_engine):
    engine, eager = make_engine(), make_engine(graphs=False)
    first, second = watch_of(engine, "it"), watch_of(engine, "other")
    add(engine, ["it", "other"], count=20)
    add(eager, ["it", "other"], count=20)
    eager.runner.watch = watch_of(eager, "other")
    engine.runner.watch = first
    frozen = []

    def change(step):
        if step == 5:
            frozen[:] = view(first.queries).copy(), view(first.residual).copy(), keys(engine)
            engine.runner.watch = second
        if step == 12:
            engine.runner.watch = None

    tokens = run(engine, change)
    assert tokens == run(eager)
    for now, then in zip((first.queries, first.residual), frozen):
        np.testing.assert_array_equal(view(now), then)
    kept = np.flatnonzero(second.is_kept)
    assert len(kept) == 7 and np.flatnonzero(first.is_kept).tolist() == list(range(len(PROMPTS["it"]) + 4))
    for name in ("queries", "residual"):
        np.testing.assert_array_equal(view(getattr(second, name))[:, kept],
                                      view(getattr(eager.runner.watch, name))[:, kept])
    assert {key[3] for key in frozen[2]} == {True} and {key[3] for key in keys(engine)} == {True, False}


def test_the_same_watch_that_follows_other_requests_keeps_its_graphs(make_engine):
    engine = make_engine()
    engine.runner.watch = watch = watch_of(engine, "it")
    add(engine, ["it"])
    run(engine)
    before = dict(engine.runner._graphs._graphs)
    watch.request_id = "other"
    add(engine, ["other"])
    run(engine)
    assert before and all(engine.runner._graphs._graphs[key] is graph for key, graph in before.items())


def test_a_step_that_fails_is_not_taken_for_kept(make_engine, monkeypatch):
    engine = make_engine()
    engine.runner.watch = watch_of(engine, "it")
    add(engine, ["it"])
    engine.step(), engine.step(), engine.step()
    kept = engine.runner.watch.is_kept.copy()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner._graphs.stream, "copy_to_device", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    np.testing.assert_array_equal(engine.runner.watch.is_kept, kept)
    run(engine)
    assert engine.runner.watch.is_kept[:len(PROMPTS["it"]) + 13].all()
