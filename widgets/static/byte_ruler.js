// A file to scale: an overview of all of it, and below a part of it that can be zoomed down to single bytes.
// Parts: [{name, label, kind, begin, end}], one after the other without a hole, in bytes.

const PART_LOOKS = {
  length: { colour: "#F0E442", hatch: 0, title: "header length" }, header: { colour: "#9e9e9e", hatch: 1, title: "JSON header" },
  embedding: { colour: "#CC79A7", hatch: 3, title: "embedding" }, attention: { colour: "#0072B2", hatch: 0, title: "attention" },
  mlp: { colour: "#E69F00", hatch: 2, title: "MLP" }, norm: { colour: "#009E73", hatch: 0, title: "norm" },
  output: { colour: "#D55E00", hatch: 1, title: "output" }, other: { colour: "#56B4E9", hatch: 3, title: "other" },
};
const LEAST_MARK = 3;  // pixels that even the smallest part is wide

// byteRuler(ui, {pick, open, bytes}): pick(part) when one is chosen, open(part) on Enter, bytes(begin, count) a promise
// of the file's bytes. Returns {set(parts, size), select(part), invalidate, zoomTo(begin, end), node}.
function byteRuler(ui, { pick, open, bytes }) {
  let parts = [], size = 1, selected = null, from = 0, to = 1, drawn = [], raw = null, wantedRaw = "";
  const overview = canvas(ui, { height: 26, label: "The whole file, to scale", draw: drawOverview });
  const detail = canvas(ui, { height: 84, label: "Part of the file, to scale. Arrow keys: tensor by tensor; plus and minus: zoom; Enter: open", draw: drawDetail });
  overview.node.tabIndex = -1;
  overview.node.classList.add("tf-overview");
  detail.node.classList.add("tf-detail");
  detail.node.style.cursor = "crosshair";
  const note = element("div", { class: "tv-muted tf-note" });
  ui.body.append(note);

  // First the parts that have room, in their places; then, over them, the marks of those that have not.
  function drawParts(ctx, t, begin, end, width, top, height) {
    const scale = width / (end - begin), least = LEAST_MARK * ui.scale, found = [];
    for (const part of parts) {
      if (part.end < begin || part.begin > end || (part.begin === part.end && part !== selected)) continue;
      const x = (part.begin - begin) * scale, w = (part.end - part.begin) * scale;
      found.push({ part, x: w < least ? Math.min(x, width - least) : x, w: Math.max(w, least), widened: w < least });
    }
    found.sort((a, b) => a.widened - b.widened);
    const fills = {};
    let last = -1;
    for (const mark of found) {
      if (mark.widened && Math.round(mark.x) === last && mark.part !== selected) continue;  // thousands on one pixel: once
      last = mark.widened ? Math.round(mark.x) : last;
      const look = PART_LOOKS[mark.part.kind], left = Math.max(mark.x, -2), right = Math.min(mark.x + mark.w, width + 2);
      ctx.fillStyle = fills[mark.part.kind] ||= hatched(ctx, look.colour, look.hatch);
      ctx.fillRect(left, top, right - left, height);
      if (mark.w > 4 * ui.scale) {
        ctx.fillStyle = t.panel;
        ctx.fillRect(right - 1, top, 1, height);
      }
    }
    return found;
  }
  function outline(ctx, t, mark, top, height, width) {
    if (!mark) return;
    ctx.strokeStyle = t.text;
    ctx.lineWidth = 2.5 * ui.scale;
    const left = Math.max(mark.x, 1), right = Math.min(mark.x + mark.w, width - 1);
    ctx.strokeRect(left, top + 1, Math.max(2, right - left), height - 2);
  }

  function drawOverview(ctx, width, height, t) {
    const s = ui.scale;
    if (height !== 26 * s) { overview.setHeight(26 * s); return; }
    const marks = drawParts(ctx, t, 0, size, width, 3 * s, height - 6 * s);
    outline(ctx, t, marks.find((m) => m.part === selected), 3 * s, height - 6 * s, width);
    // What the ruler below shows.
    const x = (from / size) * width, w = Math.max(4 * s, ((to - from) / size) * width);
    ctx.strokeStyle = t.accent;
    ctx.lineWidth = 3 * s;
    ctx.strokeRect(Math.min(x, width - w) + s, s, w - 2 * s, height - 2 * s);
    const widened = marks.filter((m) => m.widened).length;
    overview.node.dataset.parts = marks.length;
    overview.node.dataset.widened = widened;
    const told = `The file is drawn to scale. ${widened ? `${asCount(widened)} of its ${asCount(marks.length)} parts would be too thin to see above and are drawn ${LEAST_MARK} pixels wide.` : ""}`;
    if (note.textContent !== told) note.textContent = told;
  }

  function drawDetail(ctx, width, height, t) {
    const s = ui.scale, top = 20 * s, tall = 34 * s;
    if (height !== 84 * s) { detail.setHeight(84 * s); return; }
    drawn = drawParts(ctx, t, from, to, width, top, tall);
    const perByte = width / (to - from);
    detail.node.dataset.from = Math.round(from);
    detail.node.dataset.to = Math.round(to);
    detail.node.dataset.drawn = drawn.length;
    if (perByte >= 16 * s) drawBytes(ctx, t, perByte, top, tall, width);
    else drawNames(ctx, t, top, tall, width);
    outline(ctx, t, drawn.find((m) => m.part === selected), top, tall, width);
    drawAxis(ctx, t, top + tall, width);
  }
  function drawNames(ctx, t, top, tall, width) {
    const s = ui.scale;
    detail.node.dataset.bytes = "";
    ctx.textAlign = "center";
    for (const mark of drawn) {
      const left = Math.max(mark.x, 0), room = Math.min(mark.x + mark.w, width) - left;
      if (room < 26 * s) continue;
      ctx.font = `600 ${12 * s}px ${t.font}`;
      let label = mark.part.label;
      if (ctx.measureText(label).width > room - 6 * s) label = label.split(".").filter((w) => w !== "weight").slice(-1)[0].replace("_proj", "");
      if (ctx.measureText(label).width > room - 4 * s) continue;
      const half = ctx.measureText(label).width / 2 + 3 * s, x = left + room / 2;
      ctx.fillStyle = PART_LOOKS[mark.part.kind].colour;
      if (PART_LOOKS[mark.part.kind].hatch) ctx.fillRect(x - half, top + tall / 2 - 9 * s, 2 * half, 18 * s);
      ctx.fillStyle = inkOn(PART_LOOKS[mark.part.kind].colour);
      ctx.fillText(label, x, top + tall / 2);
    }
  }
  // So close that every byte has its place: the file's own bytes, in hexadecimal.
  function drawBytes(ctx, t, perByte, top, tall, width) {
    const first = Math.max(0, Math.floor(from)), count = Math.min(size, Math.ceil(to)) - first, key = `${first}+${count}`;
    if (wantedRaw !== key) {
      wantedRaw = key;
      bytes(first, count).then((data) => { if (wantedRaw === key) { raw = { first, data }; detail.invalidate(); } }, () => {});
    }
    if (!raw || raw.first !== first) return;
    const said = [];
    ctx.textAlign = "center";
    ctx.font = `600 ${Math.min(15 * ui.scale, perByte * 0.62)}px ${t.mono}`;
    raw.data.forEach((value, i) => {
      const mark = drawn.find(({ part }) => part.begin <= first + i && first + i < part.end);
      const text = value.toString(16).padStart(2, "0"), x = (first + i + 0.5 - from) * perByte;
      ctx.fillStyle = mark ? PART_LOOKS[mark.part.kind].colour : t.panel;
      ctx.fillRect(x - perByte / 2 + 1, top, perByte - 2, tall);
      ctx.fillStyle = mark ? inkOn(PART_LOOKS[mark.part.kind].colour) : t.text;
      ctx.fillText(text, x, top + tall / 2);
      said.push(text);
    });
    detail.node.dataset.bytes = said.join(" ");
    detail.node.dataset.first = first;
  }
  function drawAxis(ctx, t, y, width) {
    const s = ui.scale, span = to - from, wish = (span / width) * 150 * s;
    let every = 10 ** Math.floor(Math.log10(Math.max(1, wish)));
    for (const factor of [2, 5, 10]) if (every < wish) every = factor * 10 ** Math.floor(Math.log10(Math.max(1, wish)));
    ctx.font = `${11 * s}px ${t.font}`;
    ctx.strokeStyle = t.line;
    ctx.fillStyle = t.muted;
    ctx.lineWidth = s;
    for (let at = Math.ceil(from / every) * every; at <= to; at += every) {
      const x = ((at - from) / span) * width, text = asCount(at), half = ctx.measureText(text).width / 2;
      ctx.beginPath();
      ctx.moveTo(x, y);
      ctx.lineTo(x, y + 6 * s);
      ctx.stroke();
      ctx.textAlign = "center";
      ctx.fillText(text, Math.min(Math.max(x, half), width - half), y + 16 * s);
    }
    ctx.textAlign = "left";
    ctx.fillText(`byte ${asCount(Math.round(from))} to ${asCount(Math.round(to))} of ${asCount(size)} (${asBytes(Math.round(span))} shown)`, 0, 9 * s);
  }

  // ---- moving about ----

  function window_(a, b) {
    const span = Math.min(Math.max(b - a, 16), size);
    from = Math.min(Math.max((a + b) / 2 - span / 2, 0), size - span);
    to = from + span;
    overview.invalidate();
    detail.invalidate();
  }
  const zoom = (factor, at) => window_(at - (at - from) * factor, at + (to - at) * factor);
  const middle = () => selected && selected.end >= from && selected.begin <= to
    ? (Math.max(from, selected.begin) + Math.min(to, selected.end)) / 2 : (from + to) / 2;
  // A part with a little of what is around it.
  function zoomTo(part) {
    const around = Math.max(4, (part.end - part.begin) * 0.12);
    window_(part.begin - around, part.end + around);
  }
  function reveal(part) {
    if (part.begin >= from && part.end <= to) return;
    const span = Math.max(to - from, part.end - part.begin), center = (part.begin + part.end) / 2;
    window_(center - span / 2, center + span / 2);
  }
  const hit = (x) => {
    for (let i = drawn.length - 1; i >= 0; i--) if (x >= drawn[i].x && x <= drawn[i].x + drawn[i].w) return drawn[i].part;
    return null;
  };
  const byteAt = (x) => from + (x / detail.node.clientWidth) * (to - from);

  let drag = null;
  detail.node.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, from, to, moved: false };
    detail.node.setPointerCapture(event.pointerId);
  });
  detail.node.addEventListener("pointermove", (event) => {
    if (!drag) {
      const part = hit(event.offsetX);
      if (part) tip.show(event, `${part.name}\n${asBytes(part.end - part.begin)}, byte ${asCount(part.begin)} to ${asCount(part.end)}`);
      else tip.hide();
      return;
    }
    if (Math.abs(event.offsetX - drag.x) > 4) drag.moved = true;
    if (!drag.moved) return;
    const by = ((drag.x - event.offsetX) / detail.node.clientWidth) * (drag.to - drag.from);
    window_(drag.from + by, drag.to + by);
  });
  detail.node.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) { const part = hit(event.offsetX); if (part) pick(part); }
    drag = null;
  });
  detail.node.addEventListener("pointerleave", () => tip.hide());
  detail.node.addEventListener("dblclick", (event) => { const part = hit(event.offsetX); if (part) zoomTo(part); });
  // The wheel scrolls the notebook unless the ruler has the focus.
  detail.node.addEventListener("wheel", (event) => {
    if (document.activeElement !== detail.node && !event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, byteAt(event.offsetX));
  }, { passive: false });
  overview.node.addEventListener("click", (event) => {
    const at = (event.offsetX / overview.node.clientWidth) * size;
    window_(at - (to - from) / 2, at + (to - from) / 2);
  });
  detail.node.addEventListener("keydown", (event) => {
    const at = parts.indexOf(selected), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { const next = parts[Math.min(Math.max(at + step, 0), parts.length - 1)]; if (next) { pick(next); reveal(next); } }
    else if (event.key === "+" || event.key === "=") zoom(0.5, middle());
    else if (event.key === "-") zoom(2, middle());
    else if (event.key === "0" || event.key === "Escape") window_(0, size);
    else if (event.key === "Enter" && selected) open(selected);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const tip = tooltip(ui);

  return {
    node: detail.node,
    set(all, bytesInAll) { parts = all; size = bytesInAll; from = 0; to = size; selected = null; raw = null; wantedRaw = ""; overview.invalidate(); detail.invalidate(); },
    select(part) { selected = part; reveal(part); overview.invalidate(); detail.invalidate(); },
    zoomTo, all: () => window_(0, size), zoomIn: () => zoom(0.5, middle()), zoomOut: () => zoom(2, middle()),
  };
}
