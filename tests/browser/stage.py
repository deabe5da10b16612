"""A stage: real panels and a real feed in a real Chromium, without JupyterLab in between.

    with Stage() as stage:
        feed = stage.feed(live)
        stage.show(SchedulerTimeline(feed))
        stage.until(lambda: feed.stats.frames > 5)
        stage.page.screenshot(path="timeline.png")

It plays the part of the widget manager: traits and messages travel between Python and a page that knows nothing but
the panel's own module. Fast enough for a test of each claim; the notebooks are tested in a real JupyterLab as well.
"""

import base64
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page

from tests.browser.chromium import PATIENCE_S, shared_browser
from widgets.feed import Feed
from widgets.hub import Hub
from widgets.panel import Panel

THEMES = {
    "light": {"--jp-layout-color0": "#ffffff", "--jp-layout-color1": "#ffffff", "--jp-layout-color2": "#eeeeee",
              "--jp-ui-font-color1": "rgba(0,0,0,0.87)", "--jp-ui-font-color2": "rgba(0,0,0,0.54)",
              "--jp-border-color1": "#bdbdbd", "--jp-border-color2": "#e0e0e0", "--jp-brand-color1": "#1976d2"},
    "dark": {"--jp-layout-color0": "#111111", "--jp-layout-color1": "#212121", "--jp-layout-color2": "#424242",
             "--jp-ui-font-color1": "rgba(255,255,255,1)", "--jp-ui-font-color2": "rgba(255,255,255,0.7)",
             "--jp-border-color1": "#616161", "--jp-border-color2": "#424242", "--jp-brand-color1": "#2196f3"},
}

PAGE = """<!doctype html><html><head><title>stage</title><style id="theme"></style><style id="css"></style></head>
<body data-jp-theme-name="JupyterLab Light" data-jp-theme-light="true"><script>
window.outbox = []; window.models = {}; window.ends = {};
class Model {
  constructor(id, traits) { this.id = id; this.traits = traits; this.handlers = {}; this.dirty = {};
    this.widget_manager = { get_model: async (key) => window.models[key] }; }
  get(name) { return this.traits[name]; }
  set(name, value) { this.traits[name] = value; this.dirty[name] = value; this.fire("change:" + name); }
  save_changes() { outbox.push({ model: this.id, traits: this.dirty }); this.dirty = {}; }
  on(event, f) { (this.handlers[event] ??= []).push(f); }
  off(event, f) { this.handlers[event] = (this.handlers[event] || []).filter((g) => f && g !== f); }
  fire(event, ...args) { for (const f of this.handlers[event] || []) f(...args); }
  send(content) { outbox.push({ model: this.id, content }); }
  update(traits) {
    for (const [name, value] of Object.entries(traits)) { this.traits[name] = value; this.fire("change:" + name); }
  }
}
window.addModel = (id, traits) => { models[id] = new Model(id, traits); };
window.mount = async (id, esm) => {
  const url = URL.createObjectURL(new Blob([esm], { type: "text/javascript" }));
  const module = await import(url);
  const el = document.createElement("div");
  el.id = id; document.body.append(el);
  const model = models[id];
  await module.default.initialize?.({ model });
  ends[id] = await module.default.render({ model, el });
};
window.unmount = (id) => { ends[id]?.(); document.getElementById(id).remove(); };
window.deliver = (id, content, buffers) => {
  const views = buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
  models[id].fire("msg:custom", content, views);
};
window.takeOutbox = () => outbox.splice(0);
</script></body></html>"""


class StageHub(Hub):
    """A hub whose messages wait until the stage carries them over."""

    def __init__(self):
        super().__init__()
        self.outgoing: deque = deque()
        self.handler: Callable[[dict], None] | None = None
        self.observe(lambda change: self.outgoing.append(("traits", {change["name"]: change["new"]}, None)),
                     ["selection", "cursor", "inspected"])

    def send(self, content: Any, buffers: Any = None) -> None:
        self.outgoing.append(("message", json.loads(json.dumps(content)), list(buffers or [])))

    def listen(self, handler: Callable[[dict], None]) -> None:
        self.handler = handler


