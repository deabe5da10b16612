"""SchedulerTimeline: who was computed when, and why the others waited. SchedulerComparison: two runs, one time axis."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import traitlets

from tinyvllm.engine.trace import Trace
from widgets.comparison import as_text, compare
from widgets.panel import Panel


class SchedulerTimeline(Panel, script=("timeline_model.js", "timeline_draw.js", "timeline_details.js",
                                       "scheduler_timeline.js")):
    """A Gantt chart of a run as it grows: steps above, requests below.

    A request's bar shows its waiting, each chunk of its prefill, its decoding, its preemptions and its end. The strip
    above has a column for every step: as wide as the step took, as high as its tokens, against the token budget.
    Click a step for its batch and a request for its TTFT and ITL; drag the scale at the top to look back in time.

    axis: "time", or "steps" where every step is as wide as any other and time between steps takes no room: for runs
    that are slowed down or stepped by hand. window: how much of the axis is in view at first (milliseconds, or steps);
    None for 3,000 ms or 60 steps. follow: whether the view moves along with the run.
    """

    axis = traitlets.Enum(("time", "steps"), "time").tag(sync=True)
    window = traitlets.Float(None, allow_none=True, min=0.001).tag(sync=True)
    follow = traitlets.Bool(True).tag(sync=True)
    height = traitlets.Int(360, min=40, max=4000).tag(sync=True)


class SchedulerComparison(Panel, script=("timeline_draw.js", "scheduler_comparison.js")):
    """Recorded runs of the same arrivals one above the other, on one axis.

        SchedulerComparison({"static": trace, "continuous": other_trace})

    Each run shows its seats (max_num_seqs), who sat on them, and, striped, the seats that stood empty: red while
    somebody was waiting. Below are idle area, TTFT, ITL, total time and tokens a second; `figures` has them all.

    traces: name -> Trace, or the path of one. source: an engine or feed whose selection it shares; None: its own.
    axis: "steps", which come out the same each time, or "time"; None: steps where all runs were driven by steps.
    Raises TinyVLLMError for a run without requests.
    """

    axis = traitlets.Enum(("time", "steps")).tag(sync=True)
    figures = traitlets.Dict({}).tag(sync=True)
    height = traitlets.Int(360, min=40, max=4000).tag(sync=True)

    def __init__(self, traces: Mapping[str, Trace | str | Path], source: Any = None, *, axis: str | None = None,
                 **traits: Any):
        figures = compare(traces)
        super().__init__(source, figures=figures, axis=axis or figures["unit"], summary=as_text(figures), **traits)
