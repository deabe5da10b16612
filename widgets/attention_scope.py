"""AttentionScope: what every head of every layer looks at, while the tokens are being made."""

from typing import Any

import traitlets

from widgets.panel import Panel
from widgets.topics.attention import watch_ahead

SCRIPTS = ("attention_map.js", "attention_draw.js", "attention_arithmetic.js", "attention_scope.js")


class AttentionScope(Panel, script=SCRIPTS):
    """All heads as thumbnails, one large, and the arithmetic of any of its weights with every number.

    Rows arrive as tokens are computed. Shown is selection.request, or with none selected the request that runs: the
    panel stays with it until it has ended, and takes the next that begins. The head in focus is selection.layer and
    selection.head, the row selection.token; all are shared with the other panels of this feed.

    While the panel can be seen, the engine keeps the queries of that one request (one copy a layer) and computes rows
    for the picture between its steps, at most eight times a second and for about four milliseconds.
    """

    height = traitlets.Int(460, min=200, max=4000).tag(sync=True)

    def __init__(self, source: Any = None, **traits: Any):
        super().__init__(source, **traits)
        if self.feed.source is not None:
            watch_ahead(self.feed.source)
