"""What a request gives back: the shape of vLLM's outputs, plus the times that a lecture talks about."""

from dataclasses import dataclass, field


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


@dataclass
class RequestOutput:
    """The state of one request after a step: prompt, continuation so far, times."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = TokenIds()
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0


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
