// How the timeline is drawn. Everything on the canvas comes from the model; what was drawn is returned, so that clicks and
// tests can ask it.

const FAILED = "#b00020", FAILED_ON_DARK = "#ff8a80";
const THIN = { waiting: 0.4, preempted: 0.4, prefill: 0.6, decode: 1 };   // height of a span, as a share of its row

function timelineLayout(height, scale) {
  const ruler = 20 * scale, strip = Math.min(64 * scale, height * 0.25), gap = 5 * scale;
  return { ruler, stripTop: ruler + 2, stripBottom: ruler + strip, lanesTop: ruler + strip + gap, height };
}

// A round distance between marks: 1, 2 or 5 times a power of ten.
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least * 0.999);
}

function timeLabel(ms, step, largest) {
  if (largest < 1000) return `${ms.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)))} ms`;
  return `${(ms / 1000).toFixed(Math.max(0, -Math.floor(Math.log10(step / 1000) + 1e-9)))} s`;
}

// Text on a ground of its own, so that it can be read over anything. align: "left", "right" or "center" of x.
function plate(ctx, text, x, y, colours, align, ink, alpha) {
  ctx.textAlign = "left";
  const width = ctx.measureText(text).width, size = Number(/([\d.]+)px/.exec(ctx.font)[1]);
  const left = align === "right" ? x - width : align === "center" ? x - width / 2 : x;
  ctx.globalAlpha = alpha || 0.85;
  ctx.fillStyle = colours.panel;
  ctx.fillRect(left - 3, y - size * 0.65, width + 6, size * 1.3);
  ctx.globalAlpha = 1;
  ctx.fillStyle = ink || colours.text;
  ctx.fillText(text, left, y);
}

// The text, shortened to a width; "" if not even one letter fits.
function fitted(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  const letters = Array.from(text);
  let low = 0, high = letters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (ctx.measureText(`${letters.slice(0, middle).join("")}…`).width <= width) low = middle; else high = middle - 1;
  }
  return low ? `${letters.slice(0, low).join("")}…` : "";
}

function drawRuler(ctx, scene, width, colours) {
  const { axis, view, layout, scale, model } = scene;
  const least = (view.high - view.low) / Math.max(2, width / (95 * scale));
  const step = axis.mode === "steps" ? Math.max(1, niceStep(least)) : niceStep(least);
  ctx.fillStyle = colours.raised;
  ctx.fillRect(0, 0, width, layout.ruler);
  ctx.font = `${11 * scale}px ${colours.font}`;
  ctx.textAlign = "left";
  for (let mark = Math.ceil(view.low / step) * step; mark <= view.high; mark += step) {
    let text;
    if (axis.mode === "steps") {
      const i = mark - model.steps.first;
      if (i < 0 || i >= model.steps.length) continue;
      text = `step ${asCount(model.steps.number[i])}`;
    } else {
      if (mark < -1e-9) continue;
      text = timeLabel(mark, step, view.high);
    }
    const x = scene.x(mark);
    ctx.fillStyle = colours.faint;
    ctx.fillRect(x, layout.ruler, 1, layout.height - layout.ruler);
    ctx.fillStyle = colours.muted;
    ctx.fillRect(x, layout.ruler - 5 * scale, 1, 5 * scale);
    if (x + 4 + ctx.measureText(text).width < width) ctx.fillText(text, x + 4, layout.ruler / 2);
  }
}

// What the full height of the strip stands for: the budget, or a half, a quarter, ... of it where steps are small.
function stripTop(budget, most) {
  let top = Math.max(1, budget || most);
  while (top > 8 && most * 3 < top) top /= 2;
  return Math.max(top, most);
}

