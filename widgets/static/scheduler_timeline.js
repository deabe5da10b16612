// SchedulerTimeline: what is seen of the run, and what a hand can do with it.

const FIRST_WINDOW = { time: 3000, steps: 60 };
const LEAST_WINDOW = { time: 0.02, steps: 2 };

async function render({ model: traits, el }) {
  const ui = await panel(traits, el, "Scheduler timeline",
    "Click a step or a request. Drag to move, drag the scale at the top to look back in time. Keys: arrows, + and -, " +
    "Home (whole run), End (follow now), [ and ] (steps), Esc. The wheel zooms once you have clicked into the picture.");
  const model = new TimelineModel(), client = ui.client;
  let axis = new Axis(model, traits.get("axis"));
  let follow = traits.get("follow"), span = traits.get("window") || FIRST_WINDOW[axis.mode], low = 0, scroll = 0;
  let fitRows = false, scene = null, drawn = null;

  // ---- where things are ----

  const now = () => client.live.state === "running" ? Math.max(model.lastMs, client.now) : model.lastMs;
  const nowPlace = () => axis.mode === "steps" ? model.steps.first + model.steps.length : now();
  const firstPlace = () => beginPlace() - span * 0.03;   // room for the first name
  const beginPlace = () => axis.mode === "steps" ? model.steps.first : model.beginMs || 0;

  function view(width, layout) {
    const space = layout.height - layout.lanesTop, scale = ui.scale;
    model.setComfortable(Math.max(2, Math.floor(space / (20 * scale))));
    if (follow) low = Math.max(firstPlace(), nowPlace() + span * 0.03 - span);
    const lanes = model.lanes.length;
    const row = Math.min(26 * scale, Math.max(fitRows ? 1.5 : 11 * scale, space / Math.max(1, lanes)));
    scroll = Math.max(0, Math.min(scroll, lanes * row - space));
    return { low, high: low + span, row, scroll, lanes };
  }

  const picture = canvas(ui, { label: "Scheduler timeline: steps above, requests below", draw(ctx, width, height, colours) {
    const layout = timelineLayout(height, ui.scale);
    if (!model.requests.length && !model.steps.length) {
      drawn = scene = null;
      ctx.fillStyle = colours.muted;
      ctx.textAlign = "center";
      ctx.font = `${14 * ui.scale}px ${colours.font}`;
      ctx.fillText("Every request will be a bar here, every step a column above it.", width / 2, height / 2 - 12 * ui.scale);
      ctx.fillText("Send one: live.chat([...]), or the buttons of a ControlBar.", width / 2, height / 2 + 12 * ui.scale);
    } else {
      scene = { model, axis, view: view(width, layout), layout, scale: ui.scale, now: now(), cursor: client.cursor,
        selection: client.selection, budget: client.live.config?.max_num_batched_tokens };
      drawn = drawTimeline(ctx, width, colours, scene);
    }
    tellTests();
  } });
  const node = picture.node;
  node.style.touchAction = "pan-y";

  function tellTests() {
    node.drawn = drawn ? drawn.boxes.map(({ request, x, y, w, h }) => ({ id: request.id, x, y, w, h, lane: request.lane })) : [];
    Object.assign(node.dataset, { requests: model.requests.length, steps: model.steps.length, bars: drawn ? drawn.bars : 0,
      chunks: drawn ? drawn.chunks : 0, open: drawn ? drawn.open : 0, columns: drawn ? drawn.columns : 0,
      lanes: model.lanes.length, follow, low: scene ? scene.view.low : 0, high: scene ? scene.view.high : 0, axis: axis.mode });
  }

  const { tellNumbers, showStep, showRequest } = timelineDetails(ui, model);

  // ---- what a hand can do ----

  function setFollow(value) {
    follow = value;
    nowButton.setAttribute("aria-pressed", String(follow));
    picture.invalidate();
  }
  function zoom(factor, place) {
    const before = span, longest = Math.max(FIRST_WINDOW[axis.mode], (nowPlace() - beginPlace()) * 1.5);
    span = Math.max(LEAST_WINDOW[axis.mode], Math.min(longest, span * factor));
    const at = place === undefined ? low + before / 2 : place;
    low = at - (at - low) * span / before;
    picture.invalidate();
  }
  function pan(share) { setFollow(false); low = clampLow(low + share * span); picture.invalidate(); }
  const clampLow = (value) => Math.max(beginPlace() - span * 0.5, Math.min(nowPlace() - span * 0.1, value));
  function goNow() { setCursor(null); setFollow(true); }
  function wholeRun() {
    setFollow(false);
    span = Math.max(LEAST_WINDOW[axis.mode], (nowPlace() - beginPlace()) * 1.08);
    low = firstPlace();
  }
  function setAxis(mode) {
    if (mode === axis.mode) return;
    const middle = scene ? axis.toMs(low + span / 2) : 0;
    const shown = scene ? model.steps.at(axis.toMs(low + span)) - model.steps.at(axis.toMs(low)) : 0;
    axis = new Axis(model, mode);
    span = mode === "steps" ? Math.max(20, Math.min(400, shown || 60)) : traits.get("window") || FIRST_WINDOW.time;
    low = axis.of(middle) - span / 2;
    axisButton.textContent = `axis: ${mode}`;
    picture.invalidate();
  }
  function setRows(fit) {
    fitRows = fit;
    rowsButton.setAttribute("aria-pressed", String(fit));
    picture.invalidate();
  }

  let cursorTimer = 0, wantedCursor = null;
  function setCursor(ms) {   // at most every 50 ms: other panels have to follow
    wantedCursor = ms === null ? null : Math.max(model.beginMs || 0, Math.min(now(), ms));
    if (ms !== null && follow) setFollow(false);
    if (cursorTimer) return;
    cursorTimer = setTimeout(() => { cursorTimer = 0; if (client.cursor !== wantedCursor) client.setCursor(wantedCursor); }, 50);
  }
  ui.undo.push(() => clearTimeout(cursorTimer));
  function moveCursor(by) {   // to the end of the step before, or of the next
    const { steps } = model, at = client.cursor === null ? model.lastMs : client.cursor;
    let i = steps.at(at);
    if (by < 0 && !(steps.end[i] < at)) i -= 1;
    if (by > 0 && !(steps.end[i] > at)) i += 1;
    if (i >= steps.length || (i >= 0 && isNaN(steps.end[i]))) { setCursor(null); return; }
    setCursor(i < 0 ? steps.begin[0] : steps.end[i]);
    show(axis.stepBegin(Math.max(0, i)));
  }
  function show(place) {   // make sure that a place of the axis is in view
    if (follow || (place > low && place < low + span)) return;
    low = clampLow(place - span / 2);
    picture.invalidate();
  }
  function selectStep(i) {
    if (i < 0 || i >= model.steps.length) return;
    client.select({ step: model.steps.number[i] });
    if (!follow) show(axis.stepBegin(i));
  }
  function selectNeighbour(by) {
    const boxes = drawn ? [...drawn.boxes].sort((a, b) => a.request.lane - b.request.lane || a.x - b.x) : [];
    if (!boxes.length) return;
    const at = boxes.findIndex((box) => box.request.id === client.selection.request);
    const box = boxes[Math.max(0, Math.min(boxes.length - 1, at < 0 ? (by > 0 ? 0 : boxes.length - 1) : at + by))];
    client.select({ request: box.request.id });
    const top = box.request.lane * scene.view.row, space = scene.layout.height - scene.layout.lanesTop;
    if (top < scroll) scroll = top; else if (top + scene.view.row > scroll + space) scroll = top + scene.view.row - space;
    picture.invalidate();
  }

  const nowButton = button("Now", "Follow the run as it goes (End)", goNow, { "aria-pressed": String(follow) });
  const axisButton = button(`axis: ${axis.mode}`, "Time, or steps of equal width without the time between them (T)",
    () => setAxis(axis.mode === "time" ? "steps" : "time"));
  const rowsButton = button("all rows", "All requests at once, however thin (A)", () => setRows(!fitRows), { "aria-pressed": "false" });
  ui.tools.append(button("◀", "Earlier (left arrow)", () => pan(-0.25)), button("▶", "Later (right arrow)", () => pan(0.25)),
    button("−", "Show more time (-)", () => zoom(1.5)), button("+", "Show less time (+)", () => zoom(1 / 1.5)),
    button("Whole run", "From the first request to now (Home)", wholeRun), nowButton, axisButton, rowsButton);

  const stepOfSelection = () => client.selection.step === null ? model.steps.length : model.steps.find(client.selection.step);
  const KEYS = {
    ArrowLeft: (e) => e.shiftKey ? moveCursor(-1) : pan(-0.15), ArrowRight: (e) => e.shiftKey ? moveCursor(1) : pan(0.15),
    ArrowUp: () => selectNeighbour(-1), ArrowDown: () => selectNeighbour(1),
    "+": () => zoom(1 / 1.4), "=": () => zoom(1 / 1.4), "-": () => zoom(1.4), Home: wholeRun, End: goNow,
    PageUp: () => { scroll -= node.clientHeight / 2; picture.invalidate(); },
    PageDown: () => { scroll += node.clientHeight / 2; picture.invalidate(); },
    "[": () => selectStep(stepOfSelection() - 1), "]": () => selectStep(stepOfSelection() + 1),
    t: () => setAxis(axis.mode === "time" ? "steps" : "time"), a: () => setRows(!fitRows),
    Enter: () => selectStep(client.cursor === null ? model.steps.length - 1 : model.steps.at(client.cursor)),
    Escape: () => { if (client.cursor !== null) goNow(); else client.select({ step: null, request: null }); },
  };
  node.addEventListener("keydown", (event) => {
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    action(event);
  });
  node.addEventListener("wheel", (event) => {
    // Without focus the wheel belongs to the notebook, or nobody could scroll past this picture.
    if (!scene || (document.activeElement !== node && !event.ctrlKey && !event.shiftKey)) return;
    event.preventDefault();
    if (event.shiftKey) { scroll += event.deltaY || event.deltaX; picture.invalidate(); return; }
    zoom(1.0015 ** event.deltaY, follow ? nowPlace() : low + event.offsetX / node.clientWidth * span);
  }, { passive: false });

  const placeAt = (x) => low + x / node.clientWidth * span;
  const stepAt = (x) => {   // the one that was drawn there
    const hidden = scene.shown[Math.floor(x)];
    if (hidden >= 0) return hidden;
    const [from, to] = axis.range(placeAt(x - 3), placeAt(x + 3));
    let nearest = -1, least = 4;
    for (let i = from; i < to; i++) {
      const a = scene.x(axis.stepBegin(i)), b = scene.x(axis.stepEnd(i, scene.now));
      const away = x < a ? a - x : x > b ? x - b : 0;
      if (away < least) { least = away; nearest = i; }
    }
    return nearest;
  };
  const boxAt = (x, y) => drawn && drawn.boxes.find((box) => y >= box.y - 1 && y <= box.y + box.h + 1
    && x >= box.x - 3 && x <= box.x + box.w + 3);
  let drag = null;
  node.addEventListener("pointerdown", (event) => {
    if (!scene || event.button) return;
    node.focus({ preventScroll: true });
    const { offsetX: x, offsetY: y } = event;
    const onLine = client.cursor !== null && Math.abs(scene.x(axis.of(client.cursor)) - x) < 6;
    drag = { kind: y < scene.layout.ruler || onLine ? "cursor" : "view", x, y, low, scroll, moved: false };
    node.setPointerCapture(event.pointerId);
    if (drag.kind === "cursor") setCursor(axis.toMs(placeAt(x)));
  });
  node.addEventListener("pointermove", (event) => {
    const { offsetX: x, offsetY: y } = event;
    if (!drag) { hover(event, x, y); return; }
    if (drag.kind === "cursor") { setCursor(axis.toMs(placeAt(x))); return; }
    if (!drag.moved && Math.hypot(x - drag.x, y - drag.y) < 4) return;
    if (!drag.moved) { drag.moved = true; setFollow(false); tip.hide(); }
    low = clampLow(drag.low - (x - drag.x) / node.clientWidth * span);
    scroll = drag.scroll - (y - drag.y);
    picture.invalidate();
  });
  node.addEventListener("pointerup", (event) => {
    const { offsetX: x, offsetY: y } = event, was = drag;
    drag = null;
    if (!was || was.moved || was.kind === "cursor" || !scene) return;
    if (y < scene.layout.lanesTop) { selectStep(stepAt(x)); return; }
    const box = boxAt(x, y);
    client.select({ request: box ? box.request.id : null });
  });
  node.addEventListener("pointercancel", () => { drag = null; });
  node.addEventListener("pointerleave", () => tip.hide());
  const tip = tooltip(ui);

  function hover(event, x, y) {
    if (!scene) return;
    node.style.cursor = y < scene.layout.ruler ? "col-resize" : "default";
    if (y < scene.layout.ruler) { tip.hide(); return; }
    if (y < scene.layout.lanesTop) {
      const i = stepAt(x), steps = model.steps;
      if (i < 0) { tip.hide(); return; }
      tip.show(event, `step ${asCount(steps.number[i])}: ${steps.prefill[i]} prefill + ${steps.decode[i]} decode tokens, ` +
        `${steps.rows[i]} requests${isNaN(steps.end[i]) ? ", running" : `, ${asMs(steps.end[i] - steps.begin[i])}`}`);
      return;
    }
    const box = boxAt(x, y);
    if (!box) { tip.hide(); return; }
    const r = box.request, ms = axis.toMs(placeAt(x));
    const part = r.spans.find((s) => s.begin <= ms && !(s.end <= ms));
    const chunk = r.chunks.find((c) => { const i = model.steps.at(c.begin); return c.begin <= ms && model.steps.end[i] >= ms; });
    tip.show(event, `request ${r.id}: ${part ? part.kind : r.status}` +
      `${part && !isNaN(part.end) ? ` for ${asMs(part.end - part.begin)}` : ""}` +
      `${chunk ? `, step ${asCount(chunk.step)} computes tokens ${chunk.start} to ${chunk.start + chunk.count - 1}` : ""}\n` +
      `prompt ${r.prompt} (${r.cached} cached), output ${r.tokens}${isNaN(r.first) ? "" : `, TTFT ${asMs(r.first - r.added)}`}` +
      `${r.preemptions ? `, preempted ${r.preemptions} times` : ""}`);
  }

  // ---- what comes from outside ----

  const take = (part) => {
    model.put(part);
    if (part.clear) { scroll = 0; showStep(); }
    tellNumbers();
    showRequest(true);
    picture.invalidate();
  };
  ui.subscribe("timeline", {}, { snapshot: take, delta: take });
  let lastStep = client.selection.step;
  ui.undo.push(client.onSelection(() => {
    if (client.selection.step !== lastStep) { lastStep = client.selection.step; showStep(); }
    showRequest(false);
    picture.invalidate();
  }));
  ui.undo.push(client.onCursor(() => { tellNumbers(); picture.invalidate(); }));
  ui.undo.push(client.onLive(() => picture.invalidate()));   // `now` moves on; open bars grow
  ui.listen(traits, "change:axis", () => setAxis(traits.get("axis")));
  ui.listen(traits, "change:follow", () => setFollow(traits.get("follow")));
  ui.listen(traits, "change:window", () => { span = traits.get("window") || FIRST_WINDOW[axis.mode]; picture.invalidate(); });
  if (lastStep !== null) showStep();
  return ui.dispose;
}

export default { render };
