"""The present state of an engine, told as events: so that whoever begins to listen late knows as much as the others."""

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


def emit_snapshot(engine: "LLMEngine", events: EventLog) -> None:
    """Emit engine_config, and for all that is there the events that would have led to it."""
    manager = engine.kv_cache_manager
    events.step = engine.num_steps
    events.emit("engine_config", None, engine_config(engine))
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        events.emit("request_added", request.request_id, request.num_prompt_tokens, request.max_len)
        blocks = manager.block_ids(request)
        if blocks:
            events.emit("blocks_allocated", request.request_id, list(blocks))
        for token_id in request.output_token_ids:
            events.emit("token", request.request_id, token_id, "")
        if request.status is RequestStatus.RUNNING:
            events.emit("request_scheduled", request.request_id, request.num_computed_tokens,
                        request.metrics.num_preemptions)
        elif request.status is RequestStatus.PREEMPTED:
            events.emit("request_preempted", request.request_id, 0)
    for block in manager.pool.blocks:
        if block.block_hash is not None:
            events.emit("block_cached", None, block.block_id, None)
