"""Speed of the CPU backend at a model's shape, with random weights; side by side with transformers if asked.

    python -m tinyvllm.bench.cpu                             the shape of Llama 3.2 1B (2.5 GB of memory)
    python -m tinyvllm.bench.cpu --config FOLDER/config.json any other
    python -m tinyvllm.bench.cpu --peer                      in turn with transformers (another 2.5 GB)

It times forward passes and the choice of the next token, without the engine's scheduling and text. Figures
are medians over rounds. On a machine with other work absolute figures drift by half: only ratios taken in
turn, round by round, mean something, so `--peer` alternates.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
from tqdm.auto import tqdm

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.transformers_peer import TransformersPeer
from tinyvllm.kernels.threads import available_cores, configure_threads
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama import Batch, Buffers, Dims, KVCache
from tinyvllm.runner.cpu import CPUBackend
from tinyvllm.runner.model_runner import buffer_shapes
from tinyvllm.runner.weights import WeightStore

BLOCK_SIZE = 16
PROMPT, NEW = 32, 16  # tokens of a decode measurement

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
}


def tasks(batches, prefill) -> dict:
    """What is measured: label -> (kind, size)."""
    return {**{f"decode, batch {batch}": ("decode", batch) for batch in batches},
            f"prefill, {prefill} tokens": ("prefill", prefill)}


class RandomModel:
    """The CPU backend's forward pass over random weights, with a KV cache for the largest measurement."""

    def __init__(self, config: ModelConfig, max_seqs: int, max_tokens: int):
        self.config, self.backend = config, CPUBackend()
        per_seq = -(-max(PROMPT + NEW + 1, max_tokens) // BLOCK_SIZE)
        store = WeightStore(config, self.backend)
        for name, array in store.arrays.items():
            fill_random(array, one="norm" in name)
        self.weights = store.finish(per_seq * BLOCK_SIZE)
        self.dims = Dims(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                         config.head_dim, BLOCK_SIZE, config.head_dim ** -0.5, config.rms_norm_eps)
        num_blocks = max(max_seqs * -(-(PROMPT + NEW + 1) // BLOCK_SIZE), per_seq)
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, BLOCK_SIZE,
                 config.head_dim)
        self.kv = KVCache(np.zeros(shape, np.uint16), np.zeros(shape, np.uint16))
        tokens = max(max_tokens, max_seqs * PROMPT)
        self.buffers = Buffers(**{name: np.zeros(shape, np.uint16)
                                  for name, shape in buffer_shapes(config, max_seqs, tokens).items()})
        self.random = np.random.default_rng(0)

    def step(self, token_ids: np.ndarray, start: int) -> np.ndarray:
        """Run token ids [R, n] at positions start.. of R sequences; returns each one's next token [R, 1]."""
        num_seqs, count = token_ids.shape
        stop = start + count
        blocks = -(-stop // BLOCK_SIZE)
        tables = np.arange(blocks * num_seqs, dtype=np.int32).reshape(blocks, num_seqs).T.copy()
        positions = np.tile(np.arange(start, stop, dtype=np.int32), num_seqs)
        sequence = np.repeat(np.arange(num_seqs), count)
        slots = tables[sequence, positions // BLOCK_SIZE] * np.int32(BLOCK_SIZE) + positions % BLOCK_SIZE
        starts = np.arange(0, num_seqs * count + 1, count, dtype=np.int32)
        batch = Batch(np.ascontiguousarray(token_ids, np.int32).reshape(-1), positions, slots, tables,
                      np.full(num_seqs, stop, np.int32), starts, starts[1:] - 1,
                      num_seqs if count == 1 else 0)
        self.backend.forward(self.weights, self.kv, batch, self.buffers, self.dims)
        next_ids = np.empty(num_seqs, np.int32)
        self.backend.argmax(next_ids, self.buffers.logits[:num_seqs])
        return next_ids[:, None]

    def measure(self, kind: str, size: int) -> float:
        """Tokens per second."""
        vocab_size = self.config.vocab_size
        if kind == "prefill":
            token_ids = self.random.integers(0, vocab_size, (1, size))
            start = time.perf_counter()
            self.step(token_ids, 0)
            return size / (time.perf_counter() - start)
        token_ids = self.step(self.random.integers(0, vocab_size, (size, PROMPT)), 0)
        start = time.perf_counter()
        for position in range(PROMPT, PROMPT + NEW):
            token_ids = self.step(token_ids, position)
        return size * NEW / (time.perf_counter() - start)


def fill_random(array: np.ndarray, one: bool) -> None:
    """bf16 values of a normal distribution with deviation 0.02, or ones: a million drawn, then repeated."""
    drawn = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    bits = np.full(1, 0x3F80, np.uint16) if one else (drawn.view(np.uint32) >> 16).astype(np.uint16)
    flat = array.reshape(-1)
    for first in range(0, flat.size, 1 << 20):
        piece = flat[first:first + (1 << 20)]
        piece[:] = bits if one else bits[:piece.size]


# ---- the peer, in a process of its own: its threads and its allocator stay out of the way ----


def serve_peer(raw_config: dict, threads: int) -> None:
    """Answer lines of "kind size" on standard input with tokens per second of transformers."""
    peer = TransformersPeer(raw_config, "cpu")
    peer.torch.set_num_threads(threads)

    def measure(kind, size):
        if kind == "decode":
            return peer.eager_rate(size, PROMPT, NEW + 1)
        token_ids = peer.prompts(1, size)
        start = time.perf_counter()
        peer.step(token_ids, peer.growing_cache())
        return size / (time.perf_counter() - start)

    measure("decode", 1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        print(measure(kind, int(size)), flush=True)


class Peer:
    """transformers in a child process. Raises RuntimeError when it cannot start."""

    def __init__(self, raw_config: dict, threads: int):
        command = [sys.executable, "-m", "tinyvllm.bench.cpu", "--serve-peer", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(json.dumps(raw_config), "ready")

    def _ask(self, line: str, expected: str | None = None) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer or expected not in (None, answer):
            raise RuntimeError("the process with transformers ended (see above); --peer needs torch and "
                               "transformers (pip install -e '.[test]' transformers) and memory for a second copy of "
                               "the model")
        return answer

    def measure(self, kind: str, size: int) -> float:
        return float(self._ask(f"{kind} {size}"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def run(raw_config: dict, threads: int, rounds: int, batches, prefill: int, peer: bool) -> dict:
    """Measure; returns label -> {"tinyvllm": [tokens/s, ...], "transformers": [...]}, a figure a round."""
    wanted = tasks(batches, prefill)
    sides = {"tinyvllm": RandomModel(ModelConfig.from_dict(raw_config), max(batches), prefill)}
    if peer:
        sides["transformers"] = Peer(raw_config, threads)
    results = {label: {side: [] for side in sides} for label in wanted}
    for kind, size in wanted.values():  # compile, and touch every page
        sides["tinyvllm"].measure(kind, size)
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for label, (kind, size) in wanted.items():
            for name, side in sides.items():
                results[label][name].append(side.measure(kind, size))
    if peer:
        sides["transformers"].close()
    return results


def table(results: dict) -> str:
    """Medians, and with a peer the median of the ratios of single rounds."""
    lines = [f"{'tokens/s':24}" + "".join(f"{side:>14}" for side in next(iter(results.values())))]
    for label, sides in results.items():
        line = f"{label:24}" + "".join(f"{statistics.median(values):14.1f}" for values in sides.values())
        if "transformers" in sides:
            ratios = [a / b for a, b in zip(sides["tinyvllm"], sides["transformers"], strict=True)]
            line += f"   ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(line)
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a config.json; without it, the shape of Llama 3.2 1B")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes of decode")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt that is prefilled")
    parser.add_argument("--peer", action="store_true", help="alternate with transformers")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--serve-peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve_peer:
        return serve_peer(json.loads(sys.stdin.readline()), options.threads)
    raw_config = LLAMA_3_2_1B
    if options.config:
        with open(options.config) as file:
            raw_config = json.load(file)
    configure_threads(options.threads)
    results = run(raw_config, options.threads, options.rounds, options.batches, options.prefill, options.peer)
    print(table(results))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": describe_environment(*(("torch", "transformers") if options.peer else ())),
                       "config": options.config or "Llama 3.2 1B", "threads": options.threads,
                       "tokens_per_second": results}, file, indent=1)


if __name__ == "__main__":
    main()
