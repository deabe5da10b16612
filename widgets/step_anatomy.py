"""StepAnatomy: one step of the engine taken apart, down to the operations and the machine's limits."""

import traitlets

from widgets.panel import Panel


class StepAnatomy(Panel, script=("roofline.js", "step_draw.js", "step_anatomy.js")):
    """Who was in a step, what the host and the runner took; on request, every operation with its time, bytes and flops.

    "take the next step apart" has the next step run operation by operation with a clock around each: the same tokens,
    but the step takes several times as long. Each such step becomes a dot on the machine's roofline. The step shown is
    selection.step, else the newest.
    """

    height = traitlets.Int(380, min=200, max=4000).tag(sync=True)
