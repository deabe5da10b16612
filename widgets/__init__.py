"""Views into a running engine: anywidget panels for JupyterLab, fed by the engine's events.

    from tinyvllm import LLM, LiveEngine
    from widgets import ControlBar, SchedulerTimeline

    live = LiveEngine(LLM("demo"))
    display(ControlBar(live), SchedulerTimeline(live))

Every panel takes a LiveEngine, a ReplayEngine (a recorded run) or a Feed; panels of one engine share one feed and one
selection: request, token, layer, head, block, step.
"""

import importlib

_WHERE = {
    "AttentionScope": "attention_scope", "BitLens": "bit_lens", "ControlBar": "control_bar", "Dashboard": "dashboard",
    "Feed": "feed", "KVBlockMap": "kv_block_map", "SchedulerComparison": "scheduler_timeline",
    "SchedulerTimeline": "scheduler_timeline", "StepAnatomy": "step_anatomy", "TensorFile": "tensor_file",
    "TokenRace": "token_race", "TokenTrail": "token_trail",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"widgets has no {name!r}; there are {', '.join(__all__)}")
    return getattr(importlib.import_module(f"widgets.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
