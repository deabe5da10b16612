"""Which graph replays which step, without a GPU: the fused forward pass over NumPy twins, captured as a list of calls.

Device memory is host memory here, a graph is the list of calls that were made with the addresses of then, and replaying
it makes them again. So a graph that was captured for other memory, or without a row that is to be kept, shows.
"""

import contextlib
import ctypes
import gc
import weakref
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from tests.host_memory import HostMemory, view
from tests.model_files import write_tiny_model
from tinyvllm import SamplingParams
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.kernels import numpy_backend
from tinyvllm.kernels.attention.decode_registers import NO_HINTS
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.kernels.fused import numpy_twin
from tinyvllm.kernels.fused.take_sampled import take_sampled_numpy
from tinyvllm.loader.weights import numpy_weights
from tinyvllm.model import llama, llama_fused
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.rope_table import cos_sin_table
from tinyvllm.runner import cuda_graphs, pinned, prompt_graphs, sampling
from tinyvllm.runner.cuda import CUDABackend
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.sampling import parameters_in
from tinyvllm.runner.watch import RequestWatch

PROMPTS = {"it": [3, 5, 8, 13, 21, 34, 55], "other": [7, 70], "third": [9, 90, 99]}
BLOCK_SIZE, NUM_BLOCKS, MAX_TOKENS = 16, 24, 30


class HostStream:
    """A Stream that does what it is given as late as can be: when somebody waits for it. Or records it."""

    def __init__(self):
        self.calls = None
        self.queue = deque()
        self.num_given = self.num_done = 0

    def run(self, function, arguments):
        if self.calls is None:
            self.put(lambda: function(*map(view, arguments)))
        else:
            self.calls.append((function, arguments))

    def put(self, work):
        self.queue.append(work)
        self.num_given += 1

    def reach(self, number):
        while self.num_done < number:
            self.queue.popleft()()
            self.num_done += 1

    def synchronize(self):
        self.reach(self.num_given)

    def copy_to_device(self, address, host_address, size):
        self.put(lambda: ctypes.memmove(address, host_address, size))

    def copy_to_host(self, host_address, address, size):
        self.put(lambda: ctypes.memmove(host_address, address, size))

    @contextlib.contextmanager
    def capture(self):
        self.calls = calls = []
        captured = SimpleNamespace()
        yield captured
        self.calls = None
        captured.graph = SimpleNamespace(launch=lambda stream: [stream.run(*call) for call in calls], calls=calls)


class HostEvent:
    """An Event of a HostStream."""

    def record(self, stream):
        self.stream, self.number = stream, stream.num_given

    def synchronize(self):
        self.stream.reach(self.number)


def attention_without_padding(out, qkv, k, v, tables, seq_lens, starts, num_decodes, *rest):
    """As the kernels: rows without a context are passed over."""
    real = int((seq_lens > 0).sum())
    rows = starts[real]
    numpy_twin.OPS["attention"](out[:rows], qkv[:rows], k, v, tables[:real], seq_lens[:real], starts[:real + 1],
                                min(num_decodes, real), *rest)


