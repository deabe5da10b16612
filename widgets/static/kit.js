// What all panels share: the connection to the feed, the frame around a panel, the theme.
// A panel's own file follows this text in the same module and ends with `export default { render }`.

// ---- the connection ----

const DTYPES = {
  "|u1": Uint8Array, "|i1": Int8Array, "<u2": Uint16Array, "<i2": Int16Array,
  "<u4": Uint32Array, "<i4": Int32Array, "<f4": Float32Array, "<f8": Float64Array,
};

// A topic's or an answer's part of a message: its data, and a typed array for each of its arrays (shape beside it).
function unpack(part, buffers) {
  const out = { ...part.data };
  for (const [name, [dtype, offset, shape]] of Object.entries(part.arrays)) {
    const count = shape.reduce((a, b) => a * b, 1);
    const Type = DTYPES[dtype];
    if (!count) { out[name] = new Type(0); out[name].shape = shape; continue; }
    const view = buffers[0];
    const start = (view.byteOffset || 0) + offset;
    const memory = view.buffer || view;
    // A view into the message where it is aligned, else a copy: either way a typed array.
    out[name] = start % Type.BYTES_PER_ELEMENT === 0
      ? new Type(memory, start, count)
      : new Type(memory.slice(start, start + count * Type.BYTES_PER_ELEMENT));
    out[name].shape = shape;
  }
  return out;
}

function topicKey(name, params) {
  const sorted = (value) => value && typeof value === "object" && !Array.isArray(value)
    ? Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])])) : value;
  return params && Object.keys(params).length ? name + JSON.stringify(sorted(params)) : name;
}

let questions = 0;
const newId = (what) => `${what}-${Math.random().toString(36).slice(2, 8)}-${++questions}`;

// One for each hub in a page; all panels of a feed share it, whichever module they came from.
class Client {
  constructor(hub) {
    this.hub = hub;
    this.live = { state: "connecting", kind: "" };
    this.now = 0;
    this.frames = 0;
    this.views = new Map();       // view id -> {key, handlers, visible}
    this.waiting = new Map();     // question id -> {resolve, reject}
    this.listeners = new Set();   // called with every frame, for `live`
    hub.on("msg:custom", (message, buffers) => this.receive(message, buffers || []));
    document.addEventListener("visibilitychange", () => this.tellVisibility());
  }

  receive(message, buffers) {
    if (message.type === "answer") {
      const asked = this.waiting.get(message.id);
      this.waiting.delete(message.id);
      if (asked && message.error !== undefined) asked.reject(new Error(message.error));
      else if (asked) asked.resolve(unpack(message, buffers));
      return;
    }
    if (message.type !== "frame") return;
    this.live = message.live;
    this.now = message.now;
    this.frames += 1;
    const parts = {};
    for (const [key, part] of Object.entries(message.topics)) parts[key] = { mode: part.mode, value: unpack(part, buffers) };
    for (const view of this.views.values()) {
      const part = parts[view.key];
      if (!part) continue;
      // A delta is of no use to a view that has not had its snapshot yet.
      if (part.mode === "snapshot") { view.ready = true; view.handlers.snapshot(part.value); }
      else if (view.ready) (view.handlers.delta || view.handlers.snapshot)(part.value);
    }
    for (const listener of this.listeners) listener(this.live, this.now);
    // Asked for after the panels asked for theirs, so this runs when they have drawn.
    if (message.ack) requestAnimationFrame(() => this.say({ op: "ack", n: message.n, drawn: performance.timeOrigin + performance.now() }));
  }

  say(message) { this.hub.send(message); }

  // Subscribe an element to a topic. handlers: snapshot(value) and delta(value); without delta, snapshots come each time.
  // Returns a function that ends it.
  subscribe(element, topic, params, handlers) {
    const id = newId("view");
    const view = { id, key: topicKey(topic, params), handlers, onScreen: true, told: true, ready: false };
    this.views.set(id, view);
    const observer = new IntersectionObserver((entries) => {
      view.onScreen = entries[entries.length - 1].isIntersecting;
      this.tellVisibility();
    });
    observer.observe(element);
    view.told = !document.hidden;
    this.say({ op: "ready", view: id, topic, params: params || {}, key: view.key, visible: view.told });
    return () => {
      observer.disconnect();
      this.views.delete(id);
      this.say({ op: "gone", view: id });
    };
  }

