"""Two or more recorded runs of the same arrivals, measured alike: idle seats, TTFT, ITL, total time, tokens a second.

Everything is measured twice: in milliseconds, as it happened to be on that machine, and in steps, which come out the
same each time. A run that was driven by steps (run_arrivals) may have had nobody to serve for a while: then time passed
without steps, and its trace says where; those count as well.

    seats   max_num_seqs. A request sits from its admission to its end or its preemption.
    idle    seats times time, less what was sat on: from the first arrival to the end of the last request.
    wasted  the part of idle in which somebody was waiting
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyvllm.engine.state import EngineState, RequestState
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from widgets.figures import spread

SEATED = ("prefill", "decode")
Interval = tuple[float, float]


class Clock:
    """From a run's time stamps to the two scales. steps: of a whole state; idle_steps: see run_arrivals."""

    def __init__(self, state: EngineState, idle_steps: list[list[int]], origin_ns: int):
        self.begins = [step.begin_ns for step in state.steps]
        self.ends = [end for step in state.steps if (end := step.end_ns) is not None]
        self.origin_ns = origin_ns
        self._places, passed, idle = [], 0, dict(map(tuple, idle_steps))
        for number, step in enumerate(state.steps):
            passed += idle.pop(step.step, 0)
            self._places.append(number + passed)

    def before(self, t_ns: int) -> int:
        """The place in steps of what then waits for the next step to begin."""
        i = bisect_left(self.begins, t_ns)
        return self._places[i] if i < len(self._places) else self.after(t_ns)

    def after(self, t_ns: int) -> int:
        """The place in steps of what comes out of the last step that has ended by then."""
        i = bisect_right(self.ends, t_ns)
        return self._places[i - 1] + 1 if i else 0

    def ms(self, t_ns: int) -> float:
        return (t_ns - self.origin_ns) / 1e6


def sweep(seated: list[Interval], waiting: list[Interval], seats: int, begin: float, end: float) -> dict[str, float]:
    """{"area", "idle", "wasted"} between two times: seats times time; that without a sitter; that while some waited."""
    changes = sorted([(at, i, by) for i, intervals in enumerate((seated, waiting)) for a, b in intervals
                      for at, by in ((a, 1), (b, -1))])
    counts, last, idle, wasted = [0, 0], begin, 0.0, 0.0
    for at, which, by in [*changes, (end, 0, 0)]:
        until = min(max(at, begin), end)
        empty = (seats - counts[0]) * (until - last)
        idle += empty
        wasted += empty if counts[1] else 0.0
        last, counts[which] = until, counts[which] + by
    return {"area": seats * (end - begin), "idle": idle, "wasted": wasted}


def measure(trace: Trace) -> dict[str, Any]:
    """All figures of one run, and what is drawn of it. Raises TinyVLLMError for a run without requests."""
    state = EngineState(kept_steps=None, kept_requests=None)
    for event in trace.events:
        state.apply(event)
    requests = sorted(state.requests.values(), key=lambda r: r.added_ns)
    if not requests or not state.steps:
        raise TinyVLLMError("there is nothing to compare in this run: it has no requests, or no steps")
    seats, last_ns = state.config["max_num_seqs"], trace.events[-1].t_ns
    clock = Clock(state, trace.metadata.get("idle_steps", []), requests[0].added_ns)
    tokens = sum(len(request.token_ids) for request in requests)
    end_ns = max(request.finished_ns or last_ns for request in requests)
    found: dict[str, Any] = {
        "seats": seats, "requests": len(requests), "tokens": tokens, "num_steps": len(state.steps),
        "policy": state.config.get("scheduling_policy"), "budget": state.config.get("max_num_batched_tokens"),
        "preemptions": sum(r.num_preemptions for r in requests), "cached": sum(r.num_cached_tokens for r in requests)}
    scales = {"steps": (clock.before, clock.after), "time": (clock.ms, clock.ms)}
    for scale, (before, after) in scales.items():
        seated, waiting = _intervals(requests, before, after, last_ns)
        begin, end = before(requests[0].added_ns), after(end_ns)
        ttft = [after(r.token_ns[0]) - before(r.added_ns) for r in requests if r.token_ns]
        itl = [after(b) - after(a) for r in requests for a, b in zip(r.token_ns, r.token_ns[1:])]
        found[scale] = {"begin": begin, "end": end, "total": end - begin, "ttft": spread(ttft), "itl": spread(itl),
                        "tokens_per_unit": tokens / (end - begin) if end > begin else None,
                        "waiting": _levels(waiting), **sweep(seated, waiting, seats, begin, end)}
    found["time"]["tokens_per_second"] = 1000 * (found["time"]["tokens_per_unit"] or 0)
    found["bars"] = _bars(requests, scales, last_ns)
    found["arrivals"] = [{"id": r.request_id, "prompt": r.num_prompt_tokens, "steps": clock.before(r.added_ns),
                          "time": clock.ms(r.added_ns)} for r in requests]
    return found


