"""Speed of the CUDA backend at the Llama-3.2-1B shape, with random weights, beside the limits of the same GPU.

    python -m tinyvllm.bench.gpu                       everything (about a minute and 20 GB of GPU memory)
    python -m tinyvllm.bench.gpu --only decode,ttft    some of it: decode, ttft, served, workload, prefill, kernels
    python -m tinyvllm.bench.gpu --json out.json       every figure, with hardware and versions

Requests go through the whole engine except text: scheduler, cache, batches, sampling (greedy). `served` is N requests
of 128 random tokens, 128 tokens out, from the first request in to the last token out; `workload` is 256 requests of
100 to 1024 tokens in and out, drawn with seed 0. Figures are medians over rounds. Kernels are timed in graphs of many
launches over different layers' weights, so that nothing is read from the caches twice.
"""

import argparse
import json
import random
import statistics
import time

import numpy as np

from tinyvllm import SamplingParams
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.gpu_kernels import graph_times, measure_kernels
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.kernels.cuda_support import cuda, require_cuda
from tinyvllm.model.config import ModelConfig
from tinyvllm.runner.cuda import CUDABackend
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.weights import WeightStore

BLOCK_SIZE, MAX_MODEL_LEN = 16, 8192
MAX_NUM_SEQS, MAX_TOKENS, NUM_BLOCKS = 256, 16384, 20480
FLOOR = {"decode, batch 1 (tokens/s)": 1100, "TTFT, 32 tokens (ms)": 5, "served, batch 8 (tokens/s)": 6500,
         "served, batch 32 (tokens/s)": 20000, "served, batch 128 (tokens/s)": 48000,
         "served, batch 256 (tokens/s)": 65000, "workload, 256 requests (tokens/s)": 40000,
         "prefill, 16 x 1024 (TFLOP/s)": 450, "kernel: decode attention, 64 x 4096 (TB/s)": 3.8}