function drawStrip(ctx, scene, width, colours) {
  const { axis, view, layout, scale, model, budget } = scene;
  const steps = model.steps, [from, to] = axis.range(view.low, view.high);
  const bottom = layout.stripBottom, full = bottom - layout.stripTop;
  let most = 0;
  for (let i = from; i < to; i++) most = Math.max(most, steps.tokens(i));
  const top = stripTop(budget, most);
  const tall = (tokens) => tokens ? Math.max(1, tokens / top * full) : 0;
  ctx.fillStyle = colours.background;
  ctx.fillRect(0, layout.stripTop, width, full);
  // Steps that are narrower than a pixel share its column: the largest of them is shown.
  const shown = new Int32Array(Math.ceil(width) + 1).fill(-1);
  const place = (i, x, w) => {
    const decode = tall(steps.decode[i]), prefill = tall(steps.prefill[i]);
    const inner = w >= 4 ? w - 1 : w;
    if (decode) { ctx.fillStyle = KIND_COLOURS.decode; ctx.fillRect(x, bottom - decode, inner, decode); }
    if (prefill) { ctx.fillStyle = KIND_COLOURS.prefill; ctx.fillRect(x, bottom - decode - prefill, inner, prefill); }
    if (steps.failed[i]) { ctx.fillStyle = colours.dark ? FAILED_ON_DARK : FAILED; ctx.fillRect(x, layout.stripTop, Math.max(2, inner), full); }
  };
  let columns = 0;
  for (let i = from; i < to; i++) {
    const x = scene.x(axis.stepBegin(i)), end = scene.x(axis.stepEnd(i, scene.now));
    if (end - x >= 1) { place(i, x, end - x); columns += 1; continue; }
    const column = Math.floor(x);
    if (column < 0 || column >= shown.length) continue;
    const other = shown[column];
    if (other < 0 || steps.failed[i] > steps.failed[other] || steps.tokens(i) > steps.tokens(other)) shown[column] = i;
  }
  for (let column = 0; column < shown.length; column++) {
    if (shown[column] >= 0) { place(shown[column], column, 1); columns += 1; }
  }
  scene.shown = shown;
  ctx.fillStyle = colours.muted;
  ctx.fillRect(0, bottom, width, 1);
  ctx.font = `${11 * scale}px ${colours.font}`;
  if (budget) {
    if (top === budget) {
      ctx.setLineDash([5, 4]);
      ctx.strokeStyle = colours.text;
      ctx.beginPath(); ctx.moveTo(0, layout.stripTop + 0.5); ctx.lineTo(width, layout.stripTop + 0.5); ctx.stroke();
      ctx.setLineDash([]);
    }
    const text = top === budget ? `token budget ${asCount(budget)}`
      : `scale to ${asCount(Math.round(top))} of the budget of ${asCount(budget)} tokens`;
    plate(ctx, text, 6 * scale, layout.stripTop + 9 * scale, colours, "left", colours.muted);
  }
  return columns;
}

// One request: its spans, its chunks, its name. Returns the box that it takes, or null if none of it is in view.
function drawRequest(ctx, scene, request, top, row, width, colours, counts) {
  const { axis, model, scale, now } = scene, steps = model.steps;
  const x = (ms) => scene.x(axis.of(isNaN(ms) ? now : ms));
  const begin = x(request.added), end = Math.max(begin + 2, x(request.end));
  if (end < -60 * scale || begin > width + 160 * scale) return null;
  const inner = row >= 8 ? row - Math.max(2, row * 0.18) : row - 0.5, middle = top + row / 2;
  for (const span of request.spans) {
    const from = x(span.begin), to = x(span.end);
    if (to < 0 || from > width || (to - from < 0.3 && !isNaN(span.end))) continue;
    const tall = Math.max(1, inner * THIN[span.kind]), left = Math.max(-2, from), wide = Math.max(1, Math.min(width + 2, to) - left);
    const dense = row >= 8 && span.kind === "preempted";
    ctx.fillStyle = dense ? hatched(ctx, KIND_COLOURS.preempted, 2) : KIND_COLOURS[span.kind];
    ctx.globalAlpha = span.kind === "prefill" ? 0.3 : 1;
    ctx.fillRect(left, middle - tall / 2, wide, tall);
    ctx.globalAlpha = 1;
    if (span.kind === "prefill" && tall >= 6) {   // so pale a band needs edges
      ctx.fillStyle = edgeOn(KIND_COLOURS.prefill, colours);
      for (const y of [middle - tall / 2, middle + tall / 2 - 1]) ctx.fillRect(left, y, wide, 1);
    }
    counts.bars += 1;
    if (isNaN(span.end)) counts.open += 1;
  }
  ctx.fillStyle = KIND_COLOURS.prefill;
  let last = -1;
  for (const chunk of request.chunks) {
    const i = steps.at(chunk.begin);
    if (i < 0 || steps.begin[i] !== chunk.begin) continue;
    const from = scene.x(axis.stepBegin(i)), to = scene.x(axis.stepEnd(i, now));
    if (to < 0 || from > width) continue;
    counts.chunks += 1;
    if (to - from < 1 && Math.floor(from) === last) continue;   // this pixel is full already
    last = Math.floor(from);
    ctx.fillRect(from, middle - inner / 2, Math.max(1, to - from - (to - from >= 3 ? 1 : 0)), inner);
  }
  if (request.cached && row >= 6) {   // a green mark where its prefill began: so much less to compute
    const started = request.spans.find((span) => span.kind === "prefill");
    if (started) {
      ctx.fillStyle = KIND_COLOURS.cached;
      ctx.fillRect(x(started.begin) - 2 * scale, middle - inner / 2, 4 * scale, inner);
    }
  }
  if (!isNaN(request.end) && end > 0 && end < width + 4) {
    ctx.fillStyle = request.status !== "abort" ? colours.text : colours.dark ? FAILED_ON_DARK : FAILED;
    ctx.fillRect(end - 1, middle - inner / 2, Math.max(2, 2 * scale), inner);
  }
  return { request, x: begin, y: middle - inner / 2, w: end - begin, h: inner };
}

