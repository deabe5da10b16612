"""Decode steps replayed as graphs, launched one by one, and eager: the same tokens from the same engine."""

import threading

import numpy as np
import pytest

from tests.kernel_cases import fresh_rng
from tests.model_files import write_tiny_model
from tests.parity_cases import CASES
from tinyvllm import LLM, SamplingParams
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.runner.prompt_graphs import BUCKETS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu():
    from tinyvllm.kernels.cuda_support import cuda_available

    if not cuda_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", head_dim=64, hidden_size=256,
                            intermediate_size=512)


def make_llm(folder, **options):
    return LLM(folder, device="cuda", use_tqdm=False, skip_tokenizer_init=True, **{
        "num_blocks": 400, "max_num_seqs": 40, "max_num_batched_tokens": 512, "max_model_len": 512, **options})


def prompts(rng, count):
    return [rng.integers(0, 370, int(rng.integers(3, 60))).tolist() for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 7, 20, 40])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_replayed_steps_give_the_tokens_of_launched_ones(folder, count, temperature):
    """Rows that fill up a bucket change nothing; nor does a context that grows into the next width (256 tokens)."""
    params = SamplingParams(temperature=temperature, max_tokens=300 if count == 3 else 40, ignore_eos=True,
                            seed=3 if temperature else None)
    wanted = prompts(fresh_rng(), count)
    llm = make_llm(folder)
    replayed = [o.outputs[0].token_ids for o in llm.generate(wanted, params)]
    assert llm.runner._graphs.last_graph is not None, "no step was replayed"
    launched = make_llm(folder)
    launched.runner._graphs = launched.runner._prompt_graphs = None
    assert replayed == [o.outputs[0].token_ids for o in launched.generate(wanted, params)]


@pytest.mark.parametrize("length", [2, 16, 23, 32, 64, 100, 128])
def test_a_replayed_prompt_has_the_logits_of_a_launched_one(folder, length):
    """The same bits where no token is missing; and what other steps have left in the buffers is not read."""
    rng, logits = fresh_rng(), {}
    long, *short = (rng.integers(0, 370, count).tolist() for count in (300, length, length, length))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for replayed in (True, False):
        llm, rows = make_llm(folder, enable_prefix_caching=False), []
        if not replayed:
            llm.runner._prompt_graphs = None
        for prompt in short:  # launched, and captured; then replayed
            llm.generate([long], params), llm.generate([prompt], params)
            rows.append(bf16_to_float32(llm.runner.backend.download(llm.runner.buffers.logits[:1])))
        logits[replayed] = np.concatenate(rows)
        if replayed:
            assert len(llm.runner._prompt_graphs.graphs) == 1 and llm.runner._prompt_graphs.last_graph is not None
    if length in BUCKETS:
        np.testing.assert_array_equal(logits[True], logits[False])
    assert np.linalg.norm(logits[True] - logits[False]) < 0.02 * np.linalg.norm(logits[False])


def serve_in_waves(llm, ahead, wanted, temperature):
    """A request every third step, every other one with tokens that end it: their tokens by number."""
    llm.runner.runs_ahead = ahead
    tokens, most, step = {}, 0, 0
    while step < 3 * len(wanted) or llm.engine.has_unfinished_requests():
        if step % 3 == 0 and step < 3 * len(wanted):
            i = step // 3
            params = SamplingParams(temperature=temperature, max_tokens=20 + 3 * (i % 20), ignore_eos=True,
                                    seed=i if temperature else None,
                                    stop_token_ids=range(5, 105) if i % 2 else ())
            llm.engine.add_request(wanted[i], params, str(i))
        tokens.update({output.request_id: output.outputs[0].token_ids for output in llm.engine.step(ahead=True)})
        most = max(most, len(llm.engine.pipeline.steps))
        step += 1
    assert most == ahead and len(tokens) == len(wanted)
    llm.engine.kv_cache_manager.check()
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks
    return tokens


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_steps_ahead_give_the_tokens_of_steps_that_were_waited_for(folder, temperature):
    """Prompts of one token and one bucket: then every step is replayed, and no token depends on who else is in it."""
    wanted = [[int(token)] for token in fresh_rng().integers(0, 370, 60)]
    results = []
    for ahead in (False, True):
        llm = make_llm(folder)
        llm.runner._graphs.buckets = llm.runner._graphs.buckets[-1:]
        results.append(serve_in_waves(llm, ahead, wanted, temperature))
    assert results[0] == results[1]
    assert len({len(tokens) for name, tokens in results[0].items() if int(name) % 2}) > 5, "hardly one ended early"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_steps_ahead_of_a_batch_that_comes_at_once(folder, temperature):
    """The same steps then, prompts and all: the same bits."""
    wanted, results = prompts(fresh_rng(), 40), []
    params = SamplingParams(temperature=temperature, max_tokens=60, ignore_eos=True, seed=3 if temperature else None)
    for ahead in (False, True):
        llm = make_llm(folder)
        llm.runner.runs_ahead = ahead
        results.append([output.outputs[0].token_ids for output in llm.generate(wanted, params)])
    assert results[0] == results[1]


