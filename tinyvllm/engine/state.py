"""What the events say: the engine's state, rebuilt from nothing but events.

Widgets read this and never the engine, so the same picture comes from a live run, a recorded one, and one on another
machine. A test holds it against the engine's own books after every step of a random storm.
"""

from collections import deque
from dataclasses import dataclass, field

from tinyvllm.engine.events import Event

KEPT_STEPS = 5000


@dataclass
class Span:
    """A stretch of a request's time: kind is "waiting", "prefill", "decode" or "preempted"; end_ns None while open."""

    kind: str
    start_ns: int
    end_ns: int | None = None


@dataclass
class RequestState:
    """One request as the events tell it."""

    request_id: str
    num_prompt_tokens: int
    max_len: int
    added_ns: int
    status: str = "waiting"  # waiting, running, preempted, or the finish reason
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    token_ids: list[int] = field(default_factory=list)  # of the output
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


@dataclass
class StepState:
    """One step: its batch as [request_id, start, count, sampled], and its times."""

    step: int
    begin_ns: int
    num_tokens: int
    batch: list[list]
    end_ns: int | None = None
    runner_ns: int | None = None
    error: str | None = None


class EngineState:
    """Apply events in order; read the rest. `gaps` counts events that were missed."""

    def __init__(self):
        self.config: dict = {}
        self.requests: dict[str, RequestState] = {}
        self.steps: deque[StepState] = deque(maxlen=KEPT_STEPS)
        self.block_owners: dict[int, list[str]] = {}  # block_id -> the requests that hold it
        self.cached_blocks: set[int] = set()
        self.next_seq = 0
        self.gaps = 0

    def apply(self, event: Event) -> None:
        """Take in one event. Raises ValueError for a kind that this version does not know."""
        handler = getattr(self, f"_{event.kind}", None)
        if handler is None:
            raise ValueError(f"unknown kind of event {event.kind!r}: this trace is from a newer version")
        self.gaps += event.seq - self.next_seq if self.next_seq else 0
        self.next_seq = event.seq + 1
        handler(event)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some request holds."""
        return len(self.block_owners)

    # ---- one method a kind ----

    def _engine_config(self, e: Event) -> None:
        self.config = e.a
        self.requests.clear()
        self.block_owners.clear()
        self.cached_blocks.clear()

    def _request_added(self, e: Event) -> None:
        self.requests[e.request_id] = RequestState(e.request_id, e.a, e.b, e.t_ns, spans=[Span("waiting", e.t_ns)])

    def _request_scheduled(self, e: Event) -> None:
        request = self.requests[e.request_id]
        request.status, request.num_computed_tokens = "running", e.a
        if e.b == 0:
            request.num_cached_tokens = e.a
        request.num_preemptions = e.b
        self._open_span(request, "prefill", e.t_ns)

    def _request_preempted(self, e: Event) -> None:
        request = self.requests[e.request_id]
        request.status, request.num_computed_tokens = "preempted", 0
        self._open_span(request, "preempted", e.t_ns)

    def _request_finished(self, e: Event) -> None:
        request = self.requests[e.request_id]
        request.status, request.finished_ns = e.a, e.t_ns
        if request.spans[-1].end_ns is None:
            request.spans[-1].end_ns = e.t_ns

    def _step_begun(self, e: Event) -> None:
        self.steps.append(StepState(e.step, e.t_ns, e.a, e.b))
        for request_id, start, count, _ in e.b:
            if count == 1 and start >= self.requests[request_id].num_prompt_tokens:
                self._open_span(self.requests[request_id], "decode", e.t_ns)

    def _step_ended(self, e: Event) -> None:
        step = self.steps[-1]
        step.end_ns, step.runner_ns = e.t_ns, e.a
        for request_id, start, count, sampled in step.batch:
            # Without a KV cache a sampled token means: begin again from the first.
            forget = sampled and not self.config.get("use_kv_cache", True)
            self.requests[request_id].num_computed_tokens = 0 if forget else start + count

    def _step_failed(self, e: Event) -> None:
        self.steps[-1].end_ns, self.steps[-1].error = e.t_ns, e.a

    def _blocks_allocated(self, e: Event) -> None:
        self.requests[e.request_id].block_ids += e.a
        for block_id in e.a:
            self.block_owners.setdefault(block_id, []).append(e.request_id)

    _blocks_shared = _blocks_allocated

    def _block_cached(self, e: Event) -> None:
        self.cached_blocks.add(e.a)

    def _blocks_evicted(self, e: Event) -> None:
        self.cached_blocks.difference_update(e.a)

    def _blocks_freed(self, e: Event) -> None:
        self.requests[e.request_id].block_ids = []
        for block_id in e.a:
            owners = self.block_owners[block_id]
            owners.remove(e.request_id)
            if not owners:
                del self.block_owners[block_id]

    def _token(self, e: Event) -> None:
        request = self.requests[e.request_id]
        request.token_ids.append(e.a)
        request.token_ns.append(e.t_ns)
        request.text += e.b or ""

    @staticmethod
    def _open_span(request: RequestState, kind: str, t_ns: int) -> None:
        last = request.spans[-1]
        if last.kind == kind and last.end_ns is None:
            return
        if last.end_ns is None:
            last.end_ns = t_ns
        request.spans.append(Span(kind, t_ns))
