"""A toy in the place of the model: exact, instant, and it fails loudly if the engine lies about the cache.

It keeps a "KV cache" of token ids and, as real keys do, each entry depends on everything before it. A step writes each
scheduled token into the slot that the block table names, and the next token is a hash of everything it reads back through
the block table. So a wrong block id, a stale cached block, a block computed after another prefix, a token that was never
computed or a block given to two requests changes the output or fails at once.
"""

import numpy as np

from tinyvllm.engine.llm_engine import LLMEngine

VOCAB = 50
EMPTY = -1


START = 17


def absorb(value: int, token: int) -> int:
    """The toy's state after one more token."""
    return (value * 1_000_003 + token + 1) % 2**61


def next_token(token_ids) -> int:
    """What the toy model says after these tokens."""
    value = START
    for token in token_ids:
        value = absorb(value, token)
    return (value >> 7) % VOCAB


def continuation(prompt, count) -> list[int]:
    """The toy's greedy continuation, computed without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt):]


class ToyRunner:
    """Runs scheduled steps on token ids. fail_next: raise in the middle of the next step."""

    def __init__(self, num_blocks: int, block_size: int, max_num_batched_tokens: int = 10**9, max_num_seqs: int = 10**9):
        self.kv = np.full((num_blocks, block_size), EMPTY, np.int64)  # token ids
        self.prefix = np.zeros((num_blocks, block_size), np.int64)  # the toy's state after that token
        self.block_size = block_size
        self.limits = max_num_batched_tokens, max_num_seqs
        self.fail_next = False
        self.batches = []

    def execute(self, output) -> dict[str, int]:
        self.batches.append([(s.request.request_id, s.start, s.num_scheduled_tokens) for s in output.scheduled])
        assert output.total_num_scheduled_tokens == sum(s.num_scheduled_tokens for s in output.scheduled)
        assert 0 < output.total_num_scheduled_tokens <= self.limits[0]
        assert len(output.scheduled) <= self.limits[1]
        sizes = [s.num_scheduled_tokens for s in output.scheduled]
        assert all(n == 1 for n in sizes[:output.num_decodes]) and all(n > 1 for n in sizes[output.num_decodes:])
        for s in output.scheduled:
            for position in range(s.start, s.start + s.num_scheduled_tokens):
                slot = s.block_ids[position // self.block_size], position % self.block_size
                before = START if position == 0 else self.prefix[
                    s.block_ids[(position - 1) // self.block_size], (position - 1) % self.block_size]
                self.kv[slot] = s.request.token_ids[position]
                self.prefix[slot] = absorb(int(before), s.request.token_ids[position])
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("the device fell over")
        return {s.request.request_id: self._sample(s) for s in output.scheduled if s.sample}

    def _sample(self, s) -> int:
        seen = self.kv[s.block_ids].reshape(-1)[:s.start + s.num_scheduled_tokens].tolist()
        assert EMPTY not in seen, "read a slot that was never written"
        value = START
        for token, prefix in zip(seen, self.prefix[s.block_ids].reshape(-1).tolist()):
            value = absorb(value, token)
            assert value == prefix, "read keys that were computed after another prefix"
        return next_token(seen)


class AheadToyRunner(ToyRunner):
    """A toy device that is given steps ahead: it works them off in order, and keeps to itself what it sampled until it
    is asked. Python is told as late as can be, and the device knows only what was sampled in the step before."""

    runs_ahead = True

    def __init__(self, *args):
        super().__init__(*args)
        self.sampled: dict[str, int] = {}  # by the step that was begun last
        self.begun = self.waited = 0
        self.most_ahead = 0

    def begin(self, output):
        known = [(s, list(s.request.token_ids)) for s in output.scheduled]
        for s, token_ids in known:
            stop = s.start + s.num_scheduled_tokens
            assert stop <= len(token_ids) + 1, "more than one token ahead"
            if stop == len(token_ids) + 1:
                s.request.token_ids.append(self.sampled[s.request.request_id])  # only as long as this step is computed
        try:
            tokens = self.execute(output)
        finally:
            for s, token_ids in known:
                s.request.token_ids[:] = token_ids
        self.begun += 1
        self.sampled, number = tokens, self.begun
        self.most_ahead = max(self.most_ahead, self.begun - self.waited)

        def wait():
            self.waited = number
            return tokens

        return wait


def toy_engine(num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=1000,
               eos_token_ids=(), tokenizer=None, runner_type=ToyRunner, **options) -> LLMEngine:
    """An LLMEngine over a toy."""
    runner = runner_type(num_blocks, block_size, max_num_batched_tokens, max_num_seqs)
    return LLMEngine(runner, tokenizer, vocab_size=VOCAB, eos_token_ids=eos_token_ids, num_blocks=num_blocks,
                     block_size=block_size, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                     max_num_batched_tokens=max_num_batched_tokens, **options)


def run(engine, max_steps=100_000) -> dict:
    """Step until nothing is left; returns request_id -> last output."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return outputs
        for output in engine.step(ahead=True):
            outputs[output.request_id] = output
    raise AssertionError(f"not done after {max_steps} steps: {engine.stats}")