class Bench:
    """The model with random weights on the GPU, and an engine over it."""

    def __init__(self, raw_config: dict, eager: bool = False):
        self.config = ModelConfig.from_dict(raw_config)
        self.backend = CUDABackend(enforce_eager=eager)
        store = WeightStore(self.config, self.backend)
        drawn = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
        bits = ((drawn * np.float32(0.02)).view(np.uint32) >> 16).astype(np.uint16)
        for name, array in store.arrays.items():
            flat = array.reshape(int(np.prod(array.shape)))
            if not flat.shape[0]:
                continue
            values = np.full(flat.shape[0], 0x3F80, np.uint16) if "norm" in name else bits
            for first in range(0, flat.shape[0], len(values)):
                self.backend.put(flat, first, values[:min(len(values), flat.shape[0] - first)])
        self.runner = ModelRunner(self.config, store.finish(MAX_MODEL_LEN), self.backend, num_blocks=NUM_BLOCKS,
                                  block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
                                  max_num_batched_tokens=MAX_TOKENS)
        self.random = random.Random(0)

    def serve(self, prompts: list[list[int]], max_tokens: list[int]) -> dict:
        """Run requests that all arrive at once; times in seconds."""
        engine = LLMEngine(self.runner, vocab_size=self.config.vocab_size, eos_token_ids=self.config.eos_token_ids,
                           num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN,
                           max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_TOKENS, enable_prefix_caching=False)
        start = time.perf_counter()
        for prompt, count in zip(prompts, max_tokens):
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        first, tokens, steps = None, 0, 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps += 1
            tokens += len(outputs)
            if first is None and tokens:
                first = time.perf_counter()
                tokens_at_first = tokens
        end = time.perf_counter()
        return {"seconds": end - start, "ttft": first - start, "tokens": tokens, "steps": steps,
                "decode_tokens_per_second": (tokens - tokens_at_first) / max(end - first, 1e-9)}

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self.random.randrange(100000) for _ in range(length)] for _ in range(count)]

    def median(self, rounds: int, measure) -> list[float]:
        measure()  # compiles kernels and captures graphs
        return [measure() for _ in range(rounds)]

    # ---- what is measured: label -> figures, one a round ----

    def decode(self, rounds):
        for batch in (1, 8, 32, 128, 256):
            figures = self.median(
                rounds, lambda b=batch: self.serve(self.prompts(b, 32), [128] * b)["decode_tokens_per_second"])
            yield f"decode, batch {batch} (tokens/s)", figures
            graph = getattr(self.runner, "_graphs", None) and self.runner._graphs.last_graph
            if graph:  # the last step again, by itself: how much of a step's time the GPU works
                times = graph_times(self.backend.fused.stream, graph, rounds)
                yield f"GPU step, batch {batch} (us)", [1e3 * t for t in times]
                step = 1e3 * batch / statistics.median(figures)
                yield f"GPU busy, batch {batch} (%)", [100 * t / step for t in times]

    def ttft(self, rounds):
        for length in (32, 512):
            yield f"TTFT, {length} tokens (ms)", self.median(
                3 * rounds, lambda n=length: 1e3 * self.serve(self.prompts(1, n), [2])["ttft"])

    def served(self, rounds):
        for batch in (8, 32, 128, 256):
            def measure(b=batch):
                result = self.serve(self.prompts(b, 128), [128] * b)
                return result["tokens"] / result["seconds"]

            yield f"served, batch {batch} (tokens/s)", self.median(rounds, measure)

    def workload(self, rounds):
        draw = random.Random(0)
        prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
        counts = [draw.randint(100, 1024) for _ in range(256)]

        def measure():
            result = self.serve(prompts, counts)
            return result["tokens"] / result["seconds"]

        yield "workload, 256 requests (tokens/s)", self.median(max(1, rounds - 2), measure)

    def prefill(self, rounds):
        config, tokens, length = self.config, 16384, 1024
        weights = config.num_hidden_layers * sum(
            int(np.prod(shape[1:])) for name, shape in
            ((n, getattr(self.runner.weights, n).shape) for n in ("qkv", "o", "gate_up", "down")))
        pairs = tokens * (length + 1) / 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        operations = 2 * tokens * weights + 4 * pairs + 2 * 16 * config.vocab_size * config.hidden_size

        def measure():
            return operations / self.serve(self.prompts(16, length), [1] * 16)["ttft"] / 1e12

        yield "prefill, 16 x 1024 (TFLOP/s)", self.median(rounds, measure)

    def kernels(self, rounds):
        yield from measure_kernels(self, rounds)


PARTS = ("decode", "ttft", "served", "workload", "prefill", "kernels")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a config.json; without it, the shape of Llama 3.2 1B")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="operations one by one, as enforce_eager=True")
    parser.add_argument("--json", help="write every figure to this file")
    options = parser.parse_args(argv)
    parts = options.only.split(",") if options.only else PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    require_cuda()
    raw_config = LLAMA_3_2_1B
    if options.config:
        with open(options.config) as file:
            raw_config = json.load(file)
    bench, results = Bench(raw_config, options.eager), {}
    for part in parts:
        for label, figures in getattr(bench, part)(options.rounds):
            results[label] = figures
            floor = f"   floor {FLOOR[label]:,}" if label in FLOOR else ""
            print(f"{label:46} {statistics.median(figures):12,.4g}   ({min(figures):,.4g} to {max(figures):,.4g})"
                  f"{floor}", flush=True)
    if options.json:
        device = cuda.get_current_device()
        name = device.name.decode() if isinstance(device.name, bytes) else device.name
        with open(options.json, "w") as file:
            json.dump({"environment": {**describe_environment("numba-cuda", "cuda-bindings"), "gpu": name},
                       "config": options.config or "Llama 3.2 1B", "eager": options.eager, "results": results}, file,
                      indent=1)


if __name__ == "__main__":
    main()