// The name of a request in its colour: left of its bar if there is room, else at the beginning of what can be seen of it;
// and behind the bar, how it ended. before, after: where the neighbours in the lane end and begin. Returns [left, right].
function drawName(ctx, scene, box, width, colours, before, after) {
  const { scale } = scene, { request } = box, { colour, hatch } = request.look;
  const right = Math.min(width, box.x + box.w), middle = box.y + box.h / 2 + 0.5;
  if (box.h < 10) {
    const wide = Math.min(6 * scale, Math.max(2, right - Math.max(0, box.x)));
    ctx.fillStyle = hatched(ctx, colour, hatch);
    ctx.fillRect(Math.max(0, box.x), box.y, wide, box.h);
    return [box.x, box.x];
  }
  ctx.font = `600 ${Math.min(12 * scale, box.h * 0.78)}px ${colours.font}`;
  ctx.textAlign = "left";
  let text = fitted(ctx, request.id, 150 * scale);
  let wide = ctx.measureText(text).width + 8, left = box.x - wide - 2;
  if (left < Math.max(0, before)) {
    left = Math.max(0, box.x);
    const room = Math.min(100 * scale, Math.max(right - left, 0, Math.min(after, width) - left));
    if (room < wide) text = room > 14 * scale ? fitted(ctx, text, room - 8) : "";
    wide = text ? ctx.measureText(text).width + 8 : Math.min(6 * scale, Math.max(3, right - left));
  }
  ctx.fillStyle = colours.panel;   // a gap, or the name would look like a part of the bar
  ctx.fillRect(left - 1, box.y, wide + 1 + 2 * scale, box.h);
  ctx.fillStyle = hatched(ctx, colour, hatch);
  ctx.fillRect(left, box.y, wide, box.h);
  if (text) {
    if (hatch) {   // a plain ground below the letters, or the hatch runs through them
      ctx.fillStyle = colour;
      ctx.fillRect(left + 3, box.y + 2, wide - 6, box.h - 4);
    }
    ctx.fillStyle = inkOn(colour);
    ctx.fillText(text, left + 4, middle);
  }
  if (!isNaN(request.end)) {
    const x = Math.max(box.x + box.w, left + wide) + 5 * scale;
    ctx.font = `${Math.min(11 * scale, box.h * 0.75)}px ${colours.font}`;
    if (x > 0 && x + ctx.measureText(request.status).width < Math.min(width, after - 4)) {
      ctx.fillStyle = request.status === "abort" ? (colours.dark ? FAILED_ON_DARK : FAILED) : colours.muted;
      ctx.fillText(request.status, x, middle);
    }
  }
  return [left, left + wide];
}

