"""A request: its tokens, and how far the engine has come with them.

There is no prefill phase and no decode phase. A request has `num_tokens` (prompt plus what was generated) and
`num_computed_tokens` (those whose keys and values lie in the cache); every step lets the second catch up with the
first, and whenever it does, one more token is sampled and the race goes on:

    tokens     P P P P P P P P P P G G G
    computed   ######## . . . . . . . .        a prompt in chunks
    computed   ################### . .  .      caught up: sample, append, one left to compute

Chunked prefill, prefix-cache hits and preemption are then only different values of `num_computed_tokens`, which counts
what steps that are under way compute: whoever schedules the next one takes it as done.
"""

import enum
import time
from collections.abc import Sequence

from tinyvllm.outputs import RequestMetrics
from tinyvllm.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request is. The FINISHED_ ones carry the finish_reason that the user sees."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waiting again, its blocks taken; its tokens are recomputed
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"

    def __init__(self, value: str):
        self.is_finished: bool = self._name_.startswith("FINISHED_")  # asked for every request several times a step


class Request:
    """One prompt on its way through the engine. Only the scheduler and the engine change it.

    prompt_token_ids: at least one id. max_len: most tokens, prompt included. seed: for its draws, 64 bits. prompt: the
    text that it came from, if it came from text.
    """

    def __init__(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, *,
                 eos_token_ids: Sequence[int] = (), max_len: int, seed: int = 0, prompt: str | None = None,
                 arrival_time: float | None = None):
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.token_ids = list(prompt_token_ids)  # prompt, then output
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_pending = 0  # tokens that steps under way sample: how many is known, not yet which
        self.max_len = max_len
        if params.max_tokens is not None:
            self.max_len = min(max_len, self.num_prompt_tokens + params.max_tokens)
        self.stop_ids = frozenset(params.stop_token_ids)
        self.eos_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.end_ids = self.eos_ids | self.stop_ids
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.num_emitted_tokens = 0  # output tokens that an output has reported
        self.token_times: list[float] = []  # of those, in seconds of time.perf_counter()
        self.num_cached_tokens = -1  # tokens of the first admission that came from the prefix cache; -1: not admitted
        self.metrics = RequestMetrics(time.perf_counter() if arrival_time is None else arrival_time)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens:]

    @property
    def finish_reason(self) -> str | None:
        return self.status.value if self.status.is_finished else None

    def append_output(self, token_id: int) -> None:
        """Add a sampled token, and finish if it is a stop token or the last one allowed.

        A stop or end-of-sequence id counts also when it is the very first token after the prompt.
        """
        token_ids = self.token_ids
        token_ids.append(token_id)
        if token_id in self.end_ids:
            self.status = RequestStatus.FINISHED_STOPPED
            self.stop_reason = None if token_id in self.eos_ids else token_id
        elif len(token_ids) >= self.max_len:
            self.status = RequestStatus.FINISHED_LENGTH_CAPPED

    def __repr__(self) -> str:
        return (f"Request({self.request_id}, {self.status.name}, computed {self.num_computed_tokens} of "
                f"{self.num_tokens}, prompt {self.num_prompt_tokens})")
