"""Every panel of one run on one page: what a lecturer opens with."""

from typing import Any

import ipywidgets as W

from widgets.attention_scope import AttentionScope
from widgets.bit_lens import BitLens
from widgets.control_bar import ControlBar
from widgets.feed import Feed
from widgets.kv_block_map import KVBlockMap
from widgets.panel import Panel
from widgets.scheduler_timeline import SchedulerTimeline
from widgets.step_anatomy import StepAnatomy
from widgets.tensor_file import TensorFile
from widgets.token_race import TokenRace
from widgets.token_trail import TokenTrail

# Rows of panels, each half a page wide or, alone in its row, a whole one.
ROWS = ((ControlBar,), (SchedulerTimeline,), (KVBlockMap, TokenRace), (AttentionScope, StepAnatomy), (TokenTrail,),
        (TensorFile, BitLens))
NARROWEST = 520  # CSS pixels at scale 1: below twice this, a row's panels stand one under the other


class Dashboard(W.VBox):
    """All panels of an engine, sharing one feed and one selection.

    source: a LiveEngine, a ReplayEngine or a Feed. scale: 1.0 for a desk, about 2 for a projector.
    panels: only these, by their names; the default is all of them (of a recorded run all but TensorFile: it has none).
    `dashboard["KVBlockMap"]` is the panel of that name.
    """

    def __init__(self, source: Any, *, scale: float = 1.0, panels: list[str] | tuple[str, ...] | None = None):
        self.feed = Feed.of(source)
        names = [panel.__name__ for row in ROWS for panel in row]
        engine = self.feed.source
        is_recorded = engine is not None and not hasattr(engine, "llm")
        usual = [name for name in names if not (is_recorded and name == "TensorFile")]
        chosen = usual if panels is None else [panels] if isinstance(panels, str) else list(panels)
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ValueError(f"there is no panel {unknown[0]!r}; there are {', '.join(names)}")
        self._panels: dict[str, Panel] = {}
        rows = []
        for row in ROWS:
            made = [panel(self.feed, scale=scale) for panel in row if panel.__name__ in chosen]
            self._panels.update({type(panel).__name__: panel for panel in made})
            if made:
                rows.append(W.Box(made, layout=_side_by_side(scale) if len(made) > 1 else _whole()))
        super().__init__(rows, layout=W.Layout(width="100%"))

    def __getitem__(self, name: str) -> Panel:
        return self._panels[name]

    def set_scale(self, scale: float) -> None:
        """Make everything larger or smaller at once."""
        for panel in self._panels.values():
            panel.scale = scale
        for row in self.children:
            if len(row.children) > 1:
                row.layout = _side_by_side(scale)


def _whole() -> W.Layout:
    return W.Layout(width="100%", display="block")


def _side_by_side(scale: float) -> W.Layout:
    narrowest = int(NARROWEST * scale)
    return W.Layout(width="100%", display="grid", grid_gap="0 8px",
                    grid_template_columns=f"repeat(auto-fit, minmax(min(100%, {narrowest}px), 1fr))")
