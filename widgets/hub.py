"""The hub: the one connection between a feed and all of its panels in the page.

It draws nothing. Frames go out through it, one message for all panels, and everything the page says comes in: a view is
ready, a frame is drawn, a question, a command. What must survive a reload of the page is a trait (the selection, the
cursor, what the lens looks at); all else is told again when a view says `ready`.
"""

from collections.abc import Callable
from numbers import Integral
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


def checked_selection(what: dict[str, Any]) -> dict[str, Any]:
    """What a notebook selects, in the types that the page knows. Raises ValueError."""
    unknown = sorted(set(what) - set(SELECTION))
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r} to select: it can be {', '.join(SELECTION)}")
    checked = {}
    for name, value in what.items():
        is_number = isinstance(value, Integral) and not isinstance(value, bool) and value >= 0
        if name == "request" and not (value is None or isinstance(value, str)):
            raise ValueError(f"a request is selected by its id, which is text, got {value!r}")
        if name != "request" and not (value is None or is_number):
            raise ValueError(f"a {name} is selected by its number, 0 or more, or None for none, got {value!r}")
        checked[name] = int(value) if is_number else value
    return checked
