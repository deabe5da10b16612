"""Train the demo model: `python -m tinyvllm.demo.train --minutes 5 --out model`.

Processes on the other cores write fables while the GPU reads them, so nearly every token is fresh. The
schedule follows the clock (or the step count with --steps): a short warm-up, then a cosine down to 2 %. Runs
with --steps and the same seed see the same documents; their order depends on which worker is first, so
weights differ a little.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tinyvllm.demo.extras import MissingExtraError, require

try:
    torch = require("torch", "safetensors.torch", "tokenizers")
except MissingExtraError as error:
    if __name__ == "__main__":
        sys.exit(str(error))
    raise

from tokenizers import Tokenizer  # noqa: E402

from tinyvllm.demo.corpus import NO_LOSS, RowMaker, start_workers, stop_workers  # noqa: E402
from tinyvllm.demo.network import TOY, Network, Shape, hf_config, hf_names, hf_tensors  # noqa: E402
from tinyvllm.demo.tokenizer_recipe import SPECIAL_TOKENS, train_tokenizer, write_tokenizer  # noqa: E402

WARM_UP, FLOOR, CLIP = 0.015, 0.02, 1.0
BATCHES_AHEAD = 1500  # unread batches on the device (0.4 GB at the default size); four times as many are kept


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine from `peak` to FLOOR * peak; `progress` runs from 0 to 1."""
    if progress < WARM_UP:
        return peak * (progress / WARM_UP + 0.001)
    done = min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def inputs_and_targets(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with NO_LOSS marks, int32 [B, T], to ids and next-token targets, int64 [B, T]."""
    ids = (rows & (NO_LOSS - 1)).long()
    targets = torch.where((rows & NO_LOSS) > 0, -100, ids)
    return ids, torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], -100)), dim=1)


class RowPool:
    """Rows on the device: new shards join as the workers write them; every row is used once before any is
    reused.
    """

    def __init__(self, folder: Path, device: str, workers: list, batch: int):
        self.most_unread = BATCHES_AHEAD * batch
        self.folder, self.device, self.workers = folder, device, workers
        self.unread = torch.empty(0, dtype=torch.int64, device=device)
        self.rows: list[torch.Tensor] = []
        self.checked, self.fresh_tokens, self.refills = 0.0, 0, 0

    def _load(self) -> None:
        if any(worker.poll() for worker in self.workers):
            raise RuntimeError(
                "a process that writes training text ended with an error (its message is above)"
            )
        room = len(self.unread) < self.most_unread
        new = sorted(self.folder.glob("rows_*.npy")) if room else []
        for path in new:
            self.rows.append(torch.from_numpy(np.load(path).astype(np.int16)).to(self.device))
            path.unlink()
            self.fresh_tokens += self.rows[-1].numel()
        self.checked = time.monotonic()
        if new:
            start = sum(len(r) for r in self.rows[: -len(new)])
            self.data = torch.cat(self.rows)
            self.rows = [self.data]
            unread = torch.arange(start, len(self.data), device=self.device)
            self.unread = torch.cat((self.unread, unread))
            self.unread = self.unread[torch.randperm(len(self.unread), device=self.device)]

    def batch(self, size: int) -> torch.Tensor:
        """The next `size` rows, int32 [size, T]."""
        if time.monotonic() - self.checked > 3 or len(self.unread) < size:
            self._load()
        while len(self.unread) < size:
            if (
                len(self.rows) and len(self.data) >= 8 * size
            ):  # the workers are behind: go over known rows once more
                self.unread = torch.randperm(len(self.data), device=self.device)
                self.refills += 1
            else:
                time.sleep(0.1)
                self._load()
        index, self.unread = self.unread[:size], self.unread[size:]
        if len(self.data) > 4 * self.most_unread:  # forget what was read
            self.data = self.data[torch.cat((index, self.unread))]
            self.rows, index = [self.data], torch.arange(size, device=self.device)
            self.unread = torch.arange(size, len(self.data), device=self.device)
        return self.data[index].to(torch.int32) & 0xFFFF


def load_model(network: Network, folder: Path) -> None:
    """Fill `network` with the weights of a model folder that save_model wrote."""
    from safetensors.torch import load_file

    tensors = load_file(str(folder / "model.safetensors"))
    with torch.no_grad():
        for name, weight in hf_names(network).items():
            weight.copy_(tensors[name])


def save_model(network: Network, tokenizer, folder: Path, facts: dict) -> None:
    """Write the folder in the Hugging Face layout, and train.json with the run's facts."""
    from safetensors.torch import save_file

    write_tokenizer(tokenizer, folder)
    config = hf_config(network.shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {
        "do_sample": False
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(hf_tensors(network), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "train.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def train(options: argparse.Namespace) -> dict:
    """Train as `options` say (see parser) and write the model; returns the facts that train.json holds."""
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.start_from:
        tokenizer = Tokenizer.from_file(str(options.start_from / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(options.tokenizer_seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        tokenizer_file = Path(scratch) / "tokenizer.json"
        tokenizer.save(str(tokenizer_file))
        workers = start_workers(
            tokenizer_file, Path(scratch), options.workers, options.seed + 1, rows=6 * options.batch
        )
        try:
            return _train(options, device, tokenizer, Path(scratch), begun, workers)
        finally:
            stop_workers(workers)


def _train(options, device: str, tokenizer, scratch: Path, begun: float, workers: list) -> dict:
    shape = TOY if options.toy else Shape()
    network = Network(shape).to(device)
    if options.start_from:
        load_model(network, options.start_from)
    weights = list(network.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() == 2], "weight_decay": 0.1},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), eps=1e-8, fused=device == "cuda")
    model = torch.compile(network) if device == "cuda" and not options.no_compile else network
    validation = inputs_and_targets(
        torch.from_numpy(
            RowMaker(tokenizer, options.seed + 999_999, synthetic_share=0.0).rows(32).astype(np.int32)
        ).to(device)
    )

    def loss_of(rows_or_pair) -> torch.Tensor:
        ids, targets = rows_or_pair
        with torch.autocast(device, torch.bfloat16):
            return model(ids, targets)

    plain_ids = shape.vocab - len(SPECIAL_TOKENS)
    warm = torch.randint(0, plain_ids, (options.batch, shape.context), dtype=torch.int32, device=device)
    if model is not network:  # compile before the clock starts, and throw the gradients away
        loss_of(inputs_and_targets(warm)).backward()
        network.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    pool = RowPool(scratch, device, workers, options.batch)
    log, step, shown = [], 0, 0.0
    seconds = options.minutes * 60
    start = time.monotonic()
    print(
        f"{sum(w.numel() for w in weights):,} parameters on {device}, ready after {start - begun:.1f} s",
        flush=True,
    )
    with tqdm(
        total=options.steps or round(seconds), unit="step" if options.steps else "s", mininterval=5
    ) as bar:
        while True:
            elapsed = time.monotonic() - start
            progress = step / options.steps if options.steps else elapsed / seconds
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, options.lr)
            loss = loss_of(inputs_and_targets(pool.batch(options.batch)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 8 == 0 and device == "cuda":
                torch.cuda.synchronize()
            bar.update(1 if options.steps else min(round(elapsed), bar.total) - bar.n)
            if progress * 40 >= shown:
                shown += 1
                tokens = step * options.batch * shape.context
                log.append({"seconds": round(elapsed, 1), "step": step, "loss": round(loss.item(), 4)})
                line = f"{elapsed:6.1f} s  step {step}  {tokens / 1e6:.0f}M tokens  loss {loss.item():.4f}"
                bar.write(f"{line}  fresh {pool.fresh_tokens / 1e6:.0f}M")
    trained = time.monotonic() - start
    with torch.no_grad():
        held_out_loss = loss_of((validation[0][: options.batch], validation[1][: options.batch])).item()
    tokens = step * options.batch * shape.context
    facts = {
        "parameters": sum(w.numel() for w in weights), "steps": step, "tokens": tokens,
        "fresh_tokens": pool.fresh_tokens, "refills": pool.refills, "seconds_training": round(trained, 1),
        "seconds_in_all": round(time.monotonic() - begun, 1), "held_out_loss": round(held_out_loss, 4),
        "seed": options.seed, "batch_rows": options.batch, "context": shape.context,
        "peak_learning_rate": options.lr,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "workers": options.workers,
        "started_from": str(options.start_from) if options.start_from else None, "log": log,
    }  # fmt: skip
    if options.start_from and (before := options.start_from / "train.json").exists():
        facts["before"] = json.loads(before.read_text(encoding="utf-8"))
    save_model(network, tokenizer, options.out, facts)
    print(json.dumps({k: v for k, v in facts.items() if k not in ("log", "before")}), flush=True)
    return facts


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tinyvllm.demo.train", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    p.add_argument(
        "--minutes", type=float, default=5.0, help="training time on the clock, without start-up (default 5)"
    )
    p.add_argument("--steps", type=int, default=0, help="train for this many steps instead of a time")
    p.add_argument("--batch", type=int, default=64, help="rows of 2,048 tokens a step (default 64)")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    p.add_argument("--seed", type=int, default=0, help="seed of the documents and of the initial weights")
    p.add_argument(
        "--tokenizer-seed", type=int, default=7, help="seed of the text that the tokenizer learns from"
    )
    p.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3), help="processes that write text"
    )
    p.add_argument("--start-from", type=Path, help="a model folder to go on from, with its tokenizer")
    p.add_argument(
        "--no-compile",
        action="store_true",
        help="skip torch.compile: starts half a minute sooner, runs slower",
    )
    p.add_argument("--toy", action="store_true", help="a tiny network, to try the recipe on a CPU")
    return p


if __name__ == "__main__":
    train(parser().parse_args())