class HostBackend(HostMemory):
    """A CUDABackend in host memory. replays=False: llama.forward, one operation at a time."""

    name = "cuda"

    def __init__(self, replays: bool):
        self.replays = replays
        self.stream = HostStream()
        self.fused = SimpleNamespace(stream=self.stream, batch_invariant=False, hints=NO_HINTS,
                                     num_multiprocessors=8)
        fused = {**numpy_twin.OPS, "attention": attention_without_padding}
        operations = numpy_backend.OPS
        self.forward = (llama_fused.bind({name: self._queued(fused[name]) for name in llama_fused.OP_NAMES}) if replays
                        else llama.bind({name: self._queued(operations[name]) for name in llama.OP_NAMES}))
        self.argmax, self.sample = self._queued(operations["argmax"]), self._queued(operations["sample"])
        self.take_sampled = self._queued(take_sampled_numpy)
        self.pinned = pinned.PinnedPair(self.stream, 64)

    def _queued(self, operation):
        return lambda *arguments: self.stream.run(operation, arguments)

    def graphs(self, runner):
        if not self.replays:
            return None, None
        return cuda_graphs.DecodeGraphs(runner, self), prompt_graphs.PromptGraphs(runner, self)

    def upload(self, destination, host):
        part, staged = destination[:host.size].reshape(host.shape), host.copy()  # as the driver does
        self.stream.put(lambda: view(part).__setitem__(..., staged))
        return part

    def download(self, source):
        self.stream.synchronize()
        return view(source).copy()

    download_later = CUDABackend.download_later

    @property
    def _tokens(self):
        return self.pinned


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
    for module in (cuda_graphs, prompt_graphs):
        monkeypatch.setattr(module, "cuda", SimpleNamespace(current_context=lambda: None))
    monkeypatch.setattr(pinned, "pinned_buffer", lambda size, last_use: (ctypes.c_char * size)())
    monkeypatch.setattr(pinned, "Event", HostEvent)
    config, weights = model

    def make(graphs=True, ahead=False, caching=False):
        runner = ModelRunner(config, weights, HostBackend(graphs), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
                             max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
        runner.runs_ahead = ahead
        return LLMEngine(runner, vocab_size=config.vocab_size, eos_token_ids=(), num_blocks=NUM_BLOCKS,
                         block_size=BLOCK_SIZE, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32,
                         enable_prefix_caching=caching)

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
        tokens.update({o.request_id: o.outputs[0].token_ids for o in engine.step(ahead=True)})
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
    engine.step(ahead=True), engine.step(ahead=True), engine.step(ahead=True)
    kept = engine.runner.watch.is_kept.copy()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner._graphs.stream, "copy_to_device", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step(ahead=True)
    np.testing.assert_array_equal(engine.runner.watch.is_kept, kept)
    run(engine)
    assert engine.runner.watch.is_kept[:len(PROMPTS["it"]) + 13].all()


# ---- a step ahead ----

SAMPLED = pytest.mark.parametrize("params", [dict(temperature=0), dict(temperature=0.9, seed=4)],
                                  ids=["greedy", "sampled"])


def busy(engine, count=14, **params):
    """Requests that come and go: decode steps, mixed ones, rows that change their places. (tokens, outputs in order)"""
    add(engine, ["it", "other"], count, **params)
    most, order, tokens = 0, [], {}
    for step in range(200):
        if step == 4:
            add(engine, ["third"], count - 5, **params)
        if step == 7:
            engine.add_request([4] * 20, SamplingParams(max_tokens=3, ignore_eos=True, **params), "short")
        if not engine.has_unfinished_requests():
            break
        for output in engine.step(ahead=True):
            order.append((output.request_id, len(output.outputs[0].token_ids)))
            tokens[output.request_id] = output.outputs[0].token_ids
        most = max(most, len(engine.pipeline.steps))
    return tokens, order, most


@SAMPLED
def test_steps_ahead_give_the_tokens_of_steps_that_were_waited_for(make_engine, params):
    plain, ahead = make_engine(), make_engine(ahead=True)
    waited, ran_ahead = busy(plain, **params), busy(ahead, **params)
    assert ran_ahead[0] == waited[0] and set(waited[0]) == {"it", "other", "third", "short"}
    assert (waited[2], ran_ahead[2]) == (0, 1), "one never, the other always has a step under way"
    assert sorted(ran_ahead[1]) == sorted(waited[1])


@SAMPLED
def test_steps_ahead_keep_what_a_watched_request_s_tokens_look_like(make_engine, params):
    ahead, eager = make_engine(ahead=True), make_engine(graphs=False)
    for engine in (ahead, eager):
        engine.runner.watch = watch_of(engine, "it")
    assert busy(ahead, **params)[0] == busy(eager, **params)[0]
    assert_kept_alike(ahead.runner.watch, eager.runner.watch)
    assert ahead.runner.watch.context == eager.runner.watch.context


MIXED = {"it": dict(temperature=0.8, top_k=50, top_p=0.9, seed=2**64 - 5), "other": dict(temperature=0),
         "third": dict(temperature=1.3, top_p=0.5, seed=3), "late": dict(temperature=2, top_k=3, seed=9)}


def mixed(engine):
    """Requests that ask for different draws and take turns in the rows: their tokens."""
    tokens = {}
    for step in range(60):
        if step in (0, 5):
            for name in ("it", "other") if step == 0 else ("third", "late"):
                engine.add_request(PROMPTS.get(name, [50]), SamplingParams(
                    max_tokens={"it": 9, "other": 25}.get(name, 14), ignore_eos=True, **MIXED[name]), name)
        if not engine.has_unfinished_requests():
            break
        tokens.update({o.request_id: o.outputs[0].token_ids for o in engine.step(ahead=True)})
    return tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_replayed_draws_follow_each_request_s_own_parameters(make_engine, ahead):
    engine, eager = make_engine(ahead=ahead), make_engine(graphs=False)
    tokens = mixed(engine)
    assert tokens == mixed(eager) and {name: len(ids) for name, ids in tokens.items()} == {
        "it": 9, "other": 25, "third": 14, "late": 14}
    draw, argmax = numpy_backend.OPS["sample"], numpy_backend.OPS["argmax"]
    graphs = engine.runner._graphs._graphs
    assert {key[2] for key in graphs} == {True, False}, "the last steps have greedy requests only"
    for key, graph in graphs.items():
        last, arguments = graph.calls[-1]
        assert last is (argmax if key[2] else draw) and arguments[1].shape[0] == key[0]


def test_a_replayed_step_s_inputs_come_in_one_copy(make_engine, monkeypatch):
    engine = make_engine()
    for i, name in enumerate(("it", "other", "third")):
        add(engine, [name], temperature=0.7 + i, seed=i)
    engine.step(ahead=True)
    stream, graphs = engine.runner._graphs.stream, engine.runner._graphs
    copies, copy = [], stream.copy_to_device
    monkeypatch.setattr(stream, "copy_to_device", lambda *what: (copies.append(what[2]), copy(*what)))
    engine.step(ahead=True), engine.step(ahead=True), engine.step(ahead=True)
    (bucket, width, greedy, *_), = graphs._graphs
    assert (bucket, greedy) == (4, False) and graphs.last_graph is not None
    assert copies == [4 * (bucket * (7 + 6) + 3 * width)] * 3
    engine.settle()
    device = parameters_in(graphs._inputs_on_device, bucket)
    np.testing.assert_array_equal(view(device.temperature), np.array([0.7, 1.7, 2.7, 0], np.float32))
    assert view(device.seed)[:3].tolist() == [0, 1, 2]
    assert view(device.position)[:3].tolist() == [len(PROMPTS[name]) + 3 for name in ("it", "other", "third")]


def test_a_step_whose_parameters_could_not_be_written_leaves_none_behind(make_engine, monkeypatch):
    """The same requests again must not count as known, in either of the two buffers."""
    engine, plain = make_engine(), make_engine()
    for one in (engine, plain):
        add(one, ["it", "other"], temperature=0.9, seed=4)
        for _ in range(4):
            one.step()
    for _ in range(3):
        with monkeypatch.context() as patch:
            for pinned_one in engine.runner._graphs._inputs._buffers:
                pinned_one.requests = []
            patch.setattr(sampling, "fill_positions", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step(ahead=True)
        assert not any(one.requests for one in engine.runner._graphs._inputs._buffers)
    assert run(engine) == run(plain)


@SAMPLED
def test_a_step_that_fails_once_it_is_under_way_is_begun_again_with_the_tokens_before_it(make_engine, params):
    """It has run on the device, unknown to anybody: what it sampled there is not what the next one begins with."""
    engine, plain = make_engine(ahead=True), make_engine()
    for one in (engine, plain):
        add(one, ["it", "other"], **params)
    backend, tokens = engine.runner.backend, {}
    for step in range(30):
        if step in (4, 6, 9):  # the one ahead
            backend.download_later = lambda *_: 1 / 0
        tokens.update({o.request_id: o.outputs[0].token_ids for o in engine.step(ahead=True)})
        vars(backend).pop("download_later", None)
    assert tokens == run(plain) and not engine.has_unfinished_requests()


def test_a_request_that_ends_early_leaves_a_row_that_nobody_reads(make_engine):
    plain = make_engine()
    tokens = busy(plain, temperature=0)[0]
    end = next(t for i, t in enumerate(tokens["other"]) if i > 3 and t not in tokens["other"][:i])
    results = []
    for ahead in (False, True):
        engine = make_engine(ahead=ahead)
        for name in ("it", "other"):
            engine.add_request(PROMPTS[name], SamplingParams(temperature=0, max_tokens=14, stop_token_ids=(end,)), name)
        results.append(run(engine))
        assert engine.kv_cache_manager.pool.num_free_blocks == NUM_BLOCKS and not engine.pipeline.steps
    assert results[0] == results[1] and results[0]["other"][-1] == end


def test_the_logits_that_are_left_are_told_to_be_whose_they_are(make_engine):
    """After settle() those of the last step; nobody's if a step ran that nobody needed."""
    engine = make_engine(ahead=True)
    add(engine, ["it", "other"])
    for _ in range(4):
        engine.step(ahead=True)
    assert engine.runner.last_sampled == [], "another step is writing them"
    engine.settle()
    assert [request.request_id for request in engine.runner.last_sampled] == ["it", "other"]
    end = run(make_alone(make_engine, "it"))["it"][5]
    engine = make_engine(ahead=True)
    engine.add_request(PROMPTS["it"], SamplingParams(temperature=0, max_tokens=14, stop_token_ids=(end,)), "it")
    run(engine)
    assert engine.runner.last_sampled == []


def make_alone(make_engine, name):
    engine = make_engine()
    add(engine, [name], temperature=0)
    return engine


def test_pinned_memory_is_not_handed_out_before_its_copy_has_run(make_engine):
    stream = HostStream()
    pair, device = pinned.PinnedPair(stream, 3), np.zeros((6, 3), np.int32)
    for i in range(6):  # nobody waits for any of them
        buffer = pair.take()
        buffer.array[:] = i + 1
        stream.copy_to_device(device[i].ctypes.data, buffer.array.ctypes.data, 12)
        buffer.copying()
        assert len(stream.queue) <= 2, "held up more than it has to be"
    stream.synchronize()
    assert device.tolist() == [[i + 1] * 3 for i in range(6)]


def test_an_abandoned_step_s_memory_is_not_written_before_its_copies_have_run(make_engine):
    """Interrupted while it waits, again and again: what is on the stream then still runs, with its own inputs."""
    engine, plain = make_engine(ahead=True), make_engine()
    for one in (engine, plain):
        add(one, ["it", "other", "third"], temperature=0)

    def interrupted():
        raise KeyboardInterrupt

    tokens = {}
    for i in range(60):
        if not engine.has_unfinished_requests():
            break
        if engine.pipeline.steps and i % 3 == 1:
            engine.pipeline.steps[0].wait = interrupted
        try:
            tokens.update({o.request_id: o.outputs[0].token_ids for o in engine.step(ahead=True)})
        except KeyboardInterrupt:
            assert not engine.pipeline.steps
    assert tokens == run(plain)


def test_a_runner_is_let_go_of_at_once(make_engine):
    """Without the garbage collector: a reset needs its memory before the next one is made."""
    engine = make_engine(ahead=True)
    add(engine, ["it", "other"])
    run(engine)
    assert engine.runner._graphs._graphs
    gone = weakref.ref(engine.runner), weakref.ref(engine.runner._graphs)
    gc.disable()
    try:
        del engine
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


# ---- what attention is told of the lengths ----


@pytest.mark.parametrize("ahead", [False, True])
def test_attention_is_told_who_has_the_longest_context(make_engine, monkeypatch, ahead):
    """At every step: the rows of those with a context, longest first, then those that are not there. A graph was
    captured with what is to be done about it."""
    engine, hints, orders, asked = make_engine(ahead=ahead), [], [], []
    backend, graphs = engine.runner.backend, engine.runner._graphs
    forward, begin = backend.forward, graphs.begin

    def begun(output, watch):
        finish = begin(output, watch)
        backend.stream.synchronize()
        bucket = graphs.buckets[np.searchsorted(graphs.buckets, len(output.requests))]
        start = (cuda_graphs.NUMBERS + cuda_graphs.COLUMNS.index("order")) * bucket
        orders.append((output.starts.copy(), view(graphs._inputs_on_device)[start:start + bucket].tolist()))
        return finish

    monkeypatch.setattr(cuda_graphs, "unevenness", lambda *sizes: (asked.append(sizes), sizes[0] % 3)[1])
    monkeypatch.setattr(backend, "forward", lambda *a: (hints.append(backend.fused.hints), forward(*a)))
    monkeypatch.setattr(graphs, "begin", begun)
    add(engine, ["other", "it", "third"], count=12, temperature=0)
    engine.add_request([3] * 20, SamplingParams(max_tokens=9, ignore_eos=True, temperature=0), "long")
    run(engine)
    assert len(orders) > 10 and {len(starts) for starts, _ in orders} >= {3, 4}
    for starts, order in orders:
        count = len(starts)
        assert order[count:] == list(range(count, len(order))) and sorted(order) == list(range(len(order)))
        assert (np.diff(starts[order[:count]]) <= 0).all()
    kv_heads, multiprocessors = engine.runner.dims.num_kv_heads, backend.fused.num_multiprocessors
    assert asked == [(max(starts) + 1, sum(starts + 1), len(starts), kv_heads, multiprocessors) for starts, _ in orders]
    assert {key[4] for key in keys(engine)} == {0, 1, 2} and backend.fused.hints == NO_HINTS
    assert {(hint.order is not None, hint.in_parts) for hint in hints} == {(False, False), (True, False), (True, True)}


# ---- short prompts ----

SHORT = {"it": PROMPTS["it"], "other": PROMPTS["other"], "of 16": [11] * 16, "of 17": list(range(40, 57)),
         "of 32": [12, 13] * 16, "it again": PROMPTS["it"], "late": [4] * 16}


def one_after_the_other(engine, **params):
    tokens = {}
    for name, prompt in SHORT.items():
        engine.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True, **params), name)
        tokens.update(run(engine))
    return tokens


