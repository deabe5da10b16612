"""Arrivals: the same traffic again and again, so that two ways of serving it can be compared.

Requests that come independently of each other, so many a second on average, make a Poisson process: the times between
two of them are exponential. Drawn from a seed, the traffic is the same whenever it is asked for, and driven by steps
instead of by the clock a run of it is the same too, on any machine.

    poisson_arrivals ──> [Arrival, ...] ──> run_arrivals(llm, arrivals, scheduling_policy="static")     ──> Trace
                                        └─> run_arrivals(llm, arrivals, scheduling_policy="continuous") ──> Trace
"""

import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tinyvllm.engine.events import EventLog
from tinyvllm.engine.recording import describe_run
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import ConfigError, RequestError, TinyVLLMError
from tinyvllm.sampling_params import SamplingParams

UNITS = ("steps", "seconds")


class Arrival(NamedTuple):
    """A request to come: when, in the unit of whoever runs it (steps or seconds), and how large.

    num_shared_tokens: so many tokens at the beginning of the prompt are those of every other arrival too. seed: of the
    rest of the prompt; None: its place in the list.
    """

    at: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared_tokens: int = 0
    seed: int | None = None


def poisson_stream(rate: float, *, prompt_tokens: tuple[int, int] = (16, 64),
                   output_tokens: tuple[int, int] = (16, 128), num_shared_tokens: int = 0,
                   seed: int = 0) -> Iterator[Arrival]:
    """Arrivals without end: `rate` of them a step or a second on average, lengths even between two bounds (inclusive).

    Raises ConfigError for a rate or for bounds that cannot be.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"rate must be a number above 0 (arrivals a step, or a second), got {rate!r}")
    for name, bounds in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        is_pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(_is_count(n) for n in bounds)
        if not (is_pair and 1 <= bounds[0] <= bounds[1]):
            raise ConfigError(f"{name} must be (least, most) with 1 <= least <= most, got {bounds!r}")
    if not _is_count(num_shared_tokens):
        raise ConfigError(f"num_shared_tokens must be a whole number of 0 or more, got {num_shared_tokens!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be a whole number, got {seed!r}")
    return _draw(rate, prompt_tokens, output_tokens, num_shared_tokens, seed)


def poisson_arrivals(count: int, rate: float, **options: Any) -> list[Arrival]:
    """The first `count` arrivals of a poisson_stream, which takes the other options."""
    if not _is_count(count):
        raise ConfigError(f"count must be a whole number of 0 or more, got {count!r}")
    return list(itertools.islice(poisson_stream(rate, **options), count))


def prompt_of(arrival: Arrival, vocabulary: Sequence[int], seed: int = 0) -> list[int]:
    """Token ids of an arrival's prompt, drawn from the ids in `vocabulary`. seed: used if the arrival has none."""
    shared = random.Random("shared")
    own = random.Random(seed if arrival.seed is None else arrival.seed)
    num_shared = min(arrival.num_shared_tokens, arrival.num_prompt_tokens)
    draws = itertools.chain((shared.random() for _ in range(num_shared)),
                            (own.random() for _ in range(arrival.num_prompt_tokens - num_shared)))
    return [vocabulary[int(draw * len(vocabulary))] for draw in draws]


def plain_ids(llm: Any) -> list[int]:
    """The ids of a model that stand for text: neither special tokens nor ends of sequence."""
    special = set(llm.model_config.eos_token_ids)
    if llm.tokenizer is not None:
        special |= llm.tokenizer.special_ids
    return [i for i in range(llm.model_config.vocab_size) if i not in special]


def run_arrivals(llm: Any, arrivals: Iterable[Sequence], *, unit: str = "steps", **policy: Any) -> Trace:
    """Serve arrivals with an LLM from an empty cache on, and give the recording.

    arrivals: of Arrival, or plain (at, prompt tokens, output tokens). Request "0" is the first in the list. Each
    generates exactly its output tokens, greedily.
    unit: "steps": an arrival at 5 is there before the sixth step, whatever the clock says, so that a run has the same
    steps each time. With nobody to serve, time passes without steps; the trace's metadata["idle_steps"] says where:
    [[step, how many steps' worth of time passed before it], ...]. "seconds": by the clock.
    policy: any option that LLM.reset takes: scheduling_policy="static", max_num_batched_tokens=32, ... They hold for
    this run; afterwards the LLM is as it was, with an empty cache.

    Raises ConfigError for a policy, RequestError for an arrival that cannot be, TinyVLLMError if the LLM is in use. In
    each case nothing has run.
    """
    if unit not in UNITS:
        raise ConfigError(f"unit must be 'steps' or 'seconds', got {unit!r}")
    if llm.engine.events is not None:
        raise TinyVLLMError("this LLM is listened to, by a LiveEngine for instance: close() that first, or use another")
    llm.engine.settle()  # of an aborted request a step may be under way yet
    if llm.engine.has_unfinished_requests():
        raise TinyVLLMError("this LLM has unfinished requests: let them end first")
    arrivals = [_checked(number, arrival, llm) for number, arrival in enumerate(arrivals)]
    config, plan = llm.engine_config, llm.memory_plan
    before = {name: getattr(config, name) for name in
              ("block_size", "enable_prefix_caching", "scheduling_policy", "use_kv_cache", "seed")}
    before |= {name: getattr(plan, name) for name in ("num_blocks", "max_num_seqs", "max_num_batched_tokens")}
    llm.reset(**policy)
    try:
        vocabulary = plain_ids(llm)
        requests = [(arrival.at, _request(llm, number, arrival, vocabulary)) for number, arrival in enumerate(arrivals)]
        requests.sort(key=lambda pair: pair[0])
        events = EventLog(capacity=10**9)  # all of it: a recording has no use for the newest part alone
        llm.engine.listen(events)
        idle = _by_steps(llm.engine, requests) if unit == "steps" else _by_clock(llm.engine, requests)
        recorded, _ = events.read()
        return Trace(recorded, {"unit": unit, "policy": policy, "idle_steps": idle,
                                "arrivals": [list(arrival) for arrival in arrivals], **describe_run(llm, recorded)})
    finally:
        llm.reset(**before)  # also after an interrupt: a fresh engine, which nobody listens to


