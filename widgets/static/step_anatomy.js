// StepAnatomy: a step's batch and times; on request its operations, layer by layer, and where they stand under the roofs.

async function render({ model, el }) {
  const ui = await panel(model, el, "Step anatomy", "Left and right arrow: another step. Up and down: an operation. Enter: take the next step apart. Esc: the newest step. "
    + "Bytes and flops are counted from the formulas, times are measured.");
  const tip = tooltip(ui);
  let v = { step: null, profiles: [], shown: null, roofs: null }, chosen = 0, places = [], auto = false, newsSince = 0, waiting = false, hovered = null;

  const em = (n) => `calc(${n}px * var(--tv-scale, 1))`;
  const note = element("div", { class: "tv-muted", style: { padding: ".4em 0" } });
  const layout = element("div", { style: { display: "flex", flexWrap: "wrap", gap: em(14), alignItems: "flex-start" } });
  const left = element("div", { style: { flex: `1 1 ${em(480)}`, minWidth: `min(100%, ${em(380)})` } });
  const right = element("div", { style: { flex: `1 1 ${em(420)}`, minWidth: `min(100%, ${em(360)})` } });
  layout.append(left, right);
  const batch = canvas(ui, { label: "the step's batch and its time", height: 96, draw: drawBatch });
  ui.body.append(note, layout);
  const table = canvas(ui, { parent: left, label: "operations: time by layer, rates", draw: drawTable });
  const roof = canvas(ui, { parent: right, label: "roofline: flops a second over flops a byte", draw: drawRoof });

  const take = button("take the next step apart", "runs the next step operation by operation, with a clock around each", profile);
  const autoButton = button("auto", "take about one step a second apart, while the engine runs and this can be seen", () => { auto = !auto; autoButton.setAttribute("aria-pressed", String(auto)); if (auto) profile(); }, { "aria-pressed": "false" });
  const back = button("◀", "the step before", () => move(-1), { "aria-label": "the step before" }), forth = button("▶", "the next step", () => move(1), { "aria-label": "the next step" });
  const newest = button("newest", "follow the newest step", () => ui.client.select({ step: null }));
  ui.tools.append(take, autoButton, back, forth, newest);

  async function profile() {
    if (profile.busy) return;
    profile.busy = true;
    try {
      await ui.ask("profile_next_step");
      waiting = true;
      ui.complain(null);
    } catch (error) {
      waiting = false;
      auto = false;
      autoButton.setAttribute("aria-pressed", "false");
      if (ui.client.live.kind === "replay") note.textContent = replayNote(); else ui.complain(error);
    }
    profile.busy = false;
    changed();
  }
  const replayNote = () => v.shown ? "This is a recording: the steps that were taken apart then are here; no more can be." : "This is a recording, and no step of it was taken apart: only batches and times are known.";
  // About once a second, and only if steps have come in since: they come only while the panel can be seen.
  const timer = setInterval(() => { if (auto && newsSince && !document.hidden && !waiting) { newsSince = 0; profile(); } }, 1000);
  ui.undo.push(() => clearInterval(timer));

  function move(by) {
    if (!v.step) return;
    const step = Math.max(v.oldest, Math.min(v.newest, v.step.step + by));
    ui.client.select({ step });
  }

  function takeIn(x) {
    if (x.step && x.newest !== v.newest) newsSince += 1;
    if (x.shown !== undefined) {
      if (x.profiles.length && (!v.profiles?.length || x.profiles.at(-1).seq !== v.profiles.at(-1).seq)) waiting = false;
      const fresh = !v.shown;
      v = { ...v, ns: null, ...x, roofs: x.roofs || v.roofs };
      if (fresh && v.shown) chosen = v.shown.names.map((_, i) => opNs(i)).reduce((best, ns, i, all) => ns > all[best] ? i : best, 0);
      chosen = Math.min(chosen, Math.max(0, (x.shown?.names.length || 1) - 1));
    } else v = { ...v, ...x };
    if (v.shown && !v.roofs) askRoofs();
    changed();
  }

  // A recording says what the roofs were; a running engine is asked.
  async function askRoofs() {
    if (askRoofs.asked || ui.client.live.kind === "replay") return;
    askRoofs.asked = true;
    try { const roofs = await ui.ask("ceilings"); v = { ...v, roofs }; changed(); } catch (error) { ui.complain(error); }
  }

  function changed() {
    const replay = ui.client.live.kind === "replay";
    note.textContent = !v.step ? "Nothing has run yet. Give the engine a prompt: each step appears here, with who was in it and how long it took."
      : waiting ? "The next step will be taken apart. (The first one compiles each operation by itself: some seconds.)"
        : v.shown ? "" : replay ? replayNote() : "Press “take the next step apart”: its operations, their times, and where they stand under the machine's roofs.";
    note.style.minHeight = "1.4em";  // so that nothing jumps when it speaks
    take.disabled = autoButton.disabled = replay;
    batch.node.style.display = v.step ? "block" : "none";
    layout.style.display = v.shown ? "flex" : "none";
    for (const c of [batch, table, roof]) c.invalidate();
    const op = v.shown?.names[chosen];
    Object.assign(ui.root.dataset, { step: v.step?.step ?? "", requests: v.step?.requests ?? 0, tokens: v.step?.tokens ?? 0, profiled: v.shown?.step ?? "", profiles: v.profiles.length,
      operations: v.shown?.names.length ?? 0, chosen: op ?? "", totalNs: v.shown ? total(v.ns) : 0, waiting: waiting, auto });
    if (v.step) ui.say(`Step ${v.step.step}: ${v.step.requests} requests, ${v.step.tokens} tokens${v.step.runner === null ? "" : `, ${asTime(v.step.runner * 1e6)}`}${op ? `. ${op}: ${asTime(opNs(chosen))}` : ""}`);
  }

  const total = (array) => array.reduce((a, b) => a + b, 0);
  const columns = () => v.shown.layers + 1;
  const opNs = (i) => total(v.ns.subarray(i * columns(), (i + 1) * columns()));
  const font = (t, size, weight = "") => `${weight} ${Math.round(size * ui.scale)}px ${t.font}`;

  // ---- who and how long ----
  function drawBatch(ctx, width, height, t) {
    if (!v.step) return;
    const s = ui.scale, step = v.step, wanted = Math.round(104 * s);
    if (height !== wanted) { batch.setHeight(wanted); return; }
    ctx.font = font(t, 13, "600");
    ctx.fillStyle = t.text;
    const prefill = step.rows.filter((row) => row[4] === "prefill").length;
    const head = `step ${step.step}: ${asCount(step.tokens)} token${step.tokens === 1 ? "" : "s"} of ${asCount(step.requests)} request${step.requests === 1 ? "" : "s"}`
      + ` (${step.requests - prefill} decoding, ${prefill} in prefill)${step.error ? `, FAILED: ${step.error}` : ""}`;
    ctx.fillText(cutToWidth(ctx, head, width), 0, 9 * s);
    // The batch: as wide as its tokens.
    const y = 22 * s, h = 26 * s, each = width / Math.max(1, step.tokens);
    let x = 0, drawn = 0;
    ctx.font = font(t, 12);
    for (const [id, , count, , kind] of step.rows) {
      const w = Math.max(count * each, 0.5), look = requestLook(id);
      ctx.fillStyle = hatched(ctx, look.colour, look.hatch);
      ctx.fillRect(x, y, w - (w > 4 ? 1 : 0), h);
      ctx.fillStyle = kind === "prefill" ? STEP_KINDS.prefill.colour : STEP_KINDS.decode.colour;
      ctx.fillRect(x, y + h, w - (w > 4 ? 1 : 0), 4 * s);
      const text = `${id}: ${count > 1 ? `${count} tokens, ` : ""}${kind}`;
      if (w > 26 * s) { ctx.fillStyle = look.hatch ? t.panel : look.colour; const shown = cutToWidth(ctx, text, w - 8 * s), tw = ctx.measureText(shown).width; ctx.fillRect(x + 3 * s, y + 4 * s, tw + 4 * s, h - 8 * s); ctx.fillStyle = look.hatch ? t.text : inkOn(look.colour); ctx.fillText(shown, x + 5 * s, y + h / 2); }
      x += w;
      drawn += 1;
    }
    // Its time: the runner, and what lies between it and the step before.
    const runner = step.runner ?? 0, before = step.before ?? 0, all = Math.max(1e-9, runner + before), y2 = 62 * s, h2 = 16 * s;
    ctx.fillStyle = hatched(ctx, "#D55E00", 1);
    ctx.fillRect(0, y2, before / all * width, h2);
    ctx.fillStyle = t.dark ? "#56B4E9" : "#0072B2";
    ctx.fillRect(before / all * width, y2, runner / all * width, h2);
    ctx.fillStyle = t.text;
    const slowed = v.shown && v.profiles.some((p) => p.step === step.step) ? ", slowed by being taken apart" : "";
    const words = (step.runner === null ? "the runner is at work" : `runner ${asTime(runner * 1e6)} (${Math.round(100 * runner / all)}%${slowed})`)
      + (step.before === null ? "" : `; since the step before ${asTime(before * 1e6)}: text and scheduling, or waiting (idle, paused, speed limit)`);
    ctx.fillText(cutToWidth(ctx, words, width), 0, y2 + h2 + 11 * s);
    Object.assign(batch.node.dataset, { drawn, runnerShare: runner / all });
  }

  // ---- operations ----
  function drawTable(ctx, width, height, t) {
    if (!v.shown || !v.ns) return;
    const s = ui.scale, n = v.shown.names.length, line = Math.round(20 * s), top = 40 * s, wanted = Math.round(top + n * line + 24 * s);
    if (height !== wanted) { table.setHeight(wanted); return; }
    const name = Math.min(150 * s, width * 0.24), rates = Math.min(214 * s, width * 0.42), strip = Math.max(10, width - name - rates - 8 * s), cell = strip / columns();
    const sum = total(v.ns) || 1, most = Math.max(...v.ns, 1);
    ctx.font = font(t, 12, "600");
    ctx.fillStyle = t.text;
    ctx.fillText(cutToWidth(ctx, `step ${v.shown.step} taken apart: ${asTime(sum)} in ${v.shown.names.length} operations`, width), 0, 9 * s);
    ctx.font = font(t, 10);
    ctx.fillStyle = t.muted;
    ctx.fillText("layer", name - ctx.measureText("layer").width - 6 * s, 30 * s);
    ctx.textAlign = "center";
    for (let layer = 0; layer < v.shown.layers; layer++) if (cell > 13 * s || layer % Math.ceil(13 * s / cell) === 0) ctx.fillText(String(layer), name + (layer + 0.5) * cell, 30 * s);
    ctx.fillText("–", name + (v.shown.layers + 0.5) * cell, 30 * s);
    ctx.textAlign = "right";
    const at = [0.32, 0.66, 1].map((share) => width - rates + rates * share);
    ["time", "GB/s", "GFLOP/s"].forEach((text, i) => ctx.fillText(text, at[i], 30 * s));
    for (let i = 0; i < n; i++) {
      const y = top + i * line, ns = opNs(i);
      if (i === chosen) { ctx.fillStyle = t.raised; ctx.fillRect(0, y, width, line); }
      ctx.font = font(t, 12, i === chosen ? "600" : "");
      ctx.textAlign = "left";
      ctx.fillStyle = t.text;
      ctx.fillText(cutToWidth(ctx, v.shown.names[i], name - 6 * s), 0, y + line / 2);
      for (let c = 0; c < columns(); c++) {
        const value = v.ns[i * columns() + c];
        if (!value) continue;
        const [r, g, b] = viridis(Math.sqrt(value / most));
        ctx.fillStyle = `rgb(${r} ${g} ${b})`;
        ctx.fillRect(name + c * cell, y + 2, Math.max(1, cell - 1), line - 4);
      }
      // The share of the step as a line under the numbers.
      ctx.fillStyle = "#D55E00";
      ctx.fillRect(width - rates + 6 * s, y + line - 3 * s, (rates - 6 * s) * ns / sum, 2 * s);
      ctx.textAlign = "right";
      ctx.fillStyle = t.text;
      ctx.fillText(asTime(ns), at[0], y + line / 2);
      ctx.fillText(ns ? short(v.bytes[i] / ns) : "", at[1], y + line / 2);
      ctx.fillText(ns && v.flops[i] ? short(v.flops[i] / ns) : "–", at[2], y + line / 2);
    }
    ctx.textAlign = "left";
    ctx.fillStyle = t.muted;
    ctx.font = font(t, 10);
    ctx.fillText(cutToWidth(ctx, `${v.shown.device || ""}; clock: ${v.shown.clock || "not said"}`, width), 0, top + n * line + 12 * s);
    table.node.dataset.lines = n;
  }
  const asTime = (ns) => ns < 1000 ? `${Math.round(ns)} ns` : ns < 1e6 ? `${(ns / 1e3).toPrecision(3)} µs` : ns < 1e9 ? `${(ns / 1e6).toPrecision(3)} ms` : `${(ns / 1e9).toPrecision(3)} s`;
  const short = (x) => x >= 100 ? asCount(Math.round(x)) : x >= 1 ? x.toPrecision(3) : x.toFixed(2);

  // ---- the roofline ----
  function drawRoof(ctx, width, height, t) {
    if (!v.shown || !v.ns) return;
    const s = ui.scale, newestKind = (v.profiles.find((p) => p.step === v.shown.step) || {}).kind || "mixed";
    const operations = v.shown.names.map((label, i) => ({ label, kind: newestKind, ns: opNs(i), bytes: v.bytes[i], flops: v.flops[i], chosen: i === chosen, index: i }));
    const steps = v.profiles.map((p, i) => ({ ...p, strong: true, faded: p.step !== v.shown.step && i < v.profiles.length - 8,
      label: p.step === v.shown.step ? `step ${p.step}` : "" }));
    places = drawRoofline(ctx, { x: 0, y: 20 * s, width, height: height - 20 * s }, [...operations, ...steps], v.roofs, t, s);
    ctx.font = font(t, 11);
    ctx.textAlign = "left";
    let x = 70 * s;
    for (const kind of Object.values(STEP_KINDS)) {
      marker(ctx, kind.shape, x, 9 * s, 5 * s);
      ctx.fillStyle = kind.colour;
      ctx.fill();
      ctx.fillStyle = t.text;
      ctx.fillText(kind.words, x + 10 * s, 9 * s);
      x += ctx.measureText(kind.words).width + 30 * s;
    }
    marker(ctx, "circle", x, 9 * s, 4 * s);
    ctx.strokeStyle = t.text;
    ctx.lineWidth = 1.8 * s;
    ctx.stroke();
    ctx.fillText(cutToWidth(ctx, "one operation", width - x - 12 * s), x + 10 * s, 9 * s);
    if (!v.roofs) { ctx.fillStyle = t.muted; ctx.fillText("the machine's roofs were not recorded", 80 * s, 32 * s); }
    Object.assign(roof.node.dataset, { dots: places.length, steps: steps.length, roofs: v.roofs ? `${v.roofs.bandwidth},${v.roofs.peak}` : "",
      intensities: steps.map((p) => `${p.kind}:${p.flops / p.bytes}`).join(" ") });
  }

  // ---- the mouse and the keyboard ----
  const near = (event) => places.map((p) => [Math.hypot(p.x - event.offsetX, p.y - event.offsetY), p]).sort((a, b) => a[0] - b[0]).filter(([d]) => d < 14 * ui.scale)[0]?.[1];
  roof.node.addEventListener("mousemove", (event) => {
    const found = near(event);
    if (!found) return tip.hide();
    const d = found.dot;
    tip.show(event, `${d.strong ? `step ${d.step}, ${STEP_KINDS[d.kind].words}, ${d.tokens} tokens` : d.label}: ${asTime(d.ns)}, ${asBytes(d.bytes)}, ${asRate(d.flops, "flop")}\n`
      + `${(d.flops / d.bytes).toPrecision(3)} flops a byte, ${asRate(d.bytes / d.ns * 1e9, "B/s")}, ${asRate(d.flops / d.ns * 1e9, "flop/s")}`);
  });
  roof.node.addEventListener("mouseleave", () => tip.hide());
  roof.node.addEventListener("click", (event) => {
    const found = near(event);
    if (found?.dot.strong) ui.client.select({ step: found.dot.step });
    else if (found) { chosen = found.dot.index; changed(); }
  });
  const lineAt = (event) => Math.floor((event.offsetY - 40 * ui.scale) / Math.round(20 * ui.scale));
  table.node.addEventListener("click", (event) => { const i = lineAt(event); if (v.shown && i >= 0 && i < v.shown.names.length) { chosen = i; changed(); } });
  table.node.addEventListener("mousemove", (event) => {
    const i = lineAt(event);
    if (!v.shown || i < 0 || i >= v.shown.names.length) return tip.hide();
    tip.show(event, `${v.shown.names[i]}: ${v.calls[i]} call${v.calls[i] === 1 ? "" : "s"}, ${asTime(opNs(i))}, ${(100 * opNs(i) / (total(v.ns) || 1)).toFixed(1)}% of the step\n${asBytes(v.bytes[i])} moved, ${v.flops[i] ? asRate(v.flops[i], "flop") : "no arithmetic"}`);
  });
  table.node.addEventListener("mouseleave", () => tip.hide());
  batch.node.addEventListener("mousemove", (event) => {
    if (!v.step || event.offsetY < 22 * ui.scale || event.offsetY > 54 * ui.scale) return tip.hide();
    let at = event.offsetX / batch.node.clientWidth * v.step.tokens;
    const row = v.step.rows.find(([, , count]) => (at -= count) < 0);
    if (!row) return tip.hide();
    tip.show(event, `request ${row[0]}: ${row[2]} token${row[2] === 1 ? "" : "s"} from position ${row[1]}, ${row[4]}${row[3] ? ", then one is sampled" : ""}`);
    hovered = row[0];
  });
  batch.node.addEventListener("mouseleave", () => { hovered = null; tip.hide(); });
  batch.node.addEventListener("click", () => { if (hovered !== null) ui.client.select({ request: hovered }); });
  for (const { node } of [batch, table, roof]) node.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") { if (v.shown) chosen = Math.max(0, Math.min(v.shown.names.length - 1, chosen + (event.key === "ArrowUp" ? -1 : 1))); changed(); }
    else if (event.key === "Enter") profile();
    else if (event.key === "Escape") ui.client.select({ step: null });
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  ui.undo.push(ui.client.onLive(() => { if (take.disabled !== (ui.client.live.kind === "replay")) changed(); }));
  const subscribe = () => ui.subscribe("step_anatomy", {}, { snapshot: takeIn, delta: takeIn });
  let end = subscribe(), shownStep = ui.client.selection.step;
  // While the past is shown nothing comes by itself: another step has to be asked for.
  ui.undo.push(ui.client.onSelection(() => {
    if (ui.client.selection.step === shownStep) return;
    shownStep = ui.client.selection.step;
    if (ui.client.cursor !== null && ui.client.cursor !== undefined) { end(); end = subscribe(); }
  }));
  changed();
  return ui.dispose;
}

export default { render };
