"""ControlBar: run, pause, step, stop, reset, speed, policy, arrivals, recording and replay."""

from collections.abc import Iterable
from typing import Any

import traitlets

from tinyvllm.sampling_params import SamplingParams
from widgets.controls import Controls
from widgets.panel import Panel


class ControlBar(Panel, script="control_bar.js"):
    """Drives a LiveEngine, or a ReplayEngine as far as a recorded run can be driven.

        ControlBar(live, prompts=["Tell me a story about a fox."], sampling_params=SamplingParams(max_tokens=80))

    prompts: what arrivals and bursts ask for, one after the other and round again: texts (a user's message each, where
    the model has a chat template), conversations, or lists of token ids; by default, requests for fables.
    sampling_params: for them; without a seed each gets its number as one, so the same traffic gives the same texts.
    options: whether scheduling, cache and recording are unfolded.
    Keys, while the bar has the focus: space runs and pauses, right arrow steps, Esc stops.
    """

    options = traitlets.Bool(False).tag(sync=True)

    def __init__(self, source: Any = None, *, prompts: Iterable[Any] | None = None,
                 sampling_params: SamplingParams | None = None, **traits: Any):
        super().__init__(source, **traits)
        Controls.of(self.feed).use(prompts, sampling_params)
