"""The hub: the one connection between a feed and all of its panels in the page.

It draws nothing. Frames go out through it, one message for all panels, and everything the page says comes in: a view is
ready, a frame is drawn, a question, a command. What must survive a reload of the page is a trait (the selection, the
cursor, what the lens looks at); all else is told again when a view says `ready`.
"""

from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

SELECTION = {"request": None, "token": None, "layer": 0, "head": 0, "block": None, "step": None}


class Hub(anywidget.AnyWidget):
    """selection: what is selected in every panel at once. cursor: milliseconds into the run that past panels show, or
    None for now. inspected: the address of the one value that BitLens shows, {} for none (see answers/inspect.py)."""

    _esm = "export default { render({ el }) { el.style.display = 'none'; } };"
    selection = traitlets.Dict(SELECTION).tag(sync=True)
    cursor = traitlets.Float(None, allow_none=True).tag(sync=True)
    inspected = traitlets.Dict({}).tag(sync=True)

    def listen(self, handler: Callable[[dict[str, Any]], None]) -> None:
        """Call handler(message) for everything that the page says."""
        self.on_msg(lambda _, content, __: handler(content))
