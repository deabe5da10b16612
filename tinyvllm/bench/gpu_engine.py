"""What the whole engine does on a GPU: tokens a second, first tokens, the GPU's share of a step, what sampling costs.

Each part yields (label, figures), one figure a round; labels are what results, tables and pictures know them by.
Before the rounds everything has run once: kernels are compiled, graphs captured.
"""

import contextlib
import random
import statistics
from collections.abc import Callable, Iterator

from tinyvllm.bench.gpu_model import Bench
from tinyvllm.bench.gpu_timing import graph_times

Figures = Iterator[tuple[str, list[float]]]
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


def repeated(rounds: int, measure: Callable[[], float]) -> list[float]:
    """measure(), so many times, after once for nothing."""
    measure()
    return [measure() for _ in range(rounds)]


def decode(bench: Bench, rounds: int, batches=(1, 8, 32, 128, 256), prompt=32, new=128) -> Figures:
    """32 tokens in, 128 out; and how much of a step's time the GPU works."""
    for batch in batches:
        rates = repeated(rounds, lambda b=batch: bench.serve(bench.prompts(b, prompt), [new] * b).decode_rate)
        yield f"decode, batch {batch} (tokens/s)", rates
        graphs = getattr(bench.runner, "_graphs", None)
        if graphs is not None and graphs.last_graph is not None:  # the last step again, by itself
            times = graph_times(bench.backend.fused.stream, graphs.last_graph, rounds)
            yield f"GPU step, batch {batch} (us)", [1e3 * t for t in times]
            step = 1e3 * batch / statistics.median(rates)
            yield f"GPU busy, batch {batch} (%)", [100 * t / step for t in times]


def long_decode(bench: Bench, rounds: int, prompt=32, new=512) -> Figures:
    """The longer of the two runs at batch 1."""
    yield f"decode, batch 1, {new} out (tokens/s)", repeated(
        rounds, lambda: bench.serve(bench.prompts(1, prompt), [new]).decode_rate)


def ttft(bench: Bench, rounds: int, lengths=(32, 512)) -> Figures:
    """Time to the first token of one prompt."""
    for length in lengths:
        yield f"TTFT, {length} tokens (ms)", repeated(
            3 * rounds, lambda n=length: 1e3 * bench.serve(bench.prompts(1, n), [2]).first_token_s)


def served(bench: Bench, rounds: int, batches=(8, 32, 128, 256), prompt=128, new=128) -> Figures:
    """128 tokens in, 128 out, from the first request in to the last token out."""
    for batch in batches:
        yield f"served, batch {batch} (tokens/s)", repeated(
            rounds, lambda b=batch: bench.serve(bench.prompts(b, prompt), [new] * b).rate)


def workload(bench: Bench, rounds: int, requests=256, shortest=100, longest=1024) -> Figures:
    """100 to 1,024 tokens in and out, drawn with seed 0: the prompts and lengths that other engines were given."""
    prompts, counts = workload_requests(bench.config.vocab_size, requests, shortest, longest)
    yield f"workload, {requests} requests (tokens/s)", repeated(
        max(1, rounds - 2), lambda: bench.serve(prompts, counts).rate)


def workload_requests(vocab_size: int, requests: int, shortest: int, longest: int
                      ) -> tuple[list[list[int]], list[int]]:
    """(prompts, numbers of tokens to make), always the same."""
    draw = random.Random(0)
    most = min(10000, vocab_size - 1)
    prompts = [[draw.randint(0, most) for _ in range(draw.randint(shortest, longest))] for _ in range(requests)]
    return prompts, [draw.randint(shortest, longest) for _ in range(requests)]


def prefill(bench: Bench, rounds: int, count=16, length=1024) -> Figures:
    """All prompts in one step: floating-point operations of the model a second."""
    flops = prefill_flops(bench.config, count, length)
    yield f"prefill, {count} x {length} (TFLOP/s)", repeated(
        rounds, lambda: flops / bench.serve(bench.prompts(count, length), [1] * count).first_token_s / 1e12)


