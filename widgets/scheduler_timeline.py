"""SchedulerTimeline: who was computed when, and why the others waited. SchedulerComparison: two runs, one time axis."""

import traitlets

from widgets.panel import Panel


class SchedulerTimeline(Panel, script=("timeline_model.js", "timeline_draw.js", "scheduler_timeline.js")):
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
