"""AttentionScope: what every head of every layer looks at, while the tokens are being made."""

import traitlets

from widgets.panel import Panel


class AttentionScope(Panel, script=("attention_map.js", "attention_arithmetic.js", "attention_scope.js")):
    """All heads as thumbnails, one large, and the arithmetic of any of its weights with every number.

    Rows arrive as tokens are computed. Shown is selection.request, or with none selected the request that runs: the
    panel stays with it until it has ended, and takes the next that begins. The head in focus is selection.layer and
    selection.head, the row selection.token; all are shared with the other panels of this feed.

    While the panel can be seen, the engine keeps the queries of that one request (one copy a layer) and computes rows
    for the picture between its steps, at most eight times a second for four milliseconds.
    """

    height = traitlets.Int(460, min=200, max=4000).tag(sync=True)
