"""What the timeline asks for when somebody clicks: the batch of a step, the figures of a request."""

from typing import Any

from tinyvllm.engine.state import KEPT_REQUESTS, KEPT_STEPS
from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import answers
from widgets.figures import prefill_rows, spread


@answers("timeline_step")
def timeline_step(feed: Any, step: int) -> dict[str, Any]:
    """A step's batch: {"step", "begin", "end", "runner" (ms; None while it runs), "tokens", "budget",
    "errors": [text, ...] of attempts that failed, "rows": [[request, start, count, "prefill" or "decode", sampled],
    ...]}. Raises TinyVLLMError if it is not kept."""
    with feed.lock:
        state = feed.state
        attempts = [s for s in state.steps if s.step == step]  # one that failed is tried again under its number
        if not attempts:
            newest = state.steps[-1].step if state.steps else 0
            why = f"only the newest {KEPT_STEPS:,} are" if isinstance(step, int) and 0 < step <= newest else \
                f"there have been {newest:,} so far"
            raise TinyVLLMError(f"step {step} is not kept: {why}")
        found = attempts[-1]
        prefills = {row[0] for row in prefill_rows(found.batch, state.requests)}
        rows = [[request_id, start, count, "prefill" if request_id in prefills else "decode", bool(sampled)]
                for request_id, start, count, sampled in found.batch]
        return {"step": found.step, "begin": feed.ms(found.begin_ns),
                "end": None if found.end_ns is None else feed.ms(found.end_ns),
                "runner": None if found.runner_ns is None else found.runner_ns / 1e6, "tokens": found.num_tokens,
                "budget": state.config.get("max_num_batched_tokens"), "rows": rows,
                "errors": [attempt.error for attempt in attempts if attempt.error is not None]}


@answers("timeline_request")
def timeline_request(feed: Any, request: str) -> dict[str, Any]:
    """A request's figures, times in ms: {"request", "status", "prompt", "cached", "output", "preemptions", "waited",
    "ttft", "itl": {"count", "mean", "p50", "p95", "max"}}; what has not happened yet is None."""
    with feed.lock:
        found = feed.state.requests.get(request)
        if found is None:
            raise TinyVLLMError(f"request {request!r} is not known here: of those that have ended, the newest "
                                f"{KEPT_REQUESTS:,} are kept")
        waited = next((span.end_ns for span in found.spans if span.kind == "waiting"), None)
        itl = spread([ns / 1e6 for ns in found.itl_ns()])
        return {"request": found.request_id, "status": found.status, "prompt": found.num_prompt_tokens,
                "cached": found.num_cached_tokens, "output": len(found.token_ids),
                "preemptions": found.num_preemptions,
                "waited": None if waited is None else (waited - found.added_ns) / 1e6,
                "ttft": None if found.ttft_ns is None else found.ttft_ns / 1e6, "itl": itl}