function drawLanes(ctx, scene, width, colours) {
  const { layout, model, view, selection, scale } = scene, row = view.row;
  const counts = { bars: 0, chunks: 0, open: 0, boxes: [] };
  ctx.save();
  ctx.beginPath();
  ctx.rect(0, layout.lanesTop, width, layout.height - layout.lanesTop);
  ctx.clip();
  const firstLane = Math.floor(view.scroll / row), lastLane = Math.ceil((view.scroll + layout.height - layout.lanesTop) / row);
  for (const request of model.requests) {
    if (request.lane < firstLane || request.lane > lastLane) continue;
    const top = layout.lanesTop + request.lane * row - view.scroll;
    const box = drawRequest(ctx, scene, request, top, row, width, colours, counts);
    if (box) counts.boxes.push(box);
  }
  let chosen = null;
  const right = new Map(), left = new Map();   // in a lane, what the right neighbour begins with, and the left one ends with
  for (const box of counts.boxes) {
    box.before = left.has(box.request.lane) ? left.get(box.request.lane) : -Infinity;
    left.set(box.request.lane, box.x + box.w + 3);
  }
  for (let i = counts.boxes.length - 1; i >= 0; i--) {
    const box = counts.boxes[i], { lane } = box.request;
    const name = drawName(ctx, scene, box, width, colours, box.before, right.has(lane) ? right.get(lane) : Infinity);
    right.set(lane, name[0]);
    if (box.request.id === selection.request) chosen = [Math.min(name[0], box.x), Math.max(name[1], box.x + box.w), box];
  }
  if (chosen) frame(ctx, chosen[0], chosen[2].y, chosen[1] - chosen[0], chosen[2].h, colours, scale);
  ctx.restore();
  const space = layout.height - layout.lanesTop, content = view.lanes * row;
  if (content > space + 1) {
    const bar = Math.max(16, space * space / content), wide = 7 * scale;
    ctx.fillStyle = colours.faint;
    ctx.fillRect(width - wide, layout.lanesTop, wide, space);
    ctx.fillStyle = colours.muted;
    ctx.fillRect(width - wide, layout.lanesTop + view.scroll / (content - space) * (space - bar), wide, bar);
    const below = Math.round((content - space - view.scroll) / row);
    ctx.font = `${11 * scale}px ${colours.font}`;
    if (below > 0) plate(ctx, `${below} more rows below`, width - 14 * scale, layout.height - 9 * scale, colours, "right", colours.muted);
  }
  return counts;
}

// A line over everything at a place of the axis, with a handle in the ruler.
function drawLine(ctx, scene, place, text, ink, width, colours) {
  const { layout, scale } = scene, x = scene.x(place);
  if (x < -1 || x > width + 1) return;
  ctx.fillStyle = ink;
  ctx.fillRect(x - 1, 0, 2, layout.height);
  ctx.beginPath();
  ctx.moveTo(x - 7 * scale, 0); ctx.lineTo(x + 7 * scale, 0); ctx.lineTo(x, 11 * scale);
  ctx.fill();
  ctx.font = `600 ${11 * scale}px ${colours.font}`;
  const right = x > width - 90 * scale;
  plate(ctx, text, right ? x - 10 * scale : x + 10 * scale, layout.ruler / 2, colours, right ? "right" : "left", ink, 1);
}

// All of it. scene: {model, axis, view: {low, high, row, scroll, lanes}, layout, scale, budget, now, cursor, selection}.
function drawTimeline(ctx, width, colours, scene) {
  const { layout, axis, model, view } = scene;
  const perUnit = width / (view.high - view.low);
  scene.x = (place) => (place - view.low) * perUnit;
  drawRuler(ctx, scene, width, colours);
  const columns = drawStrip(ctx, scene, width, colours);
  const chosen = scene.selection.step === null ? -1 : model.steps.find(scene.selection.step);
  if (chosen >= 0) {
    const x = scene.x(axis.stepBegin(chosen)), wide = Math.max(2, scene.x(axis.stepEnd(chosen, scene.now)) - x);
    ctx.globalAlpha = 0.18;
    ctx.fillStyle = colours.accent;
    ctx.fillRect(x, layout.stripTop, wide, layout.height - layout.stripTop);
    ctx.globalAlpha = 1;
    ctx.strokeStyle = colours.accent;
    ctx.strokeRect(x - 0.5, layout.stripTop - 0.5, wide + 1, layout.stripBottom - layout.stripTop + 1);
  }
  const counts = drawLanes(ctx, scene, width, colours);
  if (scene.cursor !== null) {
    drawLine(ctx, scene, axis.of(scene.cursor), `looking at ${asMs(scene.cursor)}`, colours.dark ? "#ffb74d" : "#b34700", width, colours);
  }
  return { ...counts, columns };
}