  tellVisibility() {
    for (const view of this.views.values()) {
      const visible = view.onScreen && !document.hidden;
      if (visible !== view.told) {
        view.told = visible;
        this.say({ op: "visible", view: view.id, visible });
      }
    }
  }

  // Ask Python; the promise is rejected with the error's text, in the user's words.
  ask(what, args) {
    const id = newId("ask");
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.say({ op: "ask", id, what, args: args || {} });
    });
  }

  get selection() { return this.hub.get("selection"); }
  select(what) {
    const now = this.selection;
    if (Object.keys(what).every((key) => now[key] === what[key])) return;
    this.hub.set("selection", { ...now, ...what });
    this.hub.save_changes();
  }
  onSelection(listener) {
    this.hub.on("change:selection", listener);
    return () => this.hub.off("change:selection", listener);
  }
  get cursor() { return this.hub.get("cursor"); }     // ms into the run, or null for now
  setCursor(ms) { this.hub.set("cursor", ms); this.hub.save_changes(); }
  onCursor(listener) {
    this.hub.on("change:cursor", listener);
    return () => this.hub.off("change:cursor", listener);
  }
  // Open BitLens on one value: {kind: "weight" | "kv" | "query" | "hidden" | "logit", ...its address, see answers/inspect.py}.
  // `n` makes every call a change, also the second on the same value.
  get inspected() { return this.hub.get("inspected") || {}; }
  inspect(address) { this.hub.set("inspected", { ...address, n: Date.now() }); this.hub.save_changes(); }
  onInspect(listener) {
    this.hub.on("change:inspected", listener);
    return () => this.hub.off("change:inspected", listener);
  }
  onLive(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

async function connect(model) {
  const reference = model.get("hub");
  const hub = typeof reference === "string"
    ? await model.widget_manager.get_model(reference.replace("IPY_MODEL_", "")) : reference;
  if (!hub.tinyvllmClient) hub.tinyvllmClient = new Client(hub);
  return hub.tinyvllmClient;
}

// ---- the frame around a panel ----

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") node.textContent = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Properties of an element, written only where they differ: in every frame nearly all are what they were, and a text that
// is written anew is laid out anew.
function put(node, properties) {
  for (const [name, value] of Object.entries(properties)) if (node[name] !== value) node[name] = value;
}

// A panel: title, tools at the right, the body, a line of hints, and what a screen reader is told.
// render() of a panel: `const ui = await panel(model, el, "Title"); ...; return ui.dispose;`
async function panel(model, el, title, hint) {
  const client = await connect(model);
  const tools = element("div", { class: "tv-tools" });
  const badge = element("span", { class: "tv-badge", text: "" });
  const body = element("div", { class: "tv-body" });
  const spoken = element("div", { class: "tv-spoken", role: "status", "aria-live": "polite" });
  const trouble = element("div", { class: "tv-trouble", role: "alert", hidden: true });
  // JupyterLab asks the element that has the focus whether its keys are for Lab ("b" inserts a cell), and then upwards.
  const keepKeys = (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true");
  const root = element("section", { class: "tv-panel", "aria-label": title, onfocusin: keepKeys },
    element("header", { class: "tv-head" }, element("h3", { text: title }), badge, tools), trouble, body,
    hint ? element("footer", { class: "tv-hint", text: hint }) : null, spoken);
  el.append(root);
  const undo = [];
  const setScale = () => root.style.setProperty("--tv-scale", model.get("scale"));
  setScale();
  const listen = (target, event, handler) => { target.on(event, handler); undo.push(() => target.off(event, handler)); };
  listen(model, "change:scale", setScale);
  let lastSpoken = 0, toSay = "", sayTimer = 0;
  const speak = () => {
    sayTimer = 0;
    if (spoken.textContent === toSay) return;
    lastSpoken = performance.now();
    spoken.textContent = toSay;
  };
  undo.push(() => clearTimeout(sayTimer));
  const ui = {
    client, model, root, body, tools, badge, undo, listen,
    get scale() { return model.get("scale"); },
    // Of the drawing, in CSS pixels. Enlarged it would leave the window of a projector: then it is as high as fits.
    get height() {
      const height = model.get("height");
      return Math.min(height * model.get("scale"), Math.max(height, 0.6 * window.innerHeight));
    },
    // Say something to a screen reader, at most every two seconds; the last is always said.
    say(text) {
      toSay = text;
      if (sayTimer) return;
      const wait = lastSpoken ? 2000 - (performance.now() - lastSpoken) : 0;
      if (wait <= 0) speak(); else sayTimer = setTimeout(speak, wait);
    },
    complain(error) {
      trouble.textContent = error ? String(error.message || error) : "";
      trouble.hidden = !error;
    },
    subscribe(topic, params, handlers) {
      const end = client.subscribe(root, topic, params, handlers);
      undo.push(end);
      return end;
    },
    ask: (what, args) => client.ask(what, args),
    dispose() { for (const step of undo.splice(0).reverse()) step(); root.remove(); },
  };
  const setBadge = () => {
    const { kind, state } = client.live;
    put(badge, { textContent: kind ? `${{ cuda: "GPU", cpu: "CPU", replay: "REPLAY" }[kind] || kind} · ${state}` : "" });
    put(badge.dataset, { kind: kind || "", state: state || "" });
  };
  setBadge();
  undo.push(client.onLive(setBadge));
  return ui;
}

function button(text, title, onclick, attributes) {
  return element("button", { class: "tv-button", type: "button", title, text, onclick, ...attributes });
}

// ---- the theme ----

// The colours of the page as they are now; panels call it when `onTheme` says that they changed.
function theme(node) {
  const style = getComputedStyle(node);
  const read = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  const background = read("--jp-layout-color0", "#ffffff");
  const dark = luminance(background) < 0.4, panel = read("--jp-layout-color1", dark ? "#111111" : "#ffffff");
  const text = read("--jp-ui-font-color1", dark ? "#e8e8e8" : "#212121"), faint = read("--jp-border-color2", dark ? "#3c3c3c" : "#e0e0e0");
  // As --tv-muted in kit.css: the theme's second colour alone is too pale on a raised ground.
  const [r, g, b] = paintedOver(panel, [read("--jp-ui-font-color2", dark ? "#b0b0b0" : "#616161"), 1], [text, 0.4]);
  return {
    dark,
    background,
    panel,
    raised: read("--jp-layout-color2", dark ? "#303030" : "#eeeeee"),
    text,
    muted: `rgb(${r}, ${g}, ${b})`,
    line: read("--jp-border-color1", dark ? "#5a5a5a" : "#bdbdbd"),
    faint: dark && luminance(faint) > 0.4 ? "#5a5a5a" : faint,  // in high contrast a border is white; a grid must not be
    accent: read("--jp-brand-color1", dark ? "#64b5f6" : "#1565c0"),
    font: read("--jp-ui-font-family", "system-ui, sans-serif"),
    mono: read("--jp-code-font-family", "ui-monospace, monospace"),
  };
}

// What is seen of a colour with others, each [colour, opacity], painted over it: [red, green, blue], 0 to 255.
function paintedOver(colour, ...layers) {
  const probe = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  for (const [fill, opacity] of [[colour, 1], ...layers]) {
    probe.fillStyle = fill;
    probe.globalAlpha = opacity;
    probe.fillRect(0, 0, 1, 1);
  }
  return [...probe.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

function luminance(colour) {
  const [r, g, b] = paintedOver(colour);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}

// Calls back when JupyterLab's theme, or the wish for more contrast, changes.
function onTheme(callback) {
  const observer = new MutationObserver(() => requestAnimationFrame(callback));
  observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
  const contrast = matchMedia("(prefers-contrast: more)");
  contrast.addEventListener("change", callback);
  return () => { observer.disconnect(); contrast.removeEventListener("change", callback); };
}
