"""What an EngineState remembers: requests with their spans, and steps."""

from dataclasses import dataclass, field
from typing import Self


@dataclass(slots=True)
class Span:
    """A stretch of a request's time: kind is "waiting", "prefill", "decode" or "preempted"; end_ns None while open."""

    kind: str
    start_ns: int
    end_ns: int | None = None


@dataclass(slots=True)
class RequestState:
    """One request as the events tell it."""

    request_id: str
    num_prompt_tokens: int
    max_len: int
    added_ns: int
    prompt_token_ids: list[int] | None = None  # None: a trace that kept only their number
    status: str = "waiting"  # waiting, running, preempted, or the finish reason
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    token_ids: list[int] = field(default_factory=list)  # of the output; it only grows
    token_ns: list[int] = field(default_factory=list)
    text: str = ""
    block_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    finished_ns: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.token_ids)

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token."""
        return self.token_ns[0] - self.added_ns if self.token_ns else None

    def itl_ns(self) -> list[int]:
        """Inter-token latencies: the times between one token and the next."""
        return [b - a for a, b in zip(self.token_ns, self.token_ns[1:])]

    def clone(self) -> Self:
        """A copy that goes its own way."""
        return self._with_tokens(list(self.token_ids), list(self.token_ns))

    def clone_but_tokens(self) -> Self:
        """A copy whose lists of tokens are the original's, which goes on adding to them."""
        return self._with_tokens(self.token_ids, self.token_ns)

    def _with_tokens(self, token_ids: list[int], token_ns: list[int]) -> Self:
        last = self.spans[-1]
        return type(self)(  # one after the other: dataclasses.replace takes four times as long
            self.request_id, self.num_prompt_tokens, self.max_len, self.added_ns, self.prompt_token_ids, self.status,
            self.num_computed_tokens, self.num_cached_tokens, self.num_preemptions, token_ids, token_ns, self.text,
            self.block_ids.copy(), [*self.spans[:-1], Span(last.kind, last.start_ns, last.end_ns)], self.finished_ns)


@dataclass(slots=True)
class StepState:
    """One step: its batch as ((request_id, start, count, sampled), ...), and its times.

    prefills: those rows of the batch that compute more than a request's newest token, as it was when the step began.
    """

    step: int
    begin_ns: int
    num_tokens: int
    batch: tuple[tuple, ...]
    end_ns: int | None = None
    runner_ns: int | None = None
    error: str | None = None
    prefills: tuple[tuple, ...] = ()