def prefill_flops(config, count: int, length: int) -> float:
    """Of the layers' products for every token, of attention below the diagonal, and of one row of logits a prompt."""
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, count * length
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = (heads + 2 * kv_heads) * hidden + hidden * heads + 2 * inner * hidden + hidden * inner
    pairs = count * length * (length + 1) / 2
    return (2 * tokens * config.num_hidden_layers * layer + 4 * pairs * heads * config.num_hidden_layers
            + 2 * count * config.vocab_size * hidden)


def sampling(bench: Bench, rounds: int, batches=(1, 32, 256), prompt=32, new=128) -> Figures:
    """A decode step that draws its tokens against a greedy one, in turn."""
    for batch in batches:
        def rate(batch=batch, **params):
            return bench.serve(bench.prompts(batch, prompt), [new] * batch, **params).decode_rate

        rate(), rate(**SAMPLED)
        pairs = [(rate(), rate(**SAMPLED)) for _ in range(rounds)]
        yield f"sampled decode, batch {batch} (tokens/s)", [sampled for _, sampled in pairs]
        yield f"sampling over greedy, batch {batch} (us a step)", [
            1e6 * batch * (1 / sampled - 1 / greedy) for greedy, sampled in pairs]



def ahead(bench: Bench, rounds: int, batches=(1, 32, 256), prompt=128, new=128, requests=256, longest=1024) -> Figures:
    """The next step begun before this one's tokens are known (engine/pipeline.py), against not so, in turn."""
    for batch in batches:
        def rate(on, batch=batch):
            with begun_ahead(bench.runner, on):
                return bench.serve(bench.prompts(batch, prompt), [new] * batch).decode_rate

        yield from _with_and_without("a step ahead", rate, f"decode, batch {batch} (tokens/s)", rounds)
    served = workload_requests(bench.config.vocab_size, requests, min(100, longest), longest)
    with begun_ahead(bench.runner, True):
        yield f"a step ahead on: workload, {requests} requests (tokens/s)", repeated(
            2, lambda: bench.serve(*served).rate)


def invariant(bench: Bench, rounds: int, batches=(1, 32, 256), prompt=32, new=128, count=16, length=1024) -> Figures:
    """What batch_invariant=True costs: the same work with and without, in turn."""
    for batch in batches:
        def rate(on, batch=batch):
            with batch_invariant(bench, on):
                return bench.serve(bench.prompts(batch, prompt), [new] * batch).decode_rate

        yield from _with_and_without("batch-invariant", rate, f"decode, batch {batch} (tokens/s)", rounds)
    flops = prefill_flops(bench.config, count, length)

    def speed(on):
        with batch_invariant(bench, on):
            return flops / bench.serve(bench.prompts(count, length), [1] * count).first_token_s / 1e12

    yield from _with_and_without("batch-invariant", speed, f"prefill, {count} x {length} (TFLOP/s)", rounds)


def _with_and_without(switch: str, measure: Callable[[bool], float], what: str, rounds: int) -> Figures:
    """measure(False) and measure(True), in turn."""
    measure(False), measure(True)
    pairs = [(measure(False), measure(True)) for _ in range(rounds)]
    for i, way in enumerate(("off", "on")):
        yield f"{switch} {way}: {what}", [pair[i] for pair in pairs]


@contextlib.contextmanager
def batch_invariant(bench: Bench, on: bool):
    """The option, for a while."""
    fused = getattr(bench.backend, "fused", None)
    if fused is None:
        raise RuntimeError("batch invariance is an option of the fused operations: leave out --eager")
    before, fused.batch_invariant = fused.batch_invariant, on
    try:
        yield
    finally:
        fused.batch_invariant = before


@contextlib.contextmanager
def begun_ahead(runner, on: bool):
    """runner.runs_ahead set for a while."""
    before, runner.runs_ahead = runner.runs_ahead, on
    try:
        yield
    finally:
        runner.runs_ahead = before