@SAMPLED
@pytest.mark.parametrize("ahead", [False, True])
def test_short_prompts_that_come_alone_are_replayed_and_sample_what_launched_ones_do(make_engine, params, ahead):
    engine, eager = make_engine(ahead=ahead), make_engine(graphs=False)
    assert one_after_the_other(engine, **params) == one_after_the_other(eager, **params)
    prompts, greedy = engine.runner._prompt_graphs, not params["temperature"]
    assert set(prompts.graphs) == {(16, greedy, False), (32, greedy, False)} and prompts.buckets == [16, 32]
    assert prompts.last_graph is prompts.graphs[16, greedy, False]


def test_a_replayed_prompt_with_tokens_that_are_not_there_writes_its_own_slots_only(make_engine):
    """In a cache that is full of something else; attention's rows beyond the prompt's are whatever was there."""
    engine, eager = make_engine(), make_engine(graphs=False)
    caches = []
    for one in (engine, eager):
        for array in one.runner.kv_cache:
            view(array)[:] = 0x3F80
        for name in ("it", "of 17", "other"):
            one.add_request(SHORT[name], SamplingParams(max_tokens=1, ignore_eos=True, temperature=0), name)
            run(one)
            view(one.runner.buffers.attn)[:] = 0x7FC0  # NaN
        caches.append([view(array).copy() for array in one.runner.kv_cache])
    assert engine.runner._prompt_graphs.last_graph is not None
    for ours, theirs in zip(*caches):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours != 0x3F80).any()


