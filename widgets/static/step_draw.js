// What StepAnatomy draws beside the roofline: a step's batch and time, and the table of its operations.

function asTime(ns) {
  if (ns < 1000) return `${Math.round(ns)} ns`;
  const [scale, unit] = ns < 1e6 ? [1e3, "µs"] : ns < 1e9 ? [1e6, "ms"] : [1e9, "s"];
  return `${(ns / scale).toPrecision(3)} ${unit}`;
}
const inFont = (t, s, size, weight = "") => `${weight} ${Math.round(size * s)}px ${t.font}`;
const sumOf = (array) => array.reduce((a, b) => a + b, 0);
const plural = (n, what) => `${asCount(n)} ${what}${n === 1 ? "" : "s"}`;
const shortRate = (x) => x >= 100 ? asCount(Math.round(x)) : x >= 1 ? x.toPrecision(3) : x.toFixed(2);

// Who was in the step, as wide as their tokens, and its time below. slowed: it was taken apart.
// Returns {drawn: requests drawn, runnerShare}.
function drawBatchAndTime(ctx, width, step, slowed, s, t) {
  const prefill = step.rows.filter((row) => row[4] === "prefill").length;
  const head = `step ${step.step}: ${plural(step.tokens, "token")} of ${plural(step.requests, "request")} `
    + `(${step.rows.length - prefill} decoding, ${prefill} in prefill)${step.error ? `, FAILED: ${step.error}` : ""}`;
  ctx.font = inFont(t, s, 13, "600");
  ctx.fillStyle = t.text;
  ctx.fillText(cutToWidth(ctx, head, width), 0, 9 * s);

  const y = 22 * s, h = 26 * s, each = width / Math.max(1, step.tokens);
  let x = 0, drawn = 0;
  ctx.font = inFont(t, s, 12);
  for (const [id, , count, , kind] of step.rows) {
    const w = Math.max(count * each, 0.5), filled = w - (w > 4 ? 1 : 0), look = requestLook(id);
    ctx.fillStyle = hatched(ctx, look.colour, look.hatch);
    ctx.fillRect(x, y, filled, h);
    ctx.fillStyle = STEP_KINDS[kind].colour;
    ctx.fillRect(x, y + h, filled, 4 * s);
    if (w > 26 * s) {  // its name, on a ground that hides the hatch
      const text = cutToWidth(ctx, `${id}: ${count > 1 ? `${count} tokens, ` : ""}${kind}`, w - 8 * s);
      ctx.fillStyle = look.hatch ? t.panel : look.colour;
      ctx.fillRect(x + 3 * s, y + 4 * s, ctx.measureText(text).width + 4 * s, h - 8 * s);
      ctx.fillStyle = look.hatch ? t.text : inkOn(look.colour);
      ctx.fillText(text, x + 5 * s, y + h / 2);
    }
    x += w;
    drawn += 1;
  }

  const runner = step.runner ?? 0, before = step.before ?? 0, all = Math.max(1e-9, runner + before);
  const y2 = 62 * s, h2 = 16 * s, border = before / all * width;
  ctx.fillStyle = hatched(ctx, "#D55E00", 1);
  ctx.fillRect(0, y2, border, h2);
  ctx.fillStyle = t.dark ? "#56B4E9" : "#0072B2";
  ctx.fillRect(border, y2, runner / all * width, h2);
  const share = `${Math.round(100 * runner / all)}%${slowed ? ", slowed by being taken apart" : ""}`;
  const words = (step.runner === null ? "the runner is at work" : `runner ${asTime(runner * 1e6)} (${share})`)
    + (step.before === null ? "" : `; since the step before ${asTime(before * 1e6)}`);
  const more = step.before === null ? [""] : [": text and scheduling, or waiting (idle, paused, speed limit)", ": text, scheduling, waiting", ""];
  const said = more.map((end) => words + end).find((text) => ctx.measureText(text).width <= width) ?? cutToWidth(ctx, words, width);
  ctx.fillStyle = t.text;
  ctx.fillText(said, 0, y2 + h2 + 11 * s);
  return { drawn, runnerShare: runner / all };
}

