"""What the events say: the engine's state, rebuilt from nothing but events.

Widgets read this and never the engine, so the same picture comes from a live run, a recorded one, and one on another
machine. A test holds it against the engine's own books after every step of a random storm.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Self

from tinyvllm.engine.copy_on_write import CopyOnWriteDict
from tinyvllm.engine.events import KINDS, Event
from tinyvllm.engine.state_records import RequestState, Span, StepState
from tinyvllm.engine.state_runs import apply_usual, are_usual

KEPT_STEPS = 5000  # the newest; and so many
KEPT_REQUESTS = 1000  # that have ended: a class may run for hours

_UNTIL_CONFIG = -1


class EngineState:
    """Apply events in order; read the rest.

    After a gap in the sequence numbers nothing is certain: events are passed over until an engine_config tells the
    state anew. Where nothing was missed, what is only told again is passed over.

    kept_steps, kept_requests: how many steps, and how many requests that have ended, are remembered; None: all.
    gaps counts events that were missed.
    """

    def __init__(self, kept_steps: int | None = KEPT_STEPS, kept_requests: int | None = KEPT_REQUESTS):
        self.kept_requests = kept_requests
        self.config: dict = {}
        self.requests: dict[str, RequestState] = {}
        # Kept up to date with every event, so that nobody has to walk over a thousand requests in every frame:
        self.unfinished: dict[str, RequestState] = {}  # in the order of their arrival, as `requests` is
        self.counts: Counter[str] = Counter()  # status -> requests that are known
        self.num_preempted = 0  # preemptions of the requests that are known
        self.num_cached_tokens = 0  # of the requests that are known: found in the prefix cache
        self.steps: deque[StepState] = deque(maxlen=kept_steps)
        self.block_owners: CopyOnWriteDict[list[str]] = CopyOnWriteDict()  # block_id -> the requests that hold it
        # block_id -> who had it last, and as which of its blocks
        self.block_places: CopyOnWriteDict[tuple[str, int]] = CopyOnWriteDict()
        self.cached_blocks: CopyOnWriteDict[None] = CopyOnWriteDict()  # a set: block_id -> None
        self.profile: dict | None = None  # the newest step that was taken apart
        self.first_step = 0  # steps that were over when the telling began
        self.next_seq = 0
        self.gaps = 0
        self._finished: OrderedDict[str, None] = OrderedDict()  # ids of requests, in the order in which they ended
        self._pass_over = 0  # so many events to come

    def apply(self, event: Event) -> bool:
        """Take in one event; False if it was passed over. Raises ValueError for a kind that this version lacks."""
        seq, kind = event[0], event[2]  # by number: half the time of by name
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise ValueError(f"unknown kind of event {kind!r}: this trace is from a newer version")
        if seq != self.next_seq and self.next_seq:
            self.gaps += seq - self.next_seq
            self._pass_over = _UNTIL_CONFIG
        self.next_seq = seq + 1
        if self._pass_over:
            if self._pass_over > 0:
                self._pass_over -= 1
                return False
            if kind != "engine_config":
                return False
        return not handler(self, event)

    def apply_all(self, events: Iterable[Event], breathe: Callable[[], None] = lambda: None) -> list[Event]:
        """Take in events, as `apply` would one by one, but quicker; those that were not passed over.

        breathe: called now and then, some of the work done.
        """
        events = [*events]
        if len(events) > 1 and are_usual(self, events):
            apply_usual(self, events, _HANDLERS, breathe)
            return events
        new = []
        for event in events:
            breathe()
            if self.apply(event):
                new.append(event)
        return new

    def clone(self, clone_request: Callable[[RequestState], RequestState] = RequestState.clone) -> Self:
        """A copy that goes its own way: cheap, since what has ended does not change and is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.requests = self.requests.copy()
        other.unfinished = {name: clone_request(request) for name, request in self.unfinished.items()}
        other.requests.update(other.unfinished)
        other.counts = self.counts.copy()
        other.steps = self.steps.copy()
        if other.steps:
            other.steps[-1] = replace(other.steps[-1])
        other.block_owners = self.block_owners.copy()
        other.block_places = self.block_places.copy()
        other.cached_blocks = self.cached_blocks.copy()
        other._finished = self._finished.copy()
        return other

    def finished_newest_first(self) -> Iterator[RequestState]:
        """The requests that have ended and are remembered, the last one first."""
        return (self.requests[name] for name in reversed(self._finished))

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some request holds."""
        return len(self.block_owners)

    # ---- one method a kind; it returns True if it passed the event over ----

    def _engine_config(self, e: Event) -> bool | None:
        if e.b is not None and self.config and not self._pass_over:
            self._pass_over = e.b
            return True
        self._pass_over = 0
        # All of it goes: ids, step numbers and, in a recorded run, times begin again. New objects, for whoever
        # still reads the old ones.
        self.config, self.first_step = e.a, e.step
        self.requests, self.unfinished, self.counts = {}, {}, Counter()
        self.num_preempted = self.num_cached_tokens = 0
        self.steps = deque(maxlen=self.steps.maxlen)
        self.block_owners, self.block_places, self.cached_blocks = (CopyOnWriteDict() for _ in range(3))
        self.profile = None
        self._finished = OrderedDict()
        return None

    def _policy_changed(self, e: Event) -> None:
        self.config = {**self.config, **e.a}

    def _request_added(self, e: Event) -> None:
        ids = None if isinstance(e.a, int) else e.a
        if e.request_id in self.requests:  # an id that was used before: the new one comes last
            self._forget(e.request_id)
        request = RequestState(e.request_id, e.a if ids is None else len(ids), e.b, e.t_ns, ids,
                               spans=[Span("waiting", e.t_ns)])
        self.requests[e.request_id] = self.unfinished[e.request_id] = request
        self.counts["waiting"] += 1

    def _forget(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        self.unfinished.pop(request_id, None)
        self._finished.pop(request_id, None)
        self.counts[request.status] -= 1
        self.num_preempted -= sum(span.kind == "preempted" for span in request.spans)
        self.num_cached_tokens -= request.num_cached_tokens

    def _set_status(self, request: RequestState, status: str) -> None:
        self.counts[request.status] -= 1
        self.counts[status] += 1
        request.status = status

    # Of a request that is not known (any more), nothing is told: that ends nothing.

    def _request_scheduled(self, e: Event) -> None:
        request = self.requests.get(e.request_id)
        if request is None:
            return
        cached, computed = e.a if isinstance(e.a, list) else (e.a, e.a)
        self._set_status(request, "running")
        request.num_computed_tokens = computed
        if e.b == 0 or isinstance(e.a, list):
            self.num_cached_tokens += cached - request.num_cached_tokens
            request.num_cached_tokens = cached
        request.num_preemptions = e.b
        self._open_span(request, "prefill", e.t_ns)

    def _request_preempted(self, e: Event) -> None:
        request = self.requests.get(e.request_id)
        if request is None:
            return
        self._set_status(request, "preempted")
        request.num_computed_tokens = 0
        self.num_preempted += self._open_span(request, "preempted", e.t_ns)

    def _request_finished(self, e: Event) -> None:
        request = self.requests.get(e.request_id)
        if request is None:
            return
        self._set_status(request, e.a)
        request.finished_ns = e.t_ns
        self.unfinished.pop(e.request_id, None)
        if request.spans[-1].end_ns is None:
            request.spans[-1].end_ns = e.t_ns
        self._finished[e.request_id] = None
        if self.kept_requests is not None and len(self._finished) > self.kept_requests:
            self._forget(next(iter(self._finished)))

    def _step_begun(self, e: Event) -> None:
        requests, t_ns, prefills = self.requests, e.t_ns, []
        for row in e.b:
            request_id, start, count, _ = row
            request = requests.get(request_id)
            if count > 1 or request is not None and start < request.num_prompt_tokens:
                prefills.append(row)
            elif request is not None and ((last := request.spans[-1]).kind != "decode" or last.end_ns is not None):
                self._open_span(request, "decode", t_ns)
        self.steps.append(StepState(e.step, t_ns, e.a, e.b, prefills=tuple(prefills)))

    def _step_ended(self, e: Event) -> None:
        if not self.steps:
            return
        step = self.steps[-1]
        step.end_ns, step.runner_ns = e.t_ns, e.a
        requests, keeps = self.requests, self.config.get("use_kv_cache", True)
        for request_id, start, count, sampled in step.batch:
            request = requests.get(request_id)
            if request is not None and request.status == "running":  # not ended, nor preempted, while the step ran
                # Without a KV cache a sampled token means: begin again from the first.
                request.num_computed_tokens = start + count if keeps or not sampled else 0

    def _step_failed(self, e: Event) -> None:
        if self.steps:
            self.steps[-1].end_ns, self.steps[-1].error = e.t_ns, e.a

    def _blocks_allocated(self, e: Event) -> None:
        owners, places, name = self.block_owners, self.block_places, e.request_id
        request = self.requests.get(name)
        for index, block_id in enumerate(e.a, start=len(request.block_ids) if request else 0):
            owners[block_id] = [*owners[block_id], name] if block_id in owners else [name]
            places[block_id] = name, index
        if request:
            request.block_ids += e.a

    _blocks_shared = _blocks_allocated

    def _block_cached(self, e: Event) -> None:
        self.cached_blocks.update(dict.fromkeys(e.a if isinstance(e.a, list) else [e.a]))

    def _blocks_evicted(self, e: Event) -> None:
        for block_id in e.a:
            self.cached_blocks.pop(block_id, None)

    def _blocks_freed(self, e: Event) -> None:
        if request := self.requests.get(e.request_id):
            request.block_ids = []
        for block_id in e.a:
            owners = self.block_owners.get(block_id, ())
            if e.request_id in owners:
                if len(owners) == 1:
                    del self.block_owners[block_id]
                else:
                    at = owners.index(e.request_id)
                    self.block_owners[block_id] = owners[:at] + owners[at + 1:]

    def _tokens(self, e: Event) -> None:
        requests, times = self.requests, e.b or repeat(e.t_ns)
        for (request_id, token_id, text), t_ns in zip(e.a, times):
            if request := requests.get(request_id):
                request.token_ids.append(token_id)
                request.token_ns.append(t_ns)
                if text:
                    request.text += text

    def _step_profiled(self, e: Event) -> None:
        self.profile = {"step": e.step, "operations": e.a, **(e.b or {})}

    @staticmethod
    def _open_span(request: RequestState, kind: str, t_ns: int) -> bool:
        """Whether a span began: one of this kind that is open goes on."""
        last = request.spans[-1]
        if last.end_ns is None:
            if last.kind == kind:
                return False
            last.end_ns = t_ns
        request.spans.append(Span(kind, t_ns))
        return True


_HANDLERS = {kind: getattr(EngineState, f"_{kind}") for kind in KINDS}
