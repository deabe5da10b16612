"""What every panel is: an anywidget whose module is kit.js and draw.js, then its own file.

A module in a notebook cannot import a file beside it, and nothing here comes from the network, so the shared code is
put in front of each panel's own. `static/*.js` is plain JavaScript: no bundler, nothing generated.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from ipywidgets.widgets.widget import widget_serialization

from widgets.feed import Feed

STATIC = Path(__file__).parent / "static"
SHARED = ("kit.js", "draw.js")


@lru_cache
def module(*names: str) -> str:
    """The text of a panel's ES module: the shared files, then static/<name> for each name."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in (*SHARED, *names))


@lru_cache
def stylesheet() -> str:
    """The panels' CSS, on JupyterLab's own variables."""
    return (STATIC / "kit.css").read_text(encoding="utf-8")


class Panel(anywidget.AnyWidget):
    """Base of all panels.

    source: a LiveEngine, a ReplayEngine, a Feed, or None where a panel can do without an engine.
    scale: 1.0 for a desk, about 2 for a projector. height: of the drawing, in CSS pixels at scale 1.
    """

    hub = traitlets.Instance(anywidget.AnyWidget).tag(sync=True, **widget_serialization)
    scale = traitlets.Float(1.0, min=0.5, max=4.0).tag(sync=True)
    height = traitlets.Int(320, min=40, max=4000).tag(sync=True)
    summary = traitlets.Unicode("").tag(sync=True)  # what a screen reader is told; also the plain-text output

    def __init_subclass__(cls, script: str | tuple[str, ...] | None = None, **kwargs: Any):
        if script is not None:
            cls._esm = module(*([script] if isinstance(script, str) else script))
            cls._css = stylesheet()
        super().__init_subclass__(**kwargs)

    def __init__(self, source: Any = None, **traits: Any):
        unknown = sorted(name for name in traits if name not in self.trait_names())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {unknown[0]!r}")
        for name, value in traits.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} of a {type(self).__name__} must be a finite number, got {value}")
        self.feed = Feed.of(source)
        super().__init__(hub=self.feed.hub, **traits)

    def __repr__(self) -> str:
        return self.summary or f"{type(self).__name__} (run this notebook to see it move)"