def test_prompts_that_are_long_several_watched_or_not_whole_are_launched(make_engine):
    engine, eager = make_engine(), make_engine(graphs=False)
    for one in (engine, eager):
        one.tokens = []
        for prompts in ([[5] * 36], [[5, 6], [7, 8]], [[5] * 40, [9] * 3]):  # 32 tokens fit into a step
            for i, prompt in enumerate(prompts):
                one.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True, temperature=0), str(i))
            one.tokens.append(run(one))
        one.runner.watch = watch_of(one, "it")
        add(one, ["it"], temperature=0)
        one.tokens.append(run(one))
    assert engine.tokens == eager.tokens
    assert engine.runner.watch.is_kept[:len(PROMPTS["it"])].all()
    assert set(engine.runner._prompt_graphs.graphs) == {(16, True, False)}, "only the last 4 of 36 are short and alone"


def test_a_prompt_whose_beginning_is_cached_is_replayed_too(make_engine):
    engine, eager = make_engine(caching=True), make_engine(graphs=False, caching=True)
    results = []
    for one in (engine, eager):
        results.append([])
        for tail in ([1, 2, 3], [4], [5, 6, 7, 8]):
            one.add_request([*range(60, 76), *tail], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0), "x")
            results[-1].append(run(one))
    assert results[0] == results[1]
    assert set(engine.runner._prompt_graphs.graphs) == {(32, True, False), (16, True, False)}, "19 tokens, then 4"


def test_graphs_of_batch_invariant_steps_are_not_those_of_others(make_engine):
    engine = make_engine()
    for invariant in (False, True):
        engine.runner.backend.fused.batch_invariant = invariant
        add(engine, ["it"], temperature=0)
        run(engine)
    assert {key[-1] for key in keys(engine)} == {False, True}
    assert set(engine.runner._prompt_graphs.graphs) == {(16, True, False), (16, True, True)}
