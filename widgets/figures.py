"""The figures of serving, from what the events told: TTFT, ITL and how they spread. Times in nanoseconds, or in steps.

    TTFT   time to first token: from a request's arrival to its first token
    ITL    inter-token latency: from one token of a request to its next
"""

import math
from collections.abc import Iterable, Sequence

from tinyvllm.engine.state import RequestState


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest of the values that at least `percent` of them do not exceed (nearest rank); None for no values."""
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent!r}")
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else None


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """{"count", "mean", "p50", "p95", "max"} of some values; all but the count None if there are none."""
    mean = sum(values) / len(values) if values else None
    return {"count": len(values), "mean": mean, "p50": percentile(values, 50), "p95": percentile(values, 95),
            "max": max(values, default=None)}


def prefill_rows(batch: Sequence[Sequence], requests: dict[str, RequestState]) -> list[Sequence]:
    """The rows of a step's batch ([request_id, start, count, sampled]) that compute more than a request's newest token.

    Chunks of prompts, and of what is computed again after a preemption; the other rows are decodes.
    """
    return [row for row in batch if row[2] > 1 or (row[0] in requests and row[1] < requests[row[0]].num_prompt_tokens)]
