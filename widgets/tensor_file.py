"""TensorFile: a model's safetensors file to scale, from the whole file down to the bits of one weight."""

import uuid
from pathlib import Path
from typing import Any

import traitlets

from tinyvllm.errors import TinyVLLMError
from widgets.answers.tensor_file import OPENED
from widgets.feed import Feed
from widgets.model_files import ModelFiles
from widgets.panel import Panel


class TensorFile(Panel, script=("formats.js", "byte_ruler.js", "heat_map.js", "tensor_file.js")):
    """The real file behind a model: header length, JSON header, tensors; each tensor down to its bytes.

    source: a LiveEngine, whose model it shows; a Feed; or the path of a safetensors file, a folder, a hub id or "demo".
    path: what to show instead of the engine's own model. Clicked values open in every BitLens of the same feed.
    file: which of several files. tensor, row, column: what is selected (see `select`), also by clicking.
    """

    key = traitlets.Unicode("").tag(sync=True)  # what the page calls the opened model
    file = traitlets.Unicode("").tag(sync=True)
    tensor = traitlets.Unicode("").tag(sync=True)
    row = traitlets.Int(0, min=0).tag(sync=True)
    column = traitlets.Int(0, min=0).tag(sync=True)

    def __init__(self, source: Any = None, path: str | Path | None = None, **traits: Any):
        if isinstance(source, (str, Path)):
            if path is not None:
                raise TinyVLLMError("give the path once: TensorFile(path), or TensorFile(live, path)")
            source, path = None, source
        source = Feed.of(source)
        engine = source.source
        if path is None:
            if engine is not None and not hasattr(engine, "llm"):
                raise TinyVLLMError("a recorded run has no model file: say which one, TensorFile(replay, path)")
            path = "demo" if engine is None else engine.llm.model_path
        self.files = ModelFiles(path)  # before the widget opens, since a page may ask at once
        traits.setdefault("key", uuid.uuid4().hex)
        OPENED[traits["key"]] = self.files
        super().__init__(source, **traits)
        self._summarise()

    def select(self, tensor: str, row: int = 0, column: int = 0) -> None:
        """Show one element of a tensor of the open file, and what is around it."""
        with self.hold_sync():  # the page hears of all three at once
            self.tensor, self.row, self.column = tensor, row, column

    @traitlets.observe("file", "tensor", "row", "column")
    def _summarise(self, _: Any = None) -> None:
        where = f", {self.tensor} [{self.row}, {self.column}]" if self.tensor else ""
        self.summary = f"TensorFile: {self.files.path}{' ' + self.file if self.file else ''}{where}"
