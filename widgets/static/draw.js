// What all panels draw with: a canvas that follows its size and the theme, colours, hatches, numbers as text.

// A canvas that fills its parent's width. draw(ctx, width, height, colours) is called in the next animation frame after
// invalidate(), with one unit a CSS pixel. Returns {node, invalidate, setHeight}; its end is pushed on ui.undo.
function canvas(ui, options) {
  const node = element("canvas", { class: "tv-canvas", tabindex: "0", role: "img", "aria-label": options.label || "" });
  const ctx = node.getContext("2d");
  let colours = null, wanted = 0, height = options.height || 0, scheduled = 0;
  (options.parent || ui.body).append(node);
  const paint = () => {
    scheduled = 0;
    const width = node.clientWidth;
    if (!width || !node.isConnected) return;
    colours = colours || theme(ui.root);
    const ratio = window.devicePixelRatio || 1;
    wanted = Math.max(1, Math.round(height || ui.height));
    if (node.width !== Math.round(width * ratio) || node.height !== Math.round(wanted * ratio)) {
      node.width = Math.round(width * ratio);
      node.height = Math.round(wanted * ratio);
      node.style.height = `${wanted}px`;
    }
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, wanted);
    ctx.textBaseline = "middle";
    options.draw(ctx, width, wanted, colours);
  };
  const invalidate = () => { if (!scheduled) scheduled = requestAnimationFrame(paint); };
  const resize = new ResizeObserver(invalidate);
  resize.observe(node);
  window.addEventListener("resize", invalidate);  // ui.height depends on it
  ui.undo.push(() => { resize.disconnect(); window.removeEventListener("resize", invalidate); cancelAnimationFrame(scheduled); });
  ui.undo.push(onTheme(() => { colours = null; invalidate(); }));
  ui.listen(ui.model, "change:scale", invalidate);
  ui.listen(ui.model, "change:height", invalidate);
  invalidate();
  return { node, ctx, invalidate, setHeight(value) { height = value; invalidate(); } };
}

// Okabe and Ito's colours, told apart also by the colour-blind; black is left to text.
const OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"];
const KIND_COLOURS = { waiting: "#858585", prefill: "#E69F00", decode: "#0072B2", preempted: "#D55E00", cached: "#009E73" };

// A request's look, the same in every panel: a colour, and after seven requests a hatch as well. The green one has dots
// from the beginning: without red it looks like the purple one, without blue like the blue one.
function requestLook(requestId) {
  let n = Number(requestId);
  if (!Number.isInteger(n) || n < 0) {
    n = 0;
    for (const letter of String(requestId)) n = (n * 31 + letter.codePointAt(0)) >>> 0;
  }
  const colour = OKABE_ITO[n % OKABE_ITO.length], round = Math.floor(n / OKABE_ITO.length);
  return { colour, hatch: (colour === "#009E73" ? round + 3 : round) % 4 };
}

