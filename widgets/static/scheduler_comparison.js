// SchedulerComparison: recorded runs of the same arrivals, one above the other on one axis. All figures come from Python.

const PER_RUN = { head: 22, queue: 22, gap: 8 };   // heights at scale 1: name, waiting, space below

function comparisonLayout(runs, height, scale) {
  const ruler = 20 * scale, fixed = (PER_RUN.head + PER_RUN.queue + PER_RUN.gap) * scale;
  const seats = runs.reduce((sum, run) => sum + Math.max(run.seats, 1), 0);
  const row = Math.max(1, (height - ruler - fixed * runs.length) / seats);
  let top = ruler;
  return runs.map((run) => {
    const place = { top, queue: top + PER_RUN.head * scale, seats: top + (PER_RUN.head + PER_RUN.queue) * scale, row };
    place.bottom = place.seats + run.seats * row;
    top = place.bottom + PER_RUN.gap * scale;
    return place;
  });
}

const share = (part, whole) => whole ? `${Math.round(100 * part / whole)}%` : "-";

// Seats that stand empty: red stripes while somebody waits, grey dots while nobody does.
function emptySeat(ctx, wasted, colours) {
  const tile = element("canvas", { width: 8, height: 8 }), c = tile.getContext("2d");
  c.strokeStyle = c.fillStyle = wasted ? (colours.dark ? "#ff8a50" : "#D55E00") : colours.muted;
  c.lineWidth = 1.8;
  c.beginPath();
  if (wasted) { c.moveTo(-2, 2); c.lineTo(2, -2); c.moveTo(0, 8); c.lineTo(8, 0); c.moveTo(6, 10); c.lineTo(10, 6); c.stroke(); }
  else { c.arc(4, 4, 1, 0, 2 * Math.PI); c.fill(); }
  return ctx.createPattern(tile, "repeat");
}

function drawRun(ctx, scene, run, place, width, colours, drawn) {
  const { scale, axis, x } = scene, figures = run[axis], { row } = place;
  const begin = x(figures.begin), end = x(figures.end), unit = axis === "steps" ? " steps" : "";
  const amount = (value) => axis === "steps" ? asCount(Math.round(value)) : asMs(value);
  ctx.font = `600 ${13 * scale}px ${colours.font}`;
  ctx.textAlign = "left";
  ctx.fillStyle = colours.text;
  const title = fitted(ctx, run.name, width * 0.4);
  ctx.fillText(title, 4 * scale, place.top + PER_RUN.head * scale / 2 + 1);
  const after = 4 * scale + ctx.measureText(title).width + 12 * scale;
  ctx.font = `${12 * scale}px ${colours.font}`;
  ctx.fillStyle = colours.muted;
  const inWords = `${amount(figures.total)}${unit}, idle ${share(figures.idle, figures.area)}` +
    (figures.idle ? `, of that ${share(figures.wasted, figures.idle)} while somebody waited` : "");
  ctx.fillText(fitted(ctx, inWords, width - after), after, place.top + PER_RUN.head * scale / 2 + 1);

  // Who waits: a curve of its own.
  const most = Math.max(1, scene.mostWaiting), tall = (PER_RUN.queue - 6) * scale, floor = place.seats - 3 * scale;
  const { waiting } = figures;
  const segments = waiting.map(([at, count], i) => [at, i + 1 < waiting.length ? waiting[i + 1][0] : figures.end, count]);
  ctx.fillStyle = KIND_COLOURS.waiting;
  for (const [from, to, count] of segments) {
    if (count) ctx.fillRect(x(from), floor - count / most * tall, Math.max(1, x(to) - x(from)), count / most * tall);
  }
  ctx.fillStyle = colours.line;
  ctx.fillRect(begin, floor, end - begin, 1);
  ctx.fillStyle = colours.text;   // arrivals: the same in every run
  for (const arrival of run.arrivals) ctx.fillRect(x(arrival[axis]), floor - 2 * scale, Math.max(1, scale), 5 * scale);

  ctx.fillStyle = emptySeat(ctx, false, colours);
  ctx.fillRect(begin, place.seats, end - begin, run.seats * row);
  const red = emptySeat(ctx, true, colours);
  for (const [from, to, count] of segments) {
    const left = Math.max(begin, x(from)), right = Math.min(end, x(to));
    if (!count || right <= left) continue;
    ctx.clearRect(left, place.seats, right - left, run.seats * row);
    ctx.fillStyle = red;
    ctx.fillRect(left, place.seats, right - left, run.seats * row);
  }
  const chosen = [];
  for (const bar of run.bars) {
    const [from, decode, to] = bar[axis].map(x), top = place.seats + bar.seat * row, inner = row - (row > 6 ? 2 : row > 2 ? 0.5 : 0);
    const wide = Math.max(1, to - from), look = requestLook(bar.id);
    ctx.clearRect(from, top, wide, row);
    ctx.fillStyle = KIND_COLOURS.prefill;
    ctx.fillRect(from, top, Math.max(1, decode - from), inner);
    ctx.fillStyle = KIND_COLOURS.decode;
    ctx.fillRect(decode, top, Math.max(0, to - decode), inner);
    ctx.fillStyle = bar.end === "preempted" ? KIND_COLOURS.preempted : colours.text;
    ctx.fillRect(to - Math.min(2 * scale, wide / 2), top, Math.min(2 * scale, wide / 2), inner);
    if (inner >= 9) {
      ctx.font = `600 ${Math.min(12 * scale, inner * 0.8)}px ${colours.font}`;
      const text = fitted(ctx, bar.id, to - decode - 12);
      if (text) {
        const size = ctx.measureText(text).width + 6;
        ctx.fillStyle = colours.panel;   // a gap, or the name would look like a part of the bar
        ctx.fillRect(decode, top, size + 4, inner);
        ctx.fillStyle = hatched(ctx, look.colour, look.hatch);
        ctx.fillRect(decode + 2, top, size, inner);
        if (look.hatch) { ctx.fillStyle = look.colour; ctx.fillRect(decode + 4, top + 1, size - 4, inner - 2); }
        ctx.fillStyle = inkOn(look.colour);
        ctx.fillText(text, decode + 5, top + inner / 2 + 0.5);
      }
    }
    if (bar.id === scene.selected) chosen.push([from, top, wide, inner]);
    drawn.push({ run: run.name, bar, x: from, y: top, w: wide, h: row });
  }
  for (const box of chosen) frame(ctx, ...box, colours, scale);
  ctx.fillStyle = colours.text;
  ctx.fillRect(end - 1, place.seats - 2 * scale, 2, run.seats * row + 2 * scale);
  if (width - end > 90 * scale) {
    ctx.font = `${12 * scale}px ${colours.font}`;
    ctx.fillText("all done", end + 6 * scale, place.seats + run.seats * row / 2);
  }
}

