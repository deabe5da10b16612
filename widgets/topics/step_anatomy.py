"""The topic behind StepAnatomy: one step's batch and times, and the steps that were taken apart.

Ordinary events say who was in a step and how long the runner took. An event "step_profiled" adds time, bytes and flops
of every operation; it is emitted inside the step that it is about. Those that a log still holds are found again after a
page was reloaded or out of sight.
"""

from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tinyvllm.engine.events import Event, EventLog
from tinyvllm.engine.state import EngineState, StepState
from widgets.frames import Payload
from widgets.topics.base import Topic, register

KEPT_PROFILES = 48
LISTED_ROWS = 300  # requests of a batch that are sent one by one

_profiles: WeakKeyDictionary = WeakKeyDictionary()  # engine -> its steps that were taken apart


class Profiles:
    """The newest steps that were taken apart, from an engine's log."""

    def __init__(self, log: EventLog):
        self._log = log
        self._next_seq = 0
        self.found: deque[Event] = deque(maxlen=KEPT_PROFILES)

    def update(self, events: list[Event] | None = None) -> None:
        """Take in events; None: all that the log has and this has not."""
        if events is None:
            events = self._log.read(self._next_seq)[0]
        for event in events:
            if event[2] == "step_profiled" and event.seq >= self._next_seq:
                self.found.append(event)
        if events:
            self._next_seq = max(self._next_seq, events[-1].seq + 1)

    def until(self, step: StepState | None) -> list[Event]:
        """Those that belong to this step or one before it."""
        if step is None:
            return []
        end = float("inf") if step.end_ns is None else step.end_ns
        return [event for event in self.found if event.t_ns <= end]