def test_steps_ahead_with_preemption_and_chunks_lose_nothing(folder):
    llm = make_llm(folder, num_blocks=16, max_model_len=256, max_num_batched_tokens=64)
    wanted = prompts(fresh_rng(), 40)
    tokens = serve_in_waves(llm, True, wanted, 0)
    assert all(len(tokens[str(i)]) == 20 + 3 * (i % 20) for i in range(0, 40, 2))
    assert llm.engine.stats.num_preemptions > 0


def test_a_step_asked_to_be_eager_is_and_agrees(folder):
    """Logits of one decode step (prompts of one token are that), replayed and eager, differ by bfloat16 noise only."""
    wanted = [[int(token)] for token in fresh_rng().integers(0, 370, 5)]
    logits = {}
    for eager in (False, True):
        llm = make_llm(folder)
        llm.runner.eager = eager
        for _ in range(2):  # the first time a graph is captured, the second time replayed
            llm.generate(wanted, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        assert (llm.runner._graphs.last_graph is None) == eager
        logits[eager] = bf16_to_float32(llm.runner.backend.download(llm.runner.buffers.logits[:5]))
    error = np.linalg.norm(logits[True] - logits[False]) / np.linalg.norm(logits[True])
    assert error < 0.05  # of two unrelated rows of logits it is about 1.4


@pytest.mark.parametrize("count", [1, 3, 20])
def test_watched_steps_are_replayed_change_no_token_and_keep_what_eager_ones_keep(folder, count):
    """Up to the noise between the two ways to compute, over a prompt, decoding, and steps that mix them."""
    wanted, late = prompts(fresh_rng(), count), fresh_rng().integers(0, 370, 50).tolist()

    def run(eager, *watches):
        """One pass for each that is watched: (tokens by request, queries, residual, attention of the watched one)."""
        llm, passes = make_llm(folder), []
        llm.runner.eager = eager
        for request_id in watches:
            if request_id is not None:
                llm.probe.watch(request_id, max_tokens=100)
            llm.runner._graphs.last_graph = None
            params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
            for i, prompt in enumerate(wanted):
                llm.engine.add_request(prompt, params, str(i))
            tokens, steps = {}, 0
            while llm.engine.has_unfinished_requests():
                tokens.update({output.request_id: output.outputs[0].token_ids for output in llm.engine.step()})
                steps += 1
                if steps == 6:
                    llm.engine.add_request(late, params, "late")
            assert (llm.runner._graphs.last_graph is None) == eager
            if request_id is None:
                passes.append((tokens,))
                continue
            rows, watch = llm.probe.kept, llm.runner.watch
            bits = [array.copy_to_host()[:, rows] for array in (watch.queries, watch.residual)]
            passes.append((tokens, *map(bf16_to_float32, bits), llm.probe.attention(rows).swapaxes(1, 2)))
            assert rows[-1] == llm.probe.context - 1
        return passes

    replayed = run(False, "0", "late")  # the second watch keeps its rows in other memory than the first
    assert [tokens for tokens, *_ in replayed] == [tokens for tokens, in run(False, None, None)]
    for request_id, (tokens, *ours), (other_tokens, *theirs) in zip(("0", "late"), replayed, run(True, "0", "late")):
        pairs = zip([*tokens[request_id], None], [*other_tokens[request_id], 0])
        same = next(i for i, (token, other) in enumerate(pairs) if token != other)
        rows = ours[0].shape[1] - 23 + same  # from there on the two have computed other tokens
        assert same > 0
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape and np.abs(other).max() > 0
            assert np.linalg.norm(mine[:, :rows] - other[:, :rows]) < 0.05 * np.linalg.norm(other[:, :rows])


def test_enforce_eager_has_no_graphs_and_numbas_own_arrays(folder):
    llm = make_llm(folder, enforce_eager=True)
    assert llm.runner._graphs is None and llm.runner.backend.fused is None
    assert len(llm.generate(prompts(fresh_rng(), 2), SamplingParams(temperature=0, max_tokens=5))) == 2


def test_a_model_with_biases_takes_the_eager_way(tmp_path):
    folder = write_tiny_model(tmp_path / "model", **next(c for c in CASES if c.name == "biases").overrides)
    llm = make_llm(folder)
    assert llm.runner._graphs is None
    assert len(llm.generate(prompts(fresh_rng(), 2), SamplingParams(temperature=0, max_tokens=5))) == 2


def test_stop_strings_and_aborts_lose_nothing_when_outputs_come_a_step_late(tmp_path):
    llm = LLM(write_tiny_model(tmp_path / "model"), device="cuda", use_tqdm=False, num_blocks=400, max_num_seqs=8)
    free = llm.generate("The fox", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = free.text[8:11]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=stop)
    out = llm.generate("The fox", params)[0].outputs[0]
    assert out.finish_reason == "stop" and out.text == free.text[:free.text.index(stop)]
    pieces = list(llm.stream("The fox", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    assert "".join(p.outputs[0].new_text for p in pieces) == free.text
    assert pieces[-1].outputs[0].token_ids == free.token_ids
    stats = llm.engine.stats
    assert stats.num_free_blocks == stats.num_blocks


def test_another_thread_can_run_the_engine(folder):
    llm, results = make_llm(folder), []
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    wanted = prompts(fresh_rng(), 3)
    thread = threading.Thread(target=lambda: results.extend(llm.generate(wanted, params)))
    thread.start()
    thread.join()
    assert [o.outputs[0].token_ids for o in results] == [o.outputs[0].token_ids for o in llm.generate(wanted, params)]