class Stage:
    """A Chromium page with panels in it. theme: "light" or "dark"."""

    def __init__(self, width: int = 1280, height: int = 900, theme: str = "light"):
        self.page: Page = shared_browser.get().new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.errors: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_content(PAGE)
        self.set_theme(theme)
        self.panels: dict[str, Panel] = {}
        self._hubs: dict[str, StageHub] = {}
        self._feeds: list[Feed] = []

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_) -> None:
        for feed in self._feeds:
            feed.close()
        self.page.close()

    def set_theme(self, name: str) -> None:
        colours = "".join(f"{key}:{value};" for key, value in THEMES[name].items())
        self.page.evaluate("""([css, name]) => { document.getElementById('theme').textContent = css;
            document.body.dataset.jpThemeLight = String(name === 'light');
            document.body.dataset.jpThemeName = name === 'light' ? 'JupyterLab Light' : 'JupyterLab Dark'; }""",
                           [f":root{{{colours}}} body{{background:{THEMES[name]['--jp-layout-color0']};}}", name])

    def feed(self, source: Any = None, **options: Any) -> Feed:
        """A feed whose messages go to this stage."""
        feed = Feed(source, hub=StageHub(), **options)
        if source is not None:
            source._feed = feed
        self._feeds.append(feed)
        return feed

    def show(self, panel: Panel) -> str:
        """Put a panel, made on a feed of this stage, into the page; returns the id of its element."""
        hub, panel_id = panel.feed.hub, f"panel-{len(self.panels)}"
        hub_id = next((key for key, known in self._hubs.items() if known is hub), None)
        if hub_id is None:
            hub_id = f"hub-{len(self._hubs)}"
            self._hubs[hub_id] = hub
            self.page.evaluate("([id, traits]) => addModel(id, traits)",
                               [hub_id, {"selection": hub.selection, "cursor": hub.cursor, "inspected": hub.inspected}])
        self.panels[panel_id] = panel
        traits = {name: getattr(panel, name) for name in panel.trait_names(sync=True)
                  if not name.startswith("_") and name not in ("hub", "layout", "tabbable", "tooltip", "comm")}
        self.page.evaluate("([id, traits]) => addModel(id, traits)",
                           [panel_id, {**traits, "hub": f"IPY_MODEL_{hub_id}"}])
        self.page.evaluate("(css) => { document.getElementById('css').textContent = css; }", panel._css)
        self.page.evaluate("([id, esm]) => mount(id, esm)", [panel_id, panel._esm])
        panel.observe(lambda change: self._tell(panel_id, change), list(traits))
        self.turn()
        return panel_id

    def remove(self, panel_id: str) -> None:
        self.page.evaluate("(id) => unmount(id)", panel_id)
        self.turn()

    def turn(self) -> None:
        """Carry everything that waits, once, both ways."""
        for hub_id, hub in self._hubs.items():
            while hub.outgoing:
                kind, content, buffers = hub.outgoing.popleft()
                if kind == "traits":
                    self.page.evaluate("([id, traits]) => models[id].update(traits)", [hub_id, content])
                else:
                    self.page.evaluate("([id, content, buffers]) => deliver(id, content, buffers)",
                                       [hub_id, content, [base64.b64encode(b).decode() for b in buffers]])
        for said in self.page.evaluate("takeOutbox()"):
            if said["model"] in self._hubs:
                hub = self._hubs[said["model"]]
                if "content" in said:
                    hub.handler(said["content"])
                else:
                    for name, value in said["traits"].items():
                        setattr(hub, name, value)
            else:
                for name, value in said.get("traits", {}).items():
                    setattr(self.panels[said["model"]], name, value)

    def run(self, seconds: float) -> None:
        """Let it live for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()
            self.page.wait_for_timeout(10)

    def until(self, condition: Callable[[], Any], timeout: float = PATIENCE_S) -> Any:
        """Let it live until condition() is true; returns its value. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.turn()
            value = condition()
            if value:
                self.turn()
                return value
            self.page.wait_for_timeout(10)
        raise TimeoutError(f"still not so after {timeout} s; console: {self.errors}")

    def _tell(self, panel_id: str, change: Any) -> None:
        self.page.evaluate("([id, traits]) => models[id].update(traits)", [panel_id, {change["name"]: change["new"]}])
