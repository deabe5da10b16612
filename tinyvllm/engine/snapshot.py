"""The present state of an engine, told as events: so that whoever begins to listen late knows as much as the others."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tinyvllm.engine.events import EventLog
from tinyvllm.engine.request import RequestStatus

if TYPE_CHECKING:
    from tinyvllm.engine.llm_engine import LLMEngine


def engine_config(engine: "LLMEngine") -> dict[str, int | str | bool]:
    """The options that a reader of events needs."""
    scheduler, manager = engine.scheduler, engine.kv_cache_manager
    return {"num_blocks": manager.pool.num_blocks, "block_size": manager.block_size,
            "max_num_seqs": scheduler.max_num_seqs, "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_model_len": engine.max_model_len, "scheduling_policy": scheduler.policy,
            "enable_prefix_caching": manager.enable_caching, "use_kv_cache": scheduler.use_kv_cache}


def emit_snapshot(engine: "LLMEngine", events: EventLog, again: bool = False) -> None:
    """Emit engine_config, and for all that is there the events that would have led to it.

    again: this log has been told the state before; whoever missed nothing since may pass all of this over.
    """
    told = list(_tell(engine))
    events.make_room(2 * len(told))  # who asked for it must find its beginning, and not ask for ever
    events.step = engine.num_steps
    events.emit("engine_config", None, engine_config(engine), len(told) if again else None)
    now_ns = time.perf_counter_ns()
    for t_ns, *event in told:
        events.emit_at(now_ns if t_ns is None else t_ns, *event)


def _tell(engine: "LLMEngine") -> Iterator[tuple]:
    """(t_ns or None for now, kind, request_id, a, b) of everything but the configuration. Times are the real ones."""
    manager = engine.kv_cache_manager
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        name, metrics = request.request_id, request.metrics
        yield _ns(metrics.arrival_time), "request_added", name, request.token_ids[:request.num_prompt_tokens], \
            request.max_len
        if request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED):
            is_preempted = request.status is RequestStatus.PREEMPTED
            yield _ns(metrics.first_scheduled_time), "request_scheduled", name, \
                [max(0, request.num_cached_tokens), request.num_computed_tokens], metrics.num_preemptions - is_preempted
            if is_preempted:
                yield None, "request_preempted", name, 0, None
        blocks = manager.block_ids(request)
        if blocks:
            yield None, "blocks_allocated", name, list(blocks), None
        if request.num_emitted_tokens:
            *earlier, last = request.output_token_ids[:request.num_emitted_tokens]
            tokens = *((name, token_id, "") for token_id in earlier), (name, last, engine.emitted_text(name))
            yield None, "tokens", None, tokens, [_ns(t) for t in request.token_times]
    if cached := manager.pool.cached_blocks:  # as one event: of hundreds of thousands a log would lose the first
        yield None, "block_cached", None, sorted(block.block_id for block in cached.values()), None


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
