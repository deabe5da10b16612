"""How one request's tokens are chosen, and when it ends."""

from dataclasses import dataclass

from tinyvllm.errors import RequestError
from tinyvllm.options import refuse_unknown_options

_NOT_YET = "it is not implemented; leave it out"


@refuse_unknown_options(RequestError, reasons={name: _NOT_YET for name in (
    "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "min_tokens",
    "logprobs", "prompt_logprobs", "logit_bias", "bad_words", "logits_processors", "guided_decoding",
    "structured_outputs", "include_stop_str_in_output", "skip_special_tokens", "detokenize")})
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

        check(_is_number(self.temperature) and 0 <= self.temperature < float("inf"),
              "temperature", "a number of 0 (greedy) or more")
        check(_is_int(self.top_k) and self.top_k >= -1, "top_k", "a whole number, 1 or more, or 0 or -1 for no limit")
        check(_is_number(self.top_p) and 0 < self.top_p <= 1,
              "top_p", "above 0 and at most 1 (1 keeps every token; for greedy decoding use temperature=0)")
        check(self.seed is None or _is_int(self.seed), "seed", "a whole number or None")
        check(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
              "max_tokens", "a whole number of 1 or more, or None for as many as fit")
        check(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")

        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        check(all(isinstance(s, str) and s for s in stop), "stop", "a non-empty string or a list of them")
        ids = list(self.stop_token_ids or ())
        check(all(_is_int(i) and i >= 0 for i in ids), "stop_token_ids", "a list of token ids (whole numbers)")
        if self.temperature == 0 and self.seed is not None:
            raise RequestError(f"temperature=0 is greedy and draws nothing, so seed={self.seed} would have no effect: "
                               "leave out the seed, or set a temperature above 0")
        # Frozen: normalised once here, so that everyone downstream reads plain tuples.
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "top_k", max(0, self.top_k))


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
