"""Training rows: generated documents as token ids, packed into rows of one context length.

A row is uint16 [CONTEXT]; bit 15 of an entry says that the loss does not count this token (what users write,
headers, the first showing of random tokens). Worker processes write shards of rows while the GPU trains:

    workers = start_workers(tokenizer_file, folder, count=13, seed=0)
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tinyvllm.demo.fables.documents import Document, document
from tinyvllm.demo.tokenizer_recipe import BOS, CONTEXT, EOS, EOT, HEADER, SPECIAL_TOKENS, chat_text

NO_LOSS = 1 << 15
SYNTHETIC_SHARE = 0.05  # rows of random tokens said again and again, on their own or in a chat
ROWS_PER_SHARD = 384  # at the default batch of 64
MOST_SHARDS = 64  # unread files that may lie about


def document_tokens(tokenizer: Tokenizer, made: Document, ids: np.ndarray) -> np.ndarray:
    """Mark the tokens that the loss skips in the ids of one document; returns uint16 of the same length."""
    out = ids.astype(np.uint16)
    out[0] |= NO_LOSS
    if not made.messages:
        return out
    starts = np.flatnonzero(ids == tokenizer.token_to_id(HEADER))
    ends = np.append(starts[1:], len(ids))
    for message, start, end in zip(made.messages, starts, ends, strict=True):
        if message["role"] == "assistant":
            text = start + 4  # <|start_header_id|> assistant <|end_header_id|> \n\n
        else:
            text = end if not made.learn_user else start + 4
        out[start:text] |= NO_LOSS
    return out


class RowMaker:
    """Draws documents from one seed and packs them; the same seed gives the same rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int, synthetic_share: float = SYNTHETIC_SHARE):
        self.tokenizer, self.synthetic_share = tokenizer, synthetic_share
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.plain_ids = tokenizer.get_vocab_size() - len(SPECIAL_TOKENS)
        self.ready: list[np.ndarray] = []

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    def _refill(self) -> None:
        made = [document(self.rng) for _ in range(256)]
        texts = [chat_text(d.messages) if d.messages else BOS + d.text + EOS for d in made]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        for d, e in zip(made, encoded, strict=True):
            ids = document_tokens(self.tokenizer, d, np.array(e.ids))
            if len(ids) <= CONTEXT:
                self.ready.append(ids)

    def _random_tokens(self, low: float, high: float) -> np.ndarray:
        """Between 2**low and 2**high random tokens, from the whole vocabulary or from a small part of it."""
        length = int(2 ** self.numbers.uniform(low, high))
        return self.numbers.integers(0, self.plain_ids, length).astype(np.uint16)

    def _repeated_row(self) -> np.ndarray:
        tokens = self._random_tokens(3.5, 9.0)
        first = np.concatenate(([self.tokenizer.token_to_id(BOS)], tokens)).astype(np.uint16) | NO_LOSS
        return np.concatenate([first, np.tile(tokens, CONTEXT // len(tokens) + 1)])[:CONTEXT]

    def _copied_row(self) -> np.ndarray:
        ask = self._encode(chat_text([{"role": "user", "content": "Repeat after me:\n\n"}]))[:-1] | NO_LOSS
        ask = np.append(ask, self._encode("\n\n") | NO_LOSS)
        answer = self._encode(EOT + HEADER + "assistant<|end_header_id|>\n\n") | NO_LOSS
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < CONTEXT:
            tokens = self._random_tokens(0.0, 6.5)
            parts += [ask, tokens | NO_LOSS, answer, tokens, self._encode(EOT)]
        return np.concatenate(parts)[:CONTEXT]

    def row(self) -> np.ndarray:
        """One packed row, uint16 [CONTEXT]; a document that does not fit at the end is cut off."""
        if self.rng.random() < self.synthetic_share:
            return self._repeated_row() if self.rng.random() < 0.6 else self._copied_row()
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < CONTEXT:
            if not self.ready:
                self._refill()
            parts.append(self.ready.pop())
        return np.concatenate(parts)[:CONTEXT]

    def rows(self, count: int) -> np.ndarray:
        """uint16 [count, CONTEXT]."""
        return np.stack([self.row() for _ in range(count)])


def work(
    tokenizer_file: str, folder: str, worker: int, seed: int, shards: int, rows: int = ROWS_PER_SHARD
) -> None:
    """A worker's whole life: write `shards` files of rows, as long as the training process lives."""
    target, parent = Path(folder), os.getppid()
    maker = RowMaker(Tokenizer.from_file(tokenizer_file), seed * 1000 + worker)
    for shard in range(shards):
        while len(list(target.glob("rows_*.npy"))) > MOST_SHARDS:  # training is behind: wait for it
            time.sleep(0.5)
            if os.getppid() != parent:  # the training process is gone
                return
        made = maker.rows(
            rows if shard else max(1, rows // 6)
        )  # a small first shard, so that training starts soon
        np.save(target / f"tmp{worker}.npy", made)
        os.rename(target / f"tmp{worker}.npy", target / f"rows_{worker:02d}_{shard:04d}.npy")


def start_workers(
    tokenizer_file: Path, folder: Path, count: int, seed: int, shards: int = 1000, rows: int = ROWS_PER_SHARD
) -> list[subprocess.Popen]:
    """Start `count` processes that write shards into `folder`; end them with stop_workers."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tinyvllm.demo.corpus", str(tokenizer_file), str(folder), str(worker),
                str(seed),
             str(shards), str(rows)],
            env=environment,
        )
        for worker in range(count)
    ]  # fmt: skip


def stop_workers(workers: list[subprocess.Popen]) -> None:
    for process in workers:
        process.terminate()
    for process in workers:
        process.wait()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
