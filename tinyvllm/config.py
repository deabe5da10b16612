"""The engine's options, checked once, in one place."""

from dataclasses import dataclass

from tinyvllm.errors import ConfigError

DEVICES = ("auto", "cuda", "cpu")
POLICIES = ("continuous", "static")


@dataclass(frozen=True)
class EngineConfig:
    """What the user may choose about the engine. None means: chosen from the model and the device.

    device: "auto" (a CUDA GPU if there is a usable one, else the CPU), "cuda" or "cpu".
    max_model_len: most tokens of one request, prompt and output together.
    max_num_seqs: most requests in one step. max_num_batched_tokens: most tokens in one step.
    block_size: tokens a KV-cache block. num_blocks: blocks in the pool.
    gpu_memory_utilization: share of the GPU's memory for weights, activations and the KV cache together.
    enable_prefix_caching: let requests share the blocks of equal prefixes.
    enforce_eager: call the operations one by one from Python, so that one can look between them.
    batch_invariant: add up in an order that does not depend on who else is in the batch, so that a request's logits are
        the same bits alone and in company. The CPU always does; on a GPU it costs speed, and two exceptions remain: a
        piece of a prompt that is one token long, and what is computed again after a preemption.
    seed: of the draws of requests that bring no seed of their own.
    scheduling_policy: "continuous" batching, or "static" for comparison.
    use_kv_cache: False recomputes every sequence from its first token at each step, for comparison.
    """

    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    batch_invariant: bool = False
    seed: int = 0
    scheduling_policy: str = "continuous"
    use_kv_cache: bool = True

    def __post_init__(self):
        def check(ok: bool, name: str, allowed: str):
            if not ok:
                raise ConfigError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        check(self.device in DEVICES, "device", f"one of {', '.join(map(repr, DEVICES))}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks"):
            value = getattr(self, name)
            check(value is None or (_is_int(value) and value >= 1), name,
                  "a whole number of 1 or more, or None to let the engine choose")
        check(_is_int(self.block_size) and self.block_size >= 1, "block_size", "a whole number of 1 or more")
        check(isinstance(self.gpu_memory_utilization, (int, float)) and 0 < self.gpu_memory_utilization <= 1,
              "gpu_memory_utilization", "above 0 and at most 1")
        check(_is_int(self.seed), "seed", "a whole number")
        check(self.scheduling_policy in POLICIES, "scheduling_policy", f"one of {', '.join(map(repr, POLICIES))}")
        for name in ("enable_prefix_caching", "enforce_eager", "batch_invariant", "use_kv_cache"):
            check(isinstance(getattr(self, name), bool), name, "True or False")
        if not self.use_kv_cache and self.enable_prefix_caching:
            raise ConfigError("use_kv_cache=False recomputes everything at each step, so there is no prefix to share: "
                              "set enable_prefix_caching=False with it")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
