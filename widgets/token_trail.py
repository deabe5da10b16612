"""TokenTrail: from text to token ids, merge by merge, and from a token id on into the engine's memory."""

import traitlets

from widgets.panel import Panel


class TokenTrail(Panel, script=("trail_merges.js", "trail_path.js", "token_trail.js")):
    """A text as coloured tokens; how the selected one came to be; where it goes.

    text: what is in the text field, which can be typed in. mode: "text", the text as a prompt; "chat", as a message in
    the model's chat template; "request", the tokens of the request that is selected, as they come.
    """

    text = traitlets.Unicode("Tell me a story about a fox and a lantern.").tag(sync=True)
    mode = traitlets.Enum(("text", "chat", "request"), "text").tag(sync=True)
    height = traitlets.Int(150, min=40, max=4000).tag(sync=True)