// Heights of the table's parts, in CSS pixels.
const tableSizes = (s, lines) => {
  const top = 40 * s, line = Math.round(20 * s);
  return { top, line, height: Math.round(top + lines * line + 24 * s) };
};

// The operations of a profile: time by layer as colours (viridis, by the root of the time), totals and rates as numbers.
// p: {shown, ns, bytes, flops, columns, opNs(i)}.
function drawOperations(ctx, width, p, chosen, s, t) {
  const { names, layers, step, device, clock } = p.shown, { top, line } = tableSizes(s, names.length);
  const name = Math.min(150 * s, width * 0.24), rates = Math.min(214 * s, width * 0.42);
  const cell = Math.max(10, width - name - rates - 8 * s) / p.columns, sum = sumOf(p.ns) || 1, most = Math.max(...p.ns, 1);
  const at = [0.32, 0.66, 1].map((share) => width - rates + rates * share);
  ctx.font = inFont(t, s, 12, "600");
  ctx.fillStyle = t.text;
  ctx.fillText(cutToWidth(ctx, `step ${step} taken apart: ${asTime(sum)} in ${plural(names.length, "operation")}`, width), 0, 9 * s);
  ctx.font = inFont(t, s, 11);
  ctx.fillStyle = t.muted;
  ctx.textAlign = "right";
  ctx.fillText("layer", name - 6 * s, 30 * s);
  ["time", "GB/s", "GFLOP/s"].forEach((text, i) => ctx.fillText(text, at[i], 30 * s));
  ctx.textAlign = "center";
  for (let layer = 0; layer < layers; layer += Math.max(1, Math.ceil(13 * s / cell))) {
    ctx.fillText(String(layer), name + (layer + 0.5) * cell, 30 * s);
  }
  ctx.fillText("–", name + (layers + 0.5) * cell, 30 * s);
  names.forEach((text, i) => {
    const y = top + i * line, ns = p.opNs(i);
    if (i === chosen) {
      ctx.fillStyle = t.raised;
      ctx.fillRect(0, y, width, line);
    }
    ctx.font = inFont(t, s, 12, i === chosen ? "600" : "");
    ctx.textAlign = "left";
    ctx.fillStyle = t.text;
    ctx.fillText(cutToWidth(ctx, text, name - 6 * s), 0, y + line / 2);
    for (let c = 0; c < p.columns; c++) {
      const value = p.ns[i * p.columns + c];
      if (!value) continue;
      const [r, g, b] = viridis(Math.sqrt(value / most));
      ctx.fillStyle = `rgb(${r} ${g} ${b})`;
      ctx.fillRect(name + c * cell, y + 2, Math.max(1, cell - 1), line - 4);
    }
    ctx.fillStyle = "#D55E00";  // the share of the step, as a line under the numbers
    ctx.fillRect(width - rates + 6 * s, y + line - 3 * s, (rates - 6 * s) * ns / sum, 2 * s);
    ctx.textAlign = "right";
    ctx.fillStyle = t.text;
    ctx.fillText(asTime(ns), at[0], y + line / 2);
    ctx.fillText(ns ? shortRate(p.bytes[i] / ns) : "", at[1], y + line / 2);
    ctx.fillText(ns && p.flops[i] ? shortRate(p.flops[i] / ns) : "–", at[2], y + line / 2);
  });
  ctx.textAlign = "left";
  ctx.fillStyle = t.muted;
  ctx.font = inFont(t, s, 11);
  const foot = `${device || "device not said"}; clock: ${clock || "not said"}`;
  ctx.fillText(cutToWidth(ctx, foot, width), 0, top + names.length * line + 12 * s);
}
