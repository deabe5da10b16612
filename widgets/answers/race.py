"""What TokenRace asks: the next-token distribution of a request, a fork of it with another token, the list of all."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tinyvllm.errors import RequestError
from tinyvllm.sampling_params import SamplingParams
from widgets.answers.base import answers
from widgets.feed import Feed
from widgets.frames import Payload

MODES = ("fork", "force")
# Of requests whose distribution was looked at: how they sample, for a fork after their end.
_sampling: WeakKeyDictionary[Feed, dict[str, SamplingParams]] = WeakKeyDictionary()
_forks: WeakKeyDictionary[Feed, set[str]] = WeakKeyDictionary()  # ids given to forks


@answers("race.next")
def next_token(feed: Feed, request: str, n: int = 12) -> Future:
    """The logits from which a request's newest token was drawn, as much of them as the sliders need.

    The sampler never sees an order among 128,000 logits: bfloat16 has few different numbers, so it counts. So does
    this: `keys` uint16, the different logits as sampling.ordered_keys_numpy has them, largest first, and `counts`
    uint32, how many ids have each. With these, temperature, top-k and top-p come out in the page as in the kernel,
    whatever the size of the vocabulary. `top_keys` uint16: those of the ids in data["ids"], the n most likely and, at
    the end if it is none of these, the token that was chosen.
    """

    def look(llm: Any) -> Callable[[], Payload]:
        # A page asks this several times a second: what moves is copied here, all else is done away from the engine.
        living, logits = _living(llm, request), llm.probe.logits(request)
        if living is None or logits is None or not living.num_output_tokens:
            return lambda: Payload({"request": request, "ids": None})
        position, token_ids = living.num_tokens - 1, living.token_ids[-25:]
        return partial(_distribution, feed, llm, living, logits, position, token_ids, living.status.is_finished, n)

    return feed.look(look)


@answers("race.fork")
def fork(feed: Feed, request: str, position: int, token_id: int, mode: str = "fork") -> Future:
    """A new request: the first `position` tokens of `request`, then `token_id`; it goes on as that one would.

    mode: "fork", both go on; "force", the old one is aborted. Same sampling parameters and seed, so that what differs
    comes from that token; the tokens before it come from the prefix cache. The answer is {"request": its id}: the
    old one's with a number, "3.1".
    """
    if mode not in MODES:
        raise RequestError(f"mode must be {' or '.join(map(repr, MODES))}, got {mode!r}")
    with feed.lock:
        state = feed.state.requests.get(request)
        if state is None:
            raise RequestError(f"there is no request {request!r} any more")
        if state.prompt_token_ids is None:
            raise RequestError(f"the tokens of request {request!r} were not recorded")
        tokens = state.prompt_token_ids + state.token_ids
        if not state.num_prompt_tokens <= position <= len(tokens):
            raise RequestError(f"request {request!r} chose its tokens at positions {state.num_prompt_tokens} to "
                               f"{len(tokens)}, not at {position}")
        prompt = [*tokens[:position], token_id]
        most = max(1, state.max_len - len(prompt))
        child = _child_id(feed, request)

    def add(llm: Any) -> dict[str, str]:
        living = _living(llm, request)
        params = _sampling.get(feed, {}).get(request) if living is None else _params(living)
        if params is None:
            raise RequestError(f"request {request!r} has ended, and how it sampled is forgotten: start it again")
        feed.source.add(prompt, dataclasses.replace(params, max_tokens=most), child)
        if mode == "force":
            feed.source.abort(request)
        return {"request": child}

    return feed.look(add)


@answers("race.list")
def every_request(feed: Feed) -> dict[str, Any]:
    """{"requests": [[id, status, output tokens, how its text begins], ...]} in the order of arrival."""
    with feed.lock:
        return {"requests": [[r.request_id, r.status, len(r.token_ids), r.text[:60]]
                             for r in feed.state.requests.values()]}


def _living(llm: Any, request_id: str) -> Any:
    """The engine's own Request: one that got a token in the last step, even if it ended with it, or any unfinished."""
    scheduler = llm.engine.scheduler
    there = [*llm.runner.last_sampled, *scheduler.running, *scheduler.waiting]
    return next((r for r in there if r.request_id == request_id), None)


def _params(request: Any) -> SamplingParams:
    """How a request samples, with its seed said aloud: one that was not given came from its number."""
    params = request.params
    return params if params.temperature == 0 else dataclasses.replace(params, seed=request.seed)


def _distribution(feed: Feed, llm: Any, request: Any, logits: np.ndarray, position: int, token_ids: list[int],
                  ended: bool, n: int) -> Payload:
    """request: only what never changes is read of it. token_ids: its newest, the last of them at `position`."""
    from tinyvllm.kernels.sampling import LOWEST_KEY, ordered_keys_numpy  # here: a replay needs no kernels

    bits = (np.ascontiguousarray(logits, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    keys = ordered_keys_numpy(bits)
    _sampling.setdefault(feed, {})[request.request_id] = _params(request)
    chosen = token_ids[-1]
    ids = np.lexsort((np.arange(len(keys)), -keys))[:max(1, int(n))].tolist()
    if chosen not in ids:
        ids.append(chosen)
    distinct, counts = np.unique(keys[keys >= LOWEST_KEY], return_counts=True)
    params = request.params
    data = {"request": request.request_id, "position": position, "chosen": chosen, "ids": ids,
            "texts": [feed.source.token_text(token_id) for token_id in ids], "vocab_size": len(keys),
            "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p,
            "ended": ended, "before": _text_before(llm, token_ids[:-1])}
    return Payload(data, {"keys": distinct[::-1].astype(np.uint16), "counts": counts[::-1].astype(np.uint32),
                          "top_keys": keys[ids].astype(np.uint16)})


def _text_before(llm: Any, token_ids: list[int]) -> str:
    """The end of the text that the newest token was chosen after."""
    if llm.tokenizer is None:
        return " ".join(map(str, token_ids))
    return llm.tokenizer.decode(token_ids, skip_special_tokens=False)[-80:]


def _child_id(feed: Feed, parent: str) -> str:
    given = _forks.setdefault(feed, set())
    number = 1
    while f"{parent}.{number}" in given or f"{parent}.{number}" in feed.state.requests:
        number += 1
    given.add(f"{parent}.{number}")
    return f"{parent}.{number}"
