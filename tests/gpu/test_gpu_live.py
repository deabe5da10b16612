"""LiveEngine on a GPU: the same tokens as generate, looks from other threads, and resets that give everything back."""

import gc
import threading
import weakref

import pytest

from tests.model_files import write_tiny_model
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.cuda_support import cuda
from tinyvllm.runner import pinned

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(), reason="needs a GPU")]

PARAMS = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
          SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7, max_tokens=40, ignore_eos=True)]
PROMPTS = [[(7 * i + first) % 300 + 3 for i in range(20 + first)] for first in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("gpu-live") / "model", head_dim=64, hidden_size=256,
                            intermediate_size=512)


def make_llm(folder):
    """Batch-invariant, so that tokens are equal whatever ran beside them."""
    return LLM(folder, device="cuda", use_tqdm=False, skip_tokenizer_init=True, num_blocks=256, max_num_seqs=16,
               max_num_batched_tokens=256, batch_invariant=True)


def served(live):
    """The tokens of every prompt with every one of PARAMS, in order."""
    finished = {}
    forget = live.on_output(lambda output: finished.update({output.request_id: output}) if output.finished else None)
    ids = [live.add(prompt, params) for params in PARAMS for prompt in PROMPTS]
    live.wait_idle()
    forget()
    assert live.error is None
    return [finished[i].outputs[0].token_ids for i in ids]


def test_the_thread_gives_what_generate_gave_before_and_after_resets(folder):
    """generate runs in this thread, the LiveEngine in its own: both use one stream and one set of graphs."""
    llm = make_llm(folder)
    want = [output.outputs[0].token_ids for params in PARAMS for output in llm.generate(PROMPTS, params)]
    with LiveEngine(llm) as live:
        assert served(live) == want
        live.reset(block_size=8, max_num_seqs=4)
        assert served(live) == want
        live.reset(block_size=16, max_num_seqs=16, enable_prefix_caching=False)
        assert served(live) == want
    assert [output.outputs[0].token_ids for params in PARAMS for output in llm.generate(PROMPTS, params)] == want


def test_looks_from_many_threads_find_a_settled_engine(folder):
    trouble = []

    def look(live):
        try:
            for _ in range(25):
                counts = live.between_steps(lambda llm: [request.num_computed_tokens
                                                         for request in llm.engine.scheduler.running]).result(20)
                assert all(count >= 0 for count in counts)
        except Exception as error:
            trouble.append(error)

    with LiveEngine(make_llm(folder)) as live:
        threads = [threading.Thread(target=look, args=(live,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        beside = served(live)
        for thread in threads:
            thread.join()
    with LiveEngine(make_llm(folder)) as live:
        assert served(live) == beside
    assert not trouble


def served_between_resets(llm, look, times=5):
    """look()'s answers, after a run each, with a reset between one and the next."""
    found = []
    with LiveEngine(llm) as live:
        for _ in range(times):
            served(live)
            gc.collect()
            found.append(live.between_steps(lambda llm: look()).result(20))
            live.reset()
    return found


def test_resets_give_back_the_memory_of_the_gpu(folder):
    """As this process has it: how much is free on the card changes with whatever else runs there."""
    def allocated():
        return sum(memory.size for memory in cuda.current_context().memory_manager.allocations.values())

    llm = make_llm(folder)
    taken = served_between_resets(llm, allocated)
    assert min(taken) > llm.memory_plan.kv_cache_bytes > taken[-1] - taken[1], taken


def test_resets_give_back_page_locked_memory(folder, monkeypatch):
    buffers, allocate = [], pinned.pinned_buffer

    def counted(*arguments):
        buffer = allocate(*arguments)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(pinned, "pinned_buffer", counted)
    alive = served_between_resets(make_llm(folder), lambda: sum(buffer() is not None for buffer in buffers))
    assert len(set(alive[1:])) == 1 and len(buffers) > alive[-1] > 0, (alive, len(buffers))
