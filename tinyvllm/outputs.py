"""What a request gives back: the shape of vLLM's outputs, plus the times that a lecture talks about."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvllm.engine.request import Request


@dataclass
class RequestMetrics:
    """When things happened to one request: seconds of time.perf_counter(), None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, seconds."""
        if self.finished_time is None or self.num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_output_tokens - 1)

    @property
    def e2el(self) -> float | None:
        """End-to-end latency, seconds."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


class TokenIds:
    """A field that holds a list, given either as one or as (list, start, stop): that part of it, copied when asked for.

    A request's tokens are only ever appended to, so a part of them stays what it is; and to copy hundreds of ids for
    hundreds of requests at every step, which hardly anybody looks at, would take as long as the step itself.
    """

    def __set_name__(self, owner, name):
        self._name = "_" + name

    def __set__(self, instance, value):
        instance.__dict__[self._name] = value

    def __get__(self, instance, owner=None) -> list[int]:
        if instance is None:
            raise AttributeError("a field without a default")  # what dataclasses ask for
        if self._name not in instance.__dict__:
            raise AttributeError(self._name)  # then __getattr__ is asked, where there is one
        value = instance.__dict__[self._name]
        if isinstance(value, tuple):
            tokens, start, stop = value
            value = instance.__dict__[self._name] = tokens[start:stop]
        return value


@dataclass
class CompletionOutput:
    """One generated continuation. finish_reason: "stop", "length", "abort", or None while it runs.

    stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
    new_text: what this output adds to the one before it (for streaming); logprobs: always None here.
    """

    index: int
    text: str
    token_ids: list[int] = TokenIds()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    new_text: str = ""
    logprobs: None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def __getstate__(self) -> dict:
        """For copies and for other processes: without the tokens that came later."""
        self.token_ids  # noqa: B018 - cut out of all tokens
        return vars(self)


@dataclass
class RequestOutput:
    """The state of one request after a step: prompt, continuation so far, times.

    Hundreds of these come with every step, and most are looked at for `finished` only, so the engine makes them with
    `after_step`: all else is put together when it is first asked for (`vars` shows no more than that). What they say is
    of that step, whenever that is.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = TokenIds()
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0

    @classmethod
    def after_step(cls, request: "Request", finished: bool, text: str = "", new_text: str = "") -> "RequestOutput":
        """The state of a request as it is now. Tokens and reasons are read later: tokens are only ever appended, and
        nothing changes in a request that has ended."""
        output = cls.__new__(cls)
        output.request_id = request.request_id
        output.finished = finished
        output.num_cached_tokens = request.metrics.num_cached_tokens
        output._state = request, len(request.token_ids), request.metrics.num_preemptions, text, new_text
        return output

    def __getattr__(self, name: str) -> Any:
        """Of what is not there (yet)."""
        if name not in type(self).__dataclass_fields__ or "_state" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        self._complete()
        return getattr(self, name)

    def __getstate__(self) -> dict:
        """For copies and for other processes: the fields alone, and of the tokens those that had come."""
        if "_state" in vars(self):
            self._complete()
        self.prompt_token_ids  # noqa: B018 - cut out of all tokens
        return {name: value for name, value in vars(self).items() if name != "_state"}

    def _complete(self) -> None:
        request, num_tokens, num_preemptions, text, new_text = self._state
        token_ids, num_prompt, of = request.token_ids, request.num_prompt_tokens, request.metrics
        completion = CompletionOutput(0, text, (token_ids, num_prompt, num_tokens),
                                      request.finish_reason if self.finished else None,
                                      request.stop_reason if self.finished else None, new_text)
        metrics = RequestMetrics(of.arrival_time, of.first_scheduled_time, of.first_token_time,
                                 of.finished_time if self.finished else None, num_tokens - num_prompt,
                                 self.num_cached_tokens, num_preemptions)
        # What somebody has set stays; and two threads that read at once get the same.
        for name, value in (("prompt", request.prompt), ("_prompt_token_ids", (token_ids, 0, num_prompt)),
                            ("outputs", [completion]), ("metrics", metrics)):
            vars(self).setdefault(name, value)


@dataclass
class EngineStats:
    """A snapshot of the engine between two steps."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_finished: int = 0
    kv_cache_usage: float = 0.0  # share of blocks that some request holds
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_prompt_tokens: int = 0  # prompt tokens computed (cached ones not counted; recomputed ones counted again)
    num_output_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    last_step_tokens: int = 0
    running: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
