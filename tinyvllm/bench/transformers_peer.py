"""transformers with random weights at a model's shape, for the sake of comparison: needs torch and transformers.

    eager      operations one by one, the cache grows: what `generate` does if nothing is said
    compiled   a cache of fixed size, each step one graph by torch.compile(mode="reduce-overhead"): its best at batch 1
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

NOT_FIELDS = ("torch_dtype", "dtype", "model_type", "architectures")  # of transformers' configuration
EAGER_NEW = 32  # tokens of an eager run: its steps take the same time however many they are


class TransformersPeer:
    """raw_config: as in a config.json. device: "cpu" or "cuda". Raises ImportError without torch and transformers."""

    def __init__(self, raw_config: dict, device: str):
        import torch
        import transformers

        self.torch, self.device, self.version = torch, device, transformers.__version__
        self.config = transformers.LlamaConfig(
            **{key: value for key, value in raw_config.items() if key not in NOT_FIELDS})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16,
                                                                  attn_implementation="sdpa")
        model = model.to_empty(device=device).eval().requires_grad_(False)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=self.config).to(device)
        model.tie_weights()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
        self.model = model

    def prompts(self, count: int, length: int) -> Any:
        """Random token ids [count, length]."""
        return self.torch.randint(0, self.config.vocab_size, (count, length), device=self.device)

    def growing_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def step(self, token_ids: Any, cache: Any, positions: Any = None) -> Any:
        """The next token of each row [rows, 1], greedy. positions [1, tokens]: needed with a cache of fixed size."""
        logits = self.model(input_ids=token_ids, position_ids=positions, past_key_values=cache, use_cache=True,
                            logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def eager_rate(self, batch: int, prompt: int, new: int) -> float:
        """Tokens a second after the first."""
        cache = self.growing_cache()
        token_ids = self.step(self.prompts(batch, prompt), cache)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(new - 1):
            token_ids = self.step(token_ids, cache)
        self.synchronize()
        return batch * (new - 1) / (time.perf_counter() - start)

    def fixed_run(self, prompts: Any, new: int, cache: Any, step: Any) -> tuple[Any, float]:
        """(token ids [rows, new], tokens a second after the first) with a cache of fixed size; step: as `self.step`."""
        torch, (rows, length) = self.torch, prompts.shape
        cache.reset()
        found = [self.step(prompts, cache, torch.arange(length, device=self.device)[None])]
        position = torch.tensor([[length]], device=self.device)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(new - 1):
            if self.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            found.append(step(found[-1], cache, position).clone())
            position = position + 1
        self.synchronize()
        return torch.cat(found, dim=1), rows * (new - 1) / (time.perf_counter() - start)

    def fixed_cache(self, length: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.config, max_cache_len=length)


def decode(raw_config: dict, rounds: int, device: str, note: Callable[[str, str], None] | None = None,
           batches=(1, 8, 32, 128, 256), prompt: int = 32, new: int = 128) -> Iterator[tuple[str, list[float]]]:
    """The same work as gpu_engine.decode: 32 tokens in, 128 out. Nothing is compiled for a CPU. note(what, value): the
    version."""
    peer = TransformersPeer(raw_config, device)
    if note:
        note("transformers", peer.version)
    for batch in batches:
        rates = [peer.eager_rate(batch, prompt, min(new, EAGER_NEW)) for _ in range(rounds + 1)]
        yield f"transformers, eager: decode, batch {batch} (tokens/s)", rates[1:]
    cache, step = peer.fixed_cache(prompt + new), peer.step
    if device == "cuda":
        step = peer.torch.compile(step, mode="reduce-overhead", fullgraph=True)
    rates = [peer.fixed_run(peer.prompts(1, prompt), new, cache, step)[1] for _ in range(rounds + 2)]
    yield "transformers, compiled: decode, batch 1 (tokens/s)", rates[2:]  # the first two compile