// Relative luminance and contrast as in WCAG 2; a colour is [red, green, blue], 0 to 255.
function brightness([r, g, b]) {
  const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
}
function contrast(a, b) {
  const [low, high] = [brightness(a), brightness(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
const channelsOf = (hex) => { const n = parseInt(hex.slice(1), 16); return [n >> 16, (n >> 8) & 255, n & 255]; };

// Black or white, whichever reads better on a colour, "#rrggbb".
const inkOn = (colour) => brightness(channelsOf(colour)) > 0.179 ? "#000000" : "#ffffff";

// A colour, "#rrggbb", for the edge of what it fills: darker or brighter until it stands out from the panel (3 to 1).
const edges = new Map();
function edgeOn(colour, t) {
  const key = `${colour}${t.panel}`;
  if (!edges.has(key)) {
    const ground = paintedOver(t.panel), target = t.dark ? 255 : 0;
    let seen = channelsOf(colour);
    for (let i = 0; i < 20 && contrast(seen, ground) < 3; i++) seen = seen.map((v) => Math.round(v + (target - v) * 0.08));
    edges.set(key, `rgb(${seen.join(", ")})`);
  }
  return edges.get(key);
}

// A line around a box, seen on any colour: the theme's text colour within a line of the panel's.
function frame(ctx, x, y, w, h, t, scale) {
  const out = 1.25 * scale;
  for (const [colour, width] of [[t.panel, 3.5 * scale], [t.text, 2 * scale]]) {
    ctx.strokeStyle = colour;
    ctx.lineWidth = width;
    ctx.strokeRect(x - out, y - out, w + 2 * out, h + 2 * out);
  }
  ctx.lineWidth = 1;
}

// A legend: [[text, paint(ctx, width, height)]], each with a swatch in CSS pixels.
function legendSwatches(items, scale) {
  const width = Math.round(16 * scale), height = Math.round(12 * scale), ratio = window.devicePixelRatio || 1;
  return items.map(([text, paint]) => {
    const picture = element("canvas", { width: width * ratio, height: height * ratio }), ctx = picture.getContext("2d");
    ctx.scale(ratio, ratio);
    paint(ctx, width, height);
    const swatch = element("span", { style: { width: `${width}px`, height: `${height}px`, flex: "none",
      background: `url(${picture.toDataURL()}) 0 0 / 100% 100%` } });
    return element("span", { class: "tv-legend-item" }, swatch, text);
  });
}

// A fill style: the colour, with a hatch over it (0 none, 1 rising lines, 2 falling lines, 3 dots).
const patterns = new Map();
function hatched(ctx, colour, hatch) {
  if (!hatch) return colour;
  const key = `${colour}${hatch}`;
  if (!patterns.has(key)) {
    const tile = element("canvas", { width: 8, height: 8 });
    const c = tile.getContext("2d");
    c.fillStyle = colour;
    c.fillRect(0, 0, 8, 8);
    c.strokeStyle = c.fillStyle = inkOn(colour) === "#000000" ? "rgba(0,0,0,0.5)" : "rgba(255,255,255,0.6)";
    c.lineWidth = 1.5;
    c.beginPath();
    if (hatch === 1) { c.moveTo(-2, 2); c.lineTo(2, -2); c.moveTo(0, 8); c.lineTo(8, 0); c.moveTo(6, 10); c.lineTo(10, 6); }
    if (hatch === 2) { c.moveTo(-2, 6); c.lineTo(2, 10); c.moveTo(0, 0); c.lineTo(8, 8); c.moveTo(6, -2); c.lineTo(10, 2); }
    if (hatch === 3) { c.arc(4, 4, 1.6, 0, 2 * Math.PI); c.fill(); }
    c.stroke();
    patterns.set(key, ctx.createPattern(tile, "repeat"));  // it belongs to no canvas: one for all of them, made once
  }
  return patterns.get(key);
}

// Viridis by its nine corner points: 0 dark, 1 bright.
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]];
function viridis(t) {
  const x = Math.min(0.99999, Math.max(0, t)) * (VIRIDIS.length - 1);
  const i = Math.floor(x), f = x - i;
  return VIRIDIS[i].map((v, k) => Math.round(v + f * (VIRIDIS[i + 1][k] - v)));
}

// A box that follows the mouse. show(event, text or nodes); hide(). Text never becomes HTML.
function tooltip(ui) {
  const node = element("div", { class: "tv-tooltip", hidden: true });
  ui.root.append(node);
  return {
    node,
    show(event, ...content) {
      node.replaceChildren(...content);
      node.hidden = false;
      const box = ui.root.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      node.style.left = `${Math.max(0, Math.min(x + 14, box.width - node.offsetWidth - 4))}px`;
      node.style.top = `${y + 18 + node.offsetHeight > box.height ? Math.max(0, y - node.offsetHeight - 10) : y + 18}px`;
    },
    hide() { node.hidden = true; },
  };
}

// ---- numbers as text ----

const asMs = (ms) => ms < 0.01 ? `${(ms * 1000).toFixed(1)} µs` : ms < 10 ? `${ms.toFixed(2)} ms`
  : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
const asBytes = (n) => n < 1024 ? `${n} B` : n < 1048576 ? `${(n / 1024).toFixed(1)} KiB`
  : n < 1073741824 ? `${(n / 1048576).toFixed(1)} MiB` : `${(n / 1073741824).toFixed(2)} GiB`;
const asCount = (n) => n.toLocaleString("en");
// Characters that would not be seen, made visible.
const visibleText = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");

// The same look for an element: a background with the request's colour and hatch, and readable ink on it.
function lookStyle(requestId) {
  const { colour, hatch } = requestLook(requestId), ink = inkOn(colour);
  const line = ink === "#000000" ? "rgba(0,0,0,0.5)" : "rgba(255,255,255,0.6)";
  const images = ["none", `repeating-linear-gradient(135deg, ${line} 0 1.5px, transparent 1.5px 6px)`,
    `repeating-linear-gradient(45deg, ${line} 0 1.5px, transparent 1.5px 6px)`,
    `radial-gradient(${line} 1.6px, transparent 1.9px)`];
  return { backgroundColor: colour, color: ink, backgroundImage: images[hatch],
    backgroundSize: hatch === 3 ? "8px 8px" : "auto" };
}
// Text cut so that it fits into a width, with an ellipsis; ctx.font is set.
function cutToWidth(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  const letters = [...text];
  while (letters.length > 1 && ctx.measureText(`${letters.join("")}…`).width > width) letters.pop();
  return `${letters.join("")}…`;
}