def compare(traces: Mapping[str, Trace | str | Path]) -> dict[str, Any]:
    """{"runs": [{"name", ...figures}, ...], "unit": "steps" or "time", "warning": text or None}.

    traces: name -> Trace, or the path of one. Raises TinyVLLMError for no runs, TraceError for a file that is none.
    """
    if not isinstance(traces, Mapping) or not traces:
        raise TinyVLLMError('give the runs by name: SchedulerComparison({"static": trace, "continuous": trace})')
    loaded = {str(name): trace if isinstance(trace, Trace) else Trace.load(trace) for name, trace in traces.items()}
    runs = [{"name": name, **measure(trace)} for name, trace in loaded.items()]
    asked = [{(a["id"], a["prompt"]) for a in run["arrivals"]} for run in runs]
    warning = None
    if any(other != asked[0] for other in asked[1:]):
        warning = "These runs did not serve the same requests: their figures are of different work."
    by_steps = all(trace.metadata.get("unit") == "steps" for trace in loaded.values())
    return {"runs": runs, "unit": "steps" if by_steps else "time", "warning": warning}


def as_text(compared: dict[str, Any]) -> str:
    """The figures as a table of plain text, in steps."""
    row = "{:<24}{:>8}{:>7}{:>11}{:>7}{:>10}{:>6}{:>13}".format
    lines = [row("in steps", "total", "idle", "TTFT mean", "p95", "ITL mean", "p95", "tokens/step")]
    for run in compared["runs"]:
        s = run["steps"]
        numbers = (s["ttft"]["mean"], s["ttft"]["p95"], s["itl"]["mean"], s["itl"]["p95"], s["tokens_per_unit"])
        lines.append(row(run["name"][:19], s["total"], f"{s['idle'] / s['area']:.0%}", *map(_number, numbers)))
    return "\n".join(lines)


# ---- details ----


def _intervals(requests: list[RequestState], before: Any, after: Any, last_ns: int) -> tuple[list, list]:
    """(when requests sat, when they waited), of each span one interval."""
    seated, waiting = [], []
    for request in requests:
        for span in request.spans:
            # Waiting ends, and a seat is taken, where the next step begins.
            ends = after if span.kind in SEATED else before
            interval = before(span.start_ns), ends(last_ns if span.end_ns is None else span.end_ns)
            (seated if span.kind in SEATED else waiting).append(interval)
    return seated, waiting


def _levels(intervals: list[Interval]) -> list[list[float]]:
    """[[from when, how many], ...] of overlapping intervals."""
    change: dict[float, int] = {}
    for begin, end in intervals:
        change[begin] = change.get(begin, 0) + 1
        change[end] = change.get(end, 0) - 1
    levels, count = [], 0
    for at in sorted(change):
        if change[at]:
            count += change[at]
            levels.append([at, count])
    return levels


def _bars(requests: list[RequestState], scales: dict[str, tuple], last_ns: int) -> list[dict[str, Any]]:
    """Each stay of a request on a seat: {"id", "seat", "end" (its finish reason, "preempted" or "running"),
    "steps" and "time": [begin, first decode, end]}. A seat is the lowest that is free."""
    stays = []
    for request in requests:
        stay = None
        for span in request.spans:
            if span.kind not in SEATED:
                stay = None
                continue
            if stay is None:
                stay = {"id": request.request_id, "end": "preempted", "from": span.start_ns, "decode": None}
                stays.append(stay)
            if span.kind == "decode" and stay["decode"] is None:
                stay["decode"] = span.start_ns
            stay["to"] = last_ns if span.end_ns is None else span.end_ns
        if stay is not None:
            stay["end"] = request.status
    free_from: list[int] = []  # of each seat
    bars = []
    for stay in sorted(stays, key=lambda stay: stay["from"]):
        seat = next((i for i, ns in enumerate(free_from) if ns <= stay["from"]), len(free_from))
        free_from[seat:seat + 1] = [stay["to"]]
        bars.append({"id": stay["id"], "seat": seat, "end": stay["end"]})
        for scale, (before, after) in scales.items():
            end = after(stay["to"])
            decode = end if stay["decode"] is None else before(stay["decode"])
            bars[-1][scale] = [before(stay["from"]), min(decode, end), end]
    return bars


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