@register
class StepAnatomyTopic(Topic):
    """name "step_anatomy"; no params. The step shown is selection.step, else the newest."""

    name = "step_anatomy"
    scrubbable = True

    def __init__(self, feed, **params: Any):
        super().__init__(feed, **params)
        self._profiles = self._of_source()
        self._told_profiles: tuple | None = None
        self._told_step: tuple | None = None

    def _of_source(self) -> Profiles:
        """The profiles of the engine that is shown now: a feed can change over to another."""
        source = self.feed.source
        if source not in _profiles:
            _profiles[source] = Profiles(source.events)
        return _profiles[source]

    def snapshot(self, state: EngineState) -> Payload:
        self._profiles = self._of_source()
        self._profiles.update()
        self._told_profiles = None
        return self._payload(state)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        self._profiles.update(events)
        if self._step_key(state) == self._told_step and self._profile_key(state) == self._told_profiles:
            return None
        return self._payload(state)

    def _steps(self, state: EngineState) -> tuple[StepState | None, StepState | None]:
        """The step to show, and the one before it."""
        wanted = self.feed.selection["step"]
        newest_first = reversed(state.steps)
        for step in newest_first:
            if wanted is None or step.step == wanted:
                return step, next(newest_first, None)
        return (state.steps[-1], None) if state.steps else (None, None)

    def _shown(self, state: EngineState) -> Event | None:
        """The profile to show: that of the selected step, if it was taken apart, else the newest."""
        found = self._found(state)
        if self.feed.selection["step"] is not None:
            step, _ = self._steps(state)
            for event in reversed(found):  # by time as well: after a reset the numbers begin again
                if event.step == step.step and step.begin_ns <= event.t_ns <= (step.end_ns or event.t_ns):
                    return event
        return found[-1] if found else None

    def _found(self, state: EngineState) -> list[Event]:
        return self._profiles.until(state.steps[-1] if state.steps else None)

    def _step_key(self, state: EngineState) -> tuple:
        step, newest = self._steps(state)[0], state.steps[-1] if state.steps else None
        return step and (step.step, step.begin_ns, step.end_ns), newest and newest.step

    def _profile_key(self, state: EngineState) -> tuple:
        shown = self._shown(state)
        return shown.seq if shown else -1, len(self._found(state))

    def _payload(self, state: EngineState) -> Payload:
        self._told_step = self._step_key(state)
        step, before = self._steps(state)
        data: dict[str, Any] = {"step": None if step is None else self._describe(state, step, before),
                                "newest": state.steps[-1].step if state.steps else None,
                                "oldest": state.steps[0].step if state.steps else None,
                                "budget": state.config.get("max_num_batched_tokens")}
        arrays: dict[str, np.ndarray] = {}
        key = self._profile_key(state)
        if key != self._told_profiles:
            self._told_profiles = key
            found, shown = self._found(state), self._shown(state)
            data["profiles"] = [self._totals(state, event) for event in found]
            data["shown"], arrays = (None, {}) if shown is None else _operations(shown)
            data["roofs"] = next((event.b["ceilings"] for event in reversed(found) if "ceilings" in (event.b or {})),
                                 None)
        return Payload(data, arrays)

    def _describe(self, state: EngineState, step: StepState, before: StepState | None) -> dict[str, Any]:
        rows = [[request_id, start, count, int(sampled), _kind(state, request_id, start, count)]
                for request_id, start, count, sampled in step.batch[:LISTED_ROWS]]
        return {"step": step.step, "tokens": step.num_tokens, "rows": rows, "requests": len(step.batch),
                "begin": self.feed.ms(step.begin_ns), "error": step.error,
                "runner": None if step.runner_ns is None else step.runner_ns / 1e6,
                "took": None if step.end_ns is None else (step.end_ns - step.begin_ns) / 1e6,
                "before": None if before is None or before.end_ns is None else (step.begin_ns - before.end_ns) / 1e6}

    def _totals(self, state: EngineState, event: Event) -> dict[str, Any]:
        """One step as a dot on the roofline."""
        numbers = np.array([row[2:5] for row in event.a], np.float64).reshape(-1, 3).sum(axis=0)
        about = event.b or {}
        step = next((s for s in reversed(state.steps) if s.step == event.step and s.begin_ns <= event.t_ns), None)
        kinds = {_kind(state, request_id, start, count) for request_id, start, count, _ in step.batch} if step else (
            {"decode"} if about.get("tokens") == about.get("requests") else {"prefill"})
        return {"step": event.step, "seq": event.seq, "kind": kinds.pop() if len(kinds) == 1 else "mixed",
                "tokens": about.get("tokens"), "requests": about.get("requests"),
                "ns": numbers[0], "bytes": numbers[1], "flops": numbers[2]}


def _kind(state: EngineState, request_id: str, start: int, count: int) -> str:
    """"prefill" or "decode": whether these tokens are the prompt's (or are computed again), or a new one."""
    request = state.requests.get(request_id)
    is_decode = count == 1 and (request is None or start >= request.num_prompt_tokens)
    return "decode" if is_decode else "prefill"


def _operations(event: Event) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A profile by operation: names in order of their first call; ns float64 [operations, layers + 1], the last
    column outside the layers; bytes, flops float64 [operations], calls int32 [operations]."""
    names = list(dict.fromkeys(row[0] for row in event.a))
    layers = max((row[1] for row in event.a), default=-1) + 1
    number = {name: i for i, name in enumerate(names)}
    ns, totals = np.zeros((len(names), layers + 1)), np.zeros((len(names), 2))
    calls = np.zeros(len(names), np.int32)
    for name, layer, took, num_bytes, flops in event.a:
        ns[number[name], layer if layer >= 0 else layers] += took
        totals[number[name]] += num_bytes, flops
        calls[number[name]] += 1
    about = event.b or {}
    data = {"step": event.step, "names": names, "layers": layers, "device": about.get("device"),
            "clock": about.get("clock"), "tokens": about.get("tokens"), "requests": about.get("requests")}
    return data, {"ns": ns, "bytes": totals[:, 0], "flops": totals[:, 1], "calls": calls}
