// StepAnatomy: a step's batch and times; on request its operations, layer by layer, and where they stand under the roofs.

const STEP_HINT = "Left and right arrow: another step. Up and down: an operation. Enter: take the next step apart. "
  + "Esc: the newest step. Bytes and flops are counted from the formulas, times are measured.";
const NO_STEP = "Nothing has run yet. Give the engine a prompt: each step appears here, with who was in it and how long "
  + "it took.";
const SOON = "The next step will be taken apart. (The first one compiles each operation by itself: some seconds.)";
const PRESS = "Press “take the next step apart”: its operations, their times, and where they stand under the machine's roofs.";
const RECORDED = "This is a recording: the steps that were taken apart then are here; no more can be.";
const RECORDED_NONE = "This is a recording, and no step of it was taken apart: only batches and times are known.";

async function render({ model, el }) {
  const ui = await panel(model, el, "Step anatomy", STEP_HINT), tip = tooltip(ui);
  let v = { step: null, profiles: [], shown: null, roofs: null }, chosen = 0, places = [], pointed = null;
  let auto = false, news = 0, waiting = false;  // news: steps since the last question; waiting: for a profile

  // ---- the frame ----
  const em = (n) => `calc(${n}px * var(--tv-scale, 1))`;
  const column = (basis, least) => element("div", { style: { flex: `1 1 ${em(basis)}`, minWidth: `min(100%, ${em(least)})` } });
  const left = column(480, 380), right = column(420, 360);
  const layout = element("div", { style: { display: "flex", flexWrap: "wrap", gap: em(14), alignItems: "flex-start" } },
    left, right);
  const note = element("div", { class: "tv-muted", style: { padding: ".4em 0", minHeight: "1.4em" } });
  const batch = canvas(ui, { label: "the step's batch and its time", height: 104, draw: drawBatch });
  ui.body.append(note, layout);
  const table = canvas(ui, { parent: left, label: "operations: time by layer, rates", draw: drawTable });
  const roof = canvas(ui, { parent: right, label: "roofline: flops a second over flops a byte", draw: drawRoof });
  const take = button("take the next step apart", "runs it operation by operation, with a clock around each", profile);
  const autoButton = button("auto", "take about one step a second apart, while the engine runs and this can be seen",
    () => { setAuto(!auto); if (auto) profile(); }, { "aria-pressed": "false" });
  ui.tools.append(take, autoButton,
    button("◀", "the step before", () => move(-1), { "aria-label": "the step before" }),
    button("▶", "the next step", () => move(1), { "aria-label": "the next step" }),
    button("newest", "follow the newest step", () => ui.client.select({ step: null })));

  // ---- what is asked ----
  const isReplay = () => ui.client.live.kind === "replay";
  function setAuto(on) {
    auto = on;
    autoButton.setAttribute("aria-pressed", String(auto));
    changed();
  }
  let asking = false;
  async function profile() {
    if (asking || isReplay()) return;
    asking = true;
    try {
      await ui.ask("profile_next_step");
      waiting = true;
      ui.complain(null);
    } catch (error) {
      waiting = false;
      setAuto(false);
      ui.complain(error);
    }
    asking = false;
    changed();
  }
  // About once a second, and only if steps have come in since: they come only while the panel can be seen.
  const timer = setInterval(() => {
    if (!auto || !news || document.hidden || waiting) return;
    news = 0;
    profile();
  }, 1000);
  ui.undo.push(() => clearInterval(timer));

  // A recording says what the roofs were; a running engine is asked.
  let roofsAsked = false;
  async function askRoofs() {
    if (roofsAsked || isReplay()) return;
    roofsAsked = true;
    try {
      v = { ...v, roofs: await ui.ask("ceilings") };
      changed();
    } catch (error) { ui.complain(error); }
  }
  function move(by) {
    if (v.step) ui.client.select({ step: Math.max(v.oldest, Math.min(v.newest, v.step.step + by)) });
  }

  // ---- what comes in ----
  function takeIn(x) {
    if (x.step && x.newest !== v.newest) news += 1;
    if (x.shown !== undefined) {
      const isNew = x.profiles.length && x.profiles.at(-1).seq !== v.profiles.at(-1)?.seq, first = !v.shown;
      if (isNew) waiting = false;
      v = { ...v, ...x, roofs: x.roofs || v.roofs };
      if (first && v.shown) chosen = v.shown.names.reduce((best, _, i) => opNs(i) > opNs(best) ? i : best, 0);
      chosen = Math.min(chosen, Math.max(0, (v.shown?.names.length ?? 1) - 1));
      if (v.shown && !v.roofs) askRoofs();
    } else v = { ...v, ...x };
    changed();
  }
  const columns = () => v.shown.layers + 1;
  const opNs = (i) => sumOf(v.ns.subarray(i * columns(), (i + 1) * columns()));

  function changed() {
    const op = v.shown?.names[chosen], step = v.step;
    note.textContent = !step ? NO_STEP : waiting ? SOON : isReplay() ? (v.shown ? RECORDED : RECORDED_NONE)
      : v.shown ? "" : PRESS;
    take.disabled = autoButton.disabled = isReplay();
    batch.node.style.display = step ? "block" : "none";
    layout.style.display = v.shown ? "flex" : "none";
    for (const drawing of [batch, table, roof]) drawing.invalidate();
    Object.assign(ui.root.dataset, { step: step?.step ?? "", requests: step?.requests ?? 0, tokens: step?.tokens ?? 0,
      profiled: v.shown?.step ?? "", profiles: v.profiles.length, operations: v.shown?.names.length ?? 0, chosen: op ?? "",
      totalNs: v.shown ? sumOf(v.ns) : 0, waiting, auto });
    if (!step) return;
    const took = step.runner === null ? "" : `, ${asTime(step.runner * 1e6)}`;
    ui.say(`Step ${step.step}: ${plural(step.requests, "request")}, ${plural(step.tokens, "token")}${took}`
      + (op ? `. ${op}: ${asTime(opNs(chosen))}` : ""));
  }

  // ---- drawing ----
  function drawBatch(ctx, width, height, t) {
    if (!v.step) return;
    const wanted = Math.round(104 * ui.scale);
    if (height !== wanted) { batch.setHeight(wanted); return; }
    const slowed = v.profiles.some((p) => p.step === v.step.step);
    Object.assign(batch.node.dataset, drawBatchAndTime(ctx, width, v.step, slowed, ui.scale, t));
  }
  function drawTable(ctx, width, height, t) {
    if (!v.shown) return;
    const wanted = tableSizes(ui.scale, v.shown.names.length).height;
    if (height !== wanted) { table.setHeight(wanted); return; }
    drawOperations(ctx, width, { ...v, columns: columns(), opNs }, chosen, ui.scale, t);
    table.node.dataset.lines = v.shown.names.length;
  }
  function drawRoof(ctx, width, height, t) {
    if (!v.shown) return;
    const s = ui.scale, now = v.profiles.find((p) => p.step === v.shown.step);
    const operations = v.shown.names.map((label, i) => ({ label, kind: now?.kind ?? "mixed", ns: opNs(i), bytes: v.bytes[i],
      flops: v.flops[i], chosen: i === chosen, index: i }));
    const steps = v.profiles.map((p, i) => ({ ...p, strong: true, faded: p !== now && i < v.profiles.length - 8,
      label: p === now ? `step ${p.step}` : "" }));
    drawRooflineKey(ctx, 70 * s, 9 * s, width, s, t);
    places = drawRoofline(ctx, { x: 0, y: 20 * s, width, height: height - 20 * s }, [...operations, ...steps], v.roofs, t, s);
    if (!v.roofs) {
      ctx.fillStyle = t.muted;
      ctx.fillText("the machine's roofs were not recorded", 80 * s, 34 * s);
    }
    Object.assign(roof.node.dataset, { dots: places.length, steps: steps.length,
      roofs: v.roofs ? `${v.roofs.bandwidth},${v.roofs.peak}` : "",
      intensities: steps.map((p) => `${p.kind}:${p.flops / p.bytes}`).join(" ") });
  }

  // ---- the mouse and the keyboard ----
  function dotAt(event) {
    const far = (p) => Math.hypot(p.x - event.offsetX, p.y - event.offsetY);
    const nearest = places.reduce((best, p) => !best || far(p) < far(best) ? p : best, null);
    return nearest && far(nearest) < 14 * ui.scale ? nearest.dot : null;
  }
  function lineAt(event) {
    const { top, line } = tableSizes(ui.scale, 0), i = Math.floor((event.offsetY - top) / line);
    return v.shown && i >= 0 && i < v.shown.names.length ? i : -1;
  }
  function rowAt(event) {
    if (!v.step || event.offsetY < 22 * ui.scale || event.offsetY > 54 * ui.scale) return null;
    let left = event.offsetX / batch.node.clientWidth * v.step.tokens;
    return v.step.rows.find(([, , count]) => (left -= count) < 0) ?? null;
  }
  const point = (drawing, describe) => {
    drawing.node.addEventListener("mousemove", (event) => {
      const text = describe(event);
      if (text) tip.show(event, text); else tip.hide();
    });
    drawing.node.addEventListener("mouseleave", () => tip.hide());
  };
  point(roof, (event) => {
    const dot = dotAt(event);
    if (!dot) return "";
    const name = dot.strong ? `step ${dot.step}, ${STEP_KINDS[dot.kind].words}, ${plural(dot.tokens, "token")}` : dot.label;
    return `${name}: ${asTime(dot.ns)}, ${asBytes(dot.bytes)}, ${asRate(dot.flops, "flop")}\n`
      + `${(dot.flops / dot.bytes).toPrecision(3)} flops a byte, ${asRate(dot.bytes / dot.ns * 1e9, "B/s")}, `
      + asRate(dot.flops / dot.ns * 1e9, "flop/s");
  });
  point(table, (event) => {
    const i = lineAt(event);
    if (i < 0) return "";
    return `${v.shown.names[i]}: ${plural(v.calls[i], "call")}, ${asTime(opNs(i))}, `
      + `${(100 * opNs(i) / (sumOf(v.ns) || 1)).toFixed(1)}% of the step\n`
      + `${asBytes(v.bytes[i])} moved, ${v.flops[i] ? asRate(v.flops[i], "flop") : "no arithmetic"}`;
  });
  point(batch, (event) => {
    pointed = rowAt(event);
    if (!pointed) return "";
    const [id, start, count, sampled, kind] = pointed;
    return `request ${id}: ${plural(count, "token")} from position ${start}, ${kind}${sampled ? ", then one is sampled" : ""}`;
  });
  batch.node.addEventListener("click", () => { if (pointed) ui.client.select({ request: pointed[0] }); });
  table.node.addEventListener("click", (event) => { if (lineAt(event) >= 0) { chosen = lineAt(event); changed(); } });
  roof.node.addEventListener("click", (event) => {
    const dot = dotAt(event);
    if (dot?.strong) ui.client.select({ step: dot.step });
    else if (dot) { chosen = dot.index; changed(); }
  });
  const keys = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), Enter: profile, Escape: () => ui.client.select({ step: null }),
    ArrowUp: () => { chosen = Math.max(0, chosen - 1); changed(); },
    ArrowDown: () => { chosen = Math.min(Math.max(0, (v.shown?.names.length ?? 1) - 1), chosen + 1); changed(); },
  };
  for (const { node } of [batch, table, roof]) {
    node.addEventListener("keydown", (event) => {
      if (!(event.key in keys)) return;
      keys[event.key]();
      event.preventDefault();
      event.stopPropagation();
    });
  }

  ui.undo.push(ui.client.onLive(() => { if (take.disabled !== isReplay()) changed(); }));
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