def _by_steps(engine: Any, requests: list[tuple[float, Any]]) -> list[list[int]]:
    """Run, with one step a tick; returns where ticks passed with nothing to do: [[step that came next, ticks], ...]."""
    idle, tick, following = [], 0, 0
    while following < len(requests) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            ticks = max(0, math.ceil(requests[following][0]) - tick)
            tick += ticks
            if ticks:
                idle.append([engine.num_steps + 1, ticks])
        while following < len(requests) and requests[following][0] <= tick:
            engine.submit(requests[following][1])
            following += 1
        engine.step()
        tick += 1
    return idle


def _by_clock(engine: Any, requests: list[tuple[float, Any]]) -> list[list[int]]:
    start, following = time.perf_counter(), 0
    while following < len(requests) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, start + requests[following][0] - time.perf_counter()))
        while following < len(requests) and requests[following][0] <= time.perf_counter() - start:
            engine.submit(requests[following][1])
            following += 1
        if engine.has_unfinished_requests():
            engine.step(ahead=True)
    return []


def _draw(rate: float, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], num_shared_tokens: int,
          seed: int) -> Iterator[Arrival]:
    # random() alone: its sequence for a seed is the same in every Python.
    uniform, at = random.Random(seed).random, 0.0

    def between(bounds: tuple[int, int]) -> int:
        return bounds[0] + int(uniform() * (bounds[1] - bounds[0] + 1))

    for number in itertools.count():
        at -= math.log(1.0 - uniform()) / rate
        yield Arrival(at, between(prompt_tokens), between(output_tokens), num_shared_tokens, seed * 1_000_003 + number)


def _checked(number: int, given: Sequence, llm: Any) -> Arrival:
    try:
        arrival = Arrival(*given)
    except TypeError:
        raise RequestError(f"arrival {number}: (at, prompt tokens, output tokens) is needed, got {given!r}") from None
    if not (isinstance(arrival.at, (int, float)) and arrival.at >= 0 and math.isfinite(arrival.at)):
        raise RequestError(f"arrival {number}: it comes at a time of 0 or later, got {arrival.at!r}")
    if not (_is_count(arrival.num_prompt_tokens) and _is_count(arrival.num_output_tokens)
            and arrival.num_prompt_tokens and arrival.num_output_tokens):
        raise RequestError(f"arrival {number}: prompt and output tokens are whole numbers of 1 or more, "
                           f"got {arrival.num_prompt_tokens!r} and {arrival.num_output_tokens!r}")
    if not _is_count(arrival.num_shared_tokens):
        raise RequestError(f"arrival {number}: shared tokens are a whole number of 0 or more, "
                           f"got {arrival.num_shared_tokens!r}")
    most = llm.memory_plan.max_model_len
    if arrival.num_prompt_tokens + arrival.num_output_tokens > most:
        raise RequestError(f"arrival {number}: {arrival.num_prompt_tokens} prompt and {arrival.num_output_tokens} "
                           f"output tokens are more than max_model_len={most}")
    return arrival


def _request(llm: Any, number: int, arrival: Arrival, vocabulary: Sequence[int]) -> Any:
    params = SamplingParams(temperature=0, max_tokens=arrival.num_output_tokens, ignore_eos=True)
    try:
        request = llm.engine.prepare(prompt_of(arrival, vocabulary, number), params, str(number))
    except RequestError as error:
        raise RequestError(f"arrival {number}: {error}") from None
    if request.max_len < arrival.num_prompt_tokens + arrival.num_output_tokens:
        raise RequestError(f"arrival {number}: {arrival.num_prompt_tokens} prompt and {arrival.num_output_tokens} "
                           f"output tokens are more than the KV cache of this run holds, {request.max_len}: "
                           "raise num_blocks")
    return request


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
