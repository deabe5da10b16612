"""How one request's tokens are chosen, and when it ends."""

import numbers
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinyvllm.errors import RequestError
from tinyvllm.options import refuse_unknown_options

# Names of vLLM's that are not implemented here, with the value that asks for nothing.
UNSUPPORTED = {"n": 1, "best_of": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
               "min_p": 0.0, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "logit_bias": None,
               "bad_words": None, "logits_processors": None, "guided_decoding": None, "structured_outputs": None,
               "include_stop_str_in_output": False, "skip_special_tokens": True, "detokenize": True}
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@refuse_unknown_options(RequestError, UNSUPPORTED)
@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request; names and defaults are vLLM's.

    temperature: divides the logits; 0 means greedy (the most likely token, the lowest id on a tie).
    top_k: keep the k most likely tokens; 0 or -1 keeps all. Tokens tied with the k-th stay in.
    top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1]; applied after top_k.
    seed: makes this request's draws repeatable, whatever else runs beside it. None: drawn from the engine's seed.
    stop: string or strings that end the text; they are not part of it.
    stop_token_ids: token ids that end it, beside the model's own end-of-sequence ids.
    ignore_eos: go on past the model's end-of-sequence ids (stop_token_ids still end it).
    max_tokens: most tokens to generate; None means up to the context length.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16

    def __post_init__(self):
        def check(ok: bool, name: str, allowed: str):
            if not ok:
                raise RequestError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        def put(name: str, value):  # frozen: normalised once here, so that everyone downstream reads plain values
            object.__setattr__(self, name, value)

        check(_is_number(self.temperature) and 0 <= self.temperature <= LARGEST_FLOAT32,
              "temperature", "a number of 0 (greedy) or more")
        check(_is_int(self.top_k) and self.top_k >= -1, "top_k", "a whole number, 1 or more, or 0 or -1 for no limit")
        check(_is_number(self.top_p) and 0 < self.top_p <= 1,
              "top_p", "above 0 and at most 1 (1 keeps every token; for greedy decoding use temperature=0)")
        check(self.seed is None or _is_int(self.seed), "seed", "a whole number or None")
        check(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
              "max_tokens", "a whole number of 1 or more, or None for as many as fit")
        check(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        stop = _as_list(self.stop)
        check(stop is not None and all(isinstance(s, str) and s for s in stop),
              "stop", "a non-empty string or a list of them")
        ids = _as_list(self.stop_token_ids)
        check(ids is not None and all(_is_int(i) and i >= 0 for i in ids),
              "stop_token_ids", "a list of token ids (whole numbers)")

        put("temperature", float(self.temperature))
        put("top_k", min(max(0, int(self.top_k)), 2**31 - 1))  # more than any vocabulary, and it fits the kernels
        put("top_p", float(self.top_p))
        put("seed", None if self.seed is None else int(self.seed))
        put("max_tokens", None if self.max_tokens is None else int(self.max_tokens))
        put("stop", tuple(stop))
        put("stop_token_ids", tuple(int(i) for i in ids))
        if self.temperature == 0:
            for name, neutral in (("seed", None), ("top_k", 0), ("top_p", 1.0)):
                if getattr(self, name) != neutral:
                    raise RequestError(f"temperature=0 is greedy and draws nothing, so {name}={getattr(self, name)!r} "
                                       f"would have no effect: leave out {name}, or set a temperature above 0")


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and value == value


def _as_list(value) -> list | None:
    """The items of a list-like value; [] for None; one item for a string; None if it is not list-like."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, dict)) else None