async function render({ model: traits, el }) {
  const ui = await panel(traits, el, "Same arrivals, different scheduling",
    "One row a seat, one bar a request. The grey curve is the queue, its marks are arrivals. Click a request to find it in every run. Keys: up and down choose a request, T changes the axis.");
  const client = ui.client;
  let axis = traits.get("axis"), drawn = [];
  const runs = () => traits.get("figures").runs || [];

  const picture = canvas(ui, { label: "Comparison of runs", draw(ctx, width, height, colours) {
    const places = comparisonLayout(runs(), height, ui.scale), scale = ui.scale;
    const low = Math.min(...runs().map((run) => run[axis].begin)), high = Math.max(...runs().map((run) => run[axis].end));
    const margin = 6 * scale, perUnit = (width - 2 * margin) / Math.max(1e-9, high - low);
    const scene = { axis, scale, selected: client.selection.request, x: (at) => margin + (at - low) * perUnit,
      mostWaiting: Math.max(...runs().flatMap((run) => run[axis].waiting.map((level) => level[1])), 1) };
    const step = niceStep((high - low) / Math.max(2, width / (95 * scale)));
    ctx.fillStyle = colours.raised;
    ctx.fillRect(0, 0, width, 19 * scale);
    ctx.font = `${11 * scale}px ${colours.font}`;
    ctx.textAlign = "left";
    for (let mark = Math.ceil(low / step) * step; mark <= high && high > low; mark += step) {
      if (axis === "steps" && mark !== Math.round(mark)) continue;
      ctx.fillStyle = colours.faint;
      ctx.fillRect(scene.x(mark), 19 * scale, 1, height);
      ctx.fillStyle = colours.muted;
      const text = axis === "steps" ? `step ${asCount(mark)}` : timeLabel(mark, step, high);
      if (scene.x(mark) + 4 + ctx.measureText(text).width < width) ctx.fillText(text, scene.x(mark) + 4, 10 * scale);
    }
    drawn = [];
    runs().forEach((run, i) => drawRun(ctx, scene, run, places[i], width, colours, drawn));
    picture.node.drawn = drawn.map(({ run, bar, x, y, w, h }) => ({ run, id: bar.id, x, y, w, h }));
    Object.assign(picture.node.dataset, { runs: runs().length, bars: drawn.length, axis, low, high, perUnit });
  } });
  const node = picture.node;

  const legend = element("div", { class: "tv-legend" });
  const plain = (kind) => (ctx, width, height) => { ctx.fillStyle = KIND_COLOURS[kind]; ctx.fillRect(0, 0, width, height); };
  const empty = (wasted) => (ctx, width, height) => {
    ctx.fillStyle = emptySeat(ctx, wasted, theme(ui.root));
    ctx.fillRect(0, 0, width, height);
  };
  const setLegend = () => legend.replaceChildren(...legendSwatches([["prefill", plain("prefill")], ["decode", plain("decode")],
    ["a seat stands empty while somebody waits", empty(true)], ["empty, and nobody waits", empty(false)]], ui.scale));
  setLegend();
  ui.undo.push(onTheme(setLegend));
  ui.listen(traits, "change:scale", setLegend);
  ui.body.append(legend);

  const table = element("table", { class: "tv-comparison", style: { borderCollapse: "collapse", margin: "6px 0",
    fontVariantNumeric: "tabular-nums" } });
  ui.body.append(element("div", { style: { overflowX: "auto" } }, table));
  const cell = (tag, text, first) => element(tag, { text, scope: tag === "th" ? (first ? "row" : "col") : null,
    style: { padding: "0.1em 1.6em 0.1em 0", textAlign: first ? "left" : "right", overflowWrap: "anywhere",
      fontWeight: tag === "th" && !first ? "600" : "400" } });

  // One column a run: two runs are read side by side, and a projector's letters still fit.
  function fillTable() {
    const amount = (value) => value === null || value === undefined ? "-" : axis === "time" ? asMs(value)
      : Number.isInteger(value) ? asCount(value) : value.toFixed(1);
    const three = (s) => `${amount(s.mean)} · ${amount(s.p50)} · ${amount(s.p95)}`;
    const unit = axis === "time" ? "" : " (steps)";
    const rows = [
      [`total${unit}`, "total", (s) => amount(s.total)],
      [axis === "time" ? "idle seats × time" : "idle seats × steps", "idle",
        (s) => `${amount(Math.round(s.idle * 1000) / 1000)} = ${share(s.idle, s.area)}`],
      ["of that, while some waited", "wasted", (s) => amount(Math.round(s.wasted * 1000) / 1000)],
      [`TTFT mean · p50 · p95${unit}`, "ttft", (s) => three(s.ttft)],
      [`ITL mean · p50 · p95${unit}`, "itl", (s) => three(s.itl)],
      axis === "time" ? ["tokens a second", "rate", (s) => asCount(Math.round(s.tokens_per_second))]
        : ["tokens a step", "rate", (s) => (s.tokens_per_unit || 0).toFixed(2)],
      ["preemptions", "preemptions", (s, run) => asCount(run.preemptions)],
      ["prompt tokens from the cache", "cached", (s, run) => asCount(run.cached)],
    ];
    table.replaceChildren(element("tr", {}, cell("th", "", true), ...runs().map((run) => cell("th", run.name))),
      ...rows.map(([name, key, text]) => element("tr", { "data-row": key }, cell("th", name, true),
        ...runs().map((run) => cell("td", text(run[axis], run).replace(/(\d) (?=\w)/g, "$1\u00a0"))))));
    ui.complain(traits.get("figures").warning || null);
    ui.say(runs().map((run) => `${run.name}: ${amount(run[axis].total)}${axis === "steps" ? " steps" : ""}, ` +
      `idle ${share(run[axis].idle, run[axis].area)}`).join("; "));
  }

  function setAxis(value) {
    axis = value;
    axisButton.textContent = `axis: ${axis}`;
    fillTable();
    picture.invalidate();
  }
  const toggle = () => setAxis(axis === "steps" ? "time" : "steps");
  const axisButton = button(`axis: ${axis}`, "Steps, the same each time, or milliseconds as measured (T)", toggle);
  ui.tools.append(axisButton);

  const at = ({ offsetX: x, offsetY: y }) =>
    drawn.find((d) => x >= d.x - 1 && x <= d.x + d.w + 1 && y >= d.y && y < d.y + d.h);
  const tip = tooltip(ui);
  node.addEventListener("click", (event) => {
    node.focus({ preventScroll: true });
    const found = at(event);
    client.select({ request: found ? found.bar.id : null });
  });
  node.addEventListener("pointermove", (event) => {
    const found = at(event);
    if (!found) { tip.hide(); return; }
    const { bar, run } = found, arrival = runs().find((r) => r.name === run).arrivals.find((a) => a.id === bar.id);
    const [begin, decode, end] = bar[axis], say = (value) => axis === "steps" ? `${asCount(value)} steps` : asMs(value);
    tip.show(event, `${run}, request ${bar.id} (prompt ${arrival.prompt}): waited ${say(begin - arrival[axis])}, ` +
      `prefill ${say(decode - begin)}, decode ${say(end - decode)}, ${bar.end}`);
  });
  node.addEventListener("pointerleave", () => tip.hide());
  node.addEventListener("keydown", (event) => {
    const ids = [...new Set(runs().flatMap((run) => run.arrivals.map((arrival) => arrival.id)))];
    const here = ids.indexOf(client.selection.request);
    const action = { ArrowDown: () => client.select({ request: ids[Math.min(ids.length - 1, here + 1)] }),
      ArrowUp: () => client.select({ request: ids[Math.max(0, here - 1)] }), t: toggle, T: toggle,
      Escape: () => client.select({ request: null }) }[event.key];
    if (!action || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  });
  ui.undo.push(client.onSelection(() => picture.invalidate()));
  ui.listen(traits, "change:axis", () => setAxis(traits.get("axis")));
  ui.listen(traits, "change:figures", () => { fillTable(); picture.invalidate(); });
  fillTable();
  return ui.dispose;
}

export default { render };
