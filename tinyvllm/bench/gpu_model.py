"""The model of the GPU's measurements: random weights at the Llama-3.2-1B shape, and requests served with them.

Requests go through the whole engine except text: scheduler, cache, batches, sampling. The weights are random, so the
tokens mean nothing, and requests end by their number of tokens alone.
"""

import random
import time
from typing import NamedTuple

import numpy as np

from tinyvllm import SamplingParams
from tinyvllm.engine.garbage import no_whole_collections
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.model.config import ModelConfig
from tinyvllm.runner.backend import Backend
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.weights import WeightStore

BLOCK_SIZE, MAX_MODEL_LEN = 16, 8192
MAX_NUM_SEQS, MAX_TOKENS, NUM_BLOCKS = 256, 16384, 20480
ONE = 0x3F80  # 1.0 in bfloat16: the weights of norms


class Sizes(NamedTuple):
    """Of the engine that is measured."""

    block_size: int = BLOCK_SIZE
    max_model_len: int = MAX_MODEL_LEN
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = MAX_TOKENS
    num_blocks: int = NUM_BLOCKS


SIZES = Sizes()


class Served(NamedTuple):
    """What serving some requests took. decode_rate: tokens a second after the step that gave the first token."""

    seconds: float
    first_token_s: float
    tokens: int
    decode_rate: float

    @property
    def rate(self) -> float:
        """Tokens a second over all of it, prompts included."""
        return self.tokens / self.seconds


def random_bits(count: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """Normal random bfloat16 values as bits: uint16 [count]. (Zeros would draw less power, and be faster.)"""
    drawn = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * np.float32(scale)
    return (drawn.view(np.uint32) >> 16).astype(np.uint16)


class Bench:
    """The model with random weights on a backend (default: the CUDA one), and an engine over it.

    raw_config: as in a config.json. eager: operations one by one, as enforce_eager=True.
    """

    def __init__(self, raw_config: dict, eager: bool = False, backend: Backend | None = None, sizes: Sizes = SIZES):
        if backend is None:
            from tinyvllm.runner.cuda import CUDABackend

            backend = CUDABackend(enforce_eager=eager)
        self.config, self.backend, self.sizes = ModelConfig.from_dict(raw_config), backend, sizes
        self.raw_config = raw_config
        store = WeightStore(self.config, backend)
        bits = random_bits(1 << 24)
        for name, array in store.arrays.items():
            self.fill(array, np.full(1 << 16, ONE, np.uint16) if "norm" in name else bits)
        self.runner = ModelRunner(self.config, store.finish(sizes.max_model_len), backend, **sizes._asdict())
        self.random = random.Random(0)

    def fill(self, array, bits: np.ndarray) -> None:
        """Write bits over all of a device array, again and again from their beginning."""
        size = int(np.prod(array.shape))
        flat = array.reshape(size)
        for first in range(0, size, len(bits)):
            self.backend.put(flat, first, bits[:min(len(bits), size - first)])

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """So many prompts of random tokens, other ones each time."""
        most = min(100000, self.config.vocab_size)
        return [[self.random.randrange(most) for _ in range(length)] for _ in range(count)]

    def serve(self, prompts: list[list[int]], max_tokens: list[int], **sampling) -> Served:
        """Run requests that all arrive at once. sampling: of SamplingParams; greedy without any."""
        engine = LLMEngine(self.runner, vocab_size=self.config.vocab_size, eos_token_ids=self.config.eos_token_ids,
                           enable_prefix_caching=False, **self.sizes._asdict())
        sampling = sampling or {"temperature": 0}
        start = time.perf_counter()
        for prompt, count in zip(prompts, max_tokens):
            engine.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True, **sampling))
        first, at_first = 0.0, 0
        with no_whole_collections():  # as LLM.generate does
            while engine.has_unfinished_requests():
                outputs = engine.step(ahead=True)
                if outputs and not at_first:
                    first, at_first = time.perf_counter(), len(outputs)
        end, tokens = time.perf_counter(), sum(max_tokens)
        return Served(end - start, first - start, tokens, (tokens - at_first) / max(end - first, 1e-9))
