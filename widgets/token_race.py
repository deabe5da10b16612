"""TokenRace: every running output as it streams, and the next token's choices under your own temperature."""

import traitlets

from widgets.panel import Panel
from widgets.topics.race import SHOWN


class TokenRace(Panel, script=("sampling.js", "race_bars.js", "token_race.js")):
    """The running outputs side by side, each with its latencies, and the bars of the selected request's next token.

    shown: how many requests have a card at once (1 to 60); the others are counted and can be picked from a list.
    temperature, top_k, top_p: what the bars show the effect of; None is what the request itself samples with. They
    change the picture, not the run. Clicking a bar runs on with that token, in a fork of the request.
    mode: "fork", both go on; "force", the old one ends.
    """

    shown = traitlets.Int(SHOWN, min=1, max=60).tag(sync=True)
    temperature = traitlets.Float(None, allow_none=True, min=0.0, max=100.0).tag(sync=True)
    top_k = traitlets.Int(None, allow_none=True, min=0).tag(sync=True)
    top_p = traitlets.Float(None, allow_none=True, min=0.0, max=1.0).tag(sync=True)
    mode = traitlets.Enum(("fork", "force"), "fork").tag(sync=True)
    height = traitlets.Int(460, min=40, max=4000).tag(sync=True)
