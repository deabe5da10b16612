// The control bar: what a lecturer has under the hand. Everything is asked of Python by `control`; a refusal is shown in
// the engine's own words, and what was typed stays.

const SPEEDS = { least: 0.5, most: 500, end: 100 };   // the slider's end is "no limit"
const RATES = { least: 0.1, most: 50, end: 100 };     // the slider's beginning is "off"

const toSpeed = (p) => p >= SPEEDS.end ? null : SPEEDS.least * (SPEEDS.most / SPEEDS.least) ** (p / (SPEEDS.end - 1));
const fromSpeed = (v) => v === null || v > SPEEDS.most ? SPEEDS.end
  : Math.max(0, Math.min(SPEEDS.end - 1, (SPEEDS.end - 1) * Math.log(v / SPEEDS.least) / Math.log(SPEEDS.most / SPEEDS.least)));
const toRate = (p) => p <= 0 ? 0 : RATES.least * (RATES.most / RATES.least) ** ((p - 1) / (RATES.end - 1));
const fromRate = (v) => v <= 0 ? 0
  : Math.max(1, Math.min(RATES.end, 1 + (RATES.end - 1) * Math.log(v / RATES.least) / Math.log(RATES.most / RATES.least)));
const asRate = (v) => v >= 10 ? v.toFixed(0) : v.toFixed(1);
const inSteps = (v) => v === null ? "no limit" : `${asRate(v)} steps/s`;
const inRequests = (v) => v <= 0 ? "off" : `${asRate(v)} requests/s`;
const round2 = (v) => Number(v.toPrecision(2));

// What was typed, as a number where it is one; else as it is, so that the engine can say what is wrong with it.
function typed(text) {
  const plain = text.trim().replace(/(\d),(?=\d{3}\b)/g, "$1");
  return plain !== "" && Number.isFinite(Number(plain)) ? Number(plain) : text.trim();
}

const label = (text, title, ...nodes) => element("label", { class: "tv-field", title }, element("span", { text }), ...nodes);
const row = (...nodes) => element("div", { class: "tv-row" }, ...nodes);

async function render({ model, el }) {
  const ui = await panel(model, el, "Control", "Keys: space runs and pauses, → is one step, Esc stops.");
  ui.root.tabIndex = 0;
  ui.root.classList.add("tv-control");
  let live = ui.client.live, told = null;

  async function act(what, args) {
    try {
      const answer = await ui.ask("control", { do: what, ...args });
      ui.complain(null);
      return answer || {};
    } catch (error) {
      ui.complain(error);
      return null;
    }
  }

  // ---- transport ----
  const run = button("▶ Run", "Run or pause (space)", () => toggle(), { "data-do": "run" });
  const step = button("Step", "Run one step, then be paused (→)", () => act("step", { count: 1 }), { "data-do": "step" });
  const ten = button("Step 10", "Run ten steps, then be paused", () => act("step", { count: 10 }), { "data-do": "step10" });
  const stop = button("■ Stop", "End every request, and the arrivals (Esc)", () => act("stop"), { "data-do": "stop" });
  const reset = button("↺ Reset", "", () => doReset(), { "data-do": "reset" });
  const toggle = () => act(isPaused() ? "resume" : "pause");
  const isPaused = () => live.state === "paused";
  const hasFailed = () => live.state === "failed";

  const speed = slider("speed", SPEEDS.end, "The most steps a second", (p) => {
    const wanted = toSpeed(p);
    return act("speed", { steps_per_second: wanted === null ? null : round2(wanted) });
  }, (p) => inSteps(p >= SPEEDS.end ? null : round2(toSpeed(p))));
  const pace = element("select", { class: "tv-select", "data-do": "rate", title: "How many times as fast as it was recorded",
    onchange: () => act("rate", { factor: pace.value === "at once" ? 1e9 : Number(pace.value) }) },
    ...["0.1", "0.25", "0.5", "1", "2", "5", "20", "at once"].map((v) =>
      element("option", { value: v, text: v === "at once" ? v : `× ${v}`, selected: v === "1" })));
  // The engine's pace may be one that is not in the list: it was made in a cell.
  function showPace(rate) {
    const value = rate >= 1e9 ? "at once" : String(rate);
    if (![...pace.options].some((option) => option.value === value)) pace.append(element("option", { value, text: `× ${value}` }));
    pace.value = value;
  }
  const paceField = label("pace", "How many times as fast as it was recorded", pace);

  // ---- counters ----
  const counters = {};
  const numbers = element("div", { class: "tv-counters", role: "group", "aria-label": "counters" },
    ...[["step", "step", "Steps so far"], ["running", "running", "Requests in the batch"],
      ["waiting", "waiting", "Requests that wait, preempted ones too"], ["finished", "finished", "Requests that have ended"],
      ["tokens_per_s", "tokens/s", "Tokens generated in the last second"], ["blocks", "blocks", "KV-cache blocks that requests hold, of all"]]
      .map(([key, name, title]) => element("div", { class: "tv-counter", title, "data-counter": key },
        counters[key] = element("b", { text: "–" }), element("span", { text: name }))));

  // ---- arrivals ----
  const rate = slider("arrivals", 0, "Requests a second, at random times (Poisson)", (p) => act("arrivals", { rate: round2(toRate(p)) }),
    (p) => inRequests(round2(toRate(p))));
  const burstCount = input("burst-count", "8", "How many requests the burst brings");
  const burst = button("Burst", "So many requests at once", () => act("burst", { count: typed(burstCount.value) }), { "data-do": "burst" });
  const arrived = element("span", { class: "tv-muted", "data-told": "arrivals" });
  burstCount.addEventListener("keydown", (event) => { if (event.key === "Enter") burst.click(); });

  // ---- recording ----
  const fileName = input("file", "", "Name of the trace file (empty: the next free run-1.jsonl, run-2.jsonl, ...)");
  fileName.placeholder = "run-1.jsonl";
  fileName.classList.add("tv-wide");
  const record = button("● Record", "Keep every event from now on", () => doRecord(), { "data-do": "record" });
  const replay = button("Replay", "Show the recorded run (or the file of that name) in every panel", () => act("replay", { name: fileName.value }), { "data-do": "replay" });
  const back = button("Back to live", "The live engine again", () => act("live"), { "data-do": "live" });
  const recorded = element("span", { class: "tv-muted tv-path", "data-told": "recorded", role: "status" });
  async function doRecord() {
    const recording = told && told.recording;
    if (recording && (recording.on || recording.unsaved)) await act("save", { name: fileName.value });
    else await act("record");
  }

  // ---- scheduling, at once; cache, on reset ----
  const policy = element("select", { class: "tv-select", "data-do": "policy", title: "Who may join: at any step, or only when all have ended",
    onchange: () => setPolicy(policy, "scheduling_policy", policy.value) },
    ...["continuous", "static"].map((v) => element("option", { value: v, text: v })));
  const budget = input("max_num_batched_tokens", "", "Tokens that one step may compute (token budget)");
  const seats = input("max_num_seqs", "", "Requests that one step may hold");
  const blockSize = input("block_size", "", "Tokens a block");
  const numBlocks = input("num_blocks", "", "Blocks in the pool; untouched, a new block size keeps the cache's size in tokens");
  const sizesId = newId("sizes");
  blockSize.setAttribute("list", sizesId);
  const sizes = element("datalist", { id: sizesId }, ...[1, 4, 8, 16, 32, 64, 256, 2048].map((v) => element("option", { value: v })));
  const prefix = checkbox("enable_prefix_caching", "Requests share the blocks of equal prefixes");
  const cache = checkbox("use_kv_cache", "Off: every step computes every sequence from its first token (no prefix caching then)");
  const apply = button("Reset with these", "Forget every request and the whole cache, and begin anew with these", () => doReset(), { "data-do": "reset-with" });
  const fields = { max_num_batched_tokens: budget, max_num_seqs: seats, block_size: blockSize, num_blocks: numBlocks };
  const boxes = { enable_prefix_caching: prefix, use_kv_cache: cache };
  for (const [name, node] of Object.entries(fields)) {
    node.addEventListener("input", () => { node.dataset.dirty = "1"; node.removeAttribute("aria-invalid"); tellSize(); });
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (node === blockSize || node === numBlocks)) doReset();
    });
    if (node === budget || node === seats) node.addEventListener("change", () => setPolicy(node, name, typed(node.value)));
  }
  for (const box of Object.values(boxes)) box.addEventListener("change", () => { box.dataset.dirty = "1"; tellSize(); });
  cache.addEventListener("change", () => {
    if (!cache.checked) { prefix.checked = false; prefix.dataset.dirty = "1"; }
    prefix.disabled = !cache.checked;
  });
  const size = element("span", { class: "tv-muted", "data-told": "size" });

  async function setPolicy(node, name, value) {
    if (value === "") { settle(node); fill(); return; }
    const done = await act("policy", { [name]: value });
    if (done) settle(node);
    else { node.setAttribute("aria-invalid", "true"); if (node === policy) fill(); }
  }
  async function doReset() {
    const changes = {};
    for (const [name, node] of Object.entries(fields)) if (node.dataset.dirty && node.value.trim() !== "") changes[name] = typed(node.value);
    for (const [name, box] of Object.entries(boxes)) if (box.dataset.dirty) changes[name] = box.checked;
    const done = await act("reset", isReplay() ? {} : changes);
    for (const [name, node] of Object.entries({ ...fields, ...boxes })) {
      if (done) settle(node);
      else if (name in changes) node.setAttribute("aria-invalid", "true");
    }
  }
  function settle(node) { delete node.dataset.dirty; node.removeAttribute("aria-invalid"); }
  function tellSize() {
    const config = live.config || {};
    const b = typed(blockSize.value), n = typed(numBlocks.value);
    const total = config.block_size * config.num_blocks;
    if (!Number.isInteger(b) || b < 1) put(size, { textContent: "" });
    else if (blockSize.dataset.dirty && !numBlocks.dataset.dirty) put(size, { textContent: `= about ${asCount(Math.max(1, Math.floor(total / b)))} blocks, ${asCount(total)} tokens` });
    else if (Number.isInteger(n)) put(size, { textContent: `= ${asCount(n * b)} tokens` });
  }

  // ---- small parts ----
  function input(name, value, title) {
    return element("input", { class: "tv-input tv-number", type: "text", value, title, "aria-label": title, "data-field": name, autocomplete: "off", spellcheck: "false" });
  }
  function checkbox(name, title) {
    return element("input", { type: "checkbox", title, "data-field": name });
  }
  // A slider that acts while it is dragged, at most ten times a second, and always at the end.
  function slider(name, value, title, send, describe) {
    const node = element("input", { type: "range", class: "tv-slider", min: 0, max: 100, step: 1, value, title, "aria-label": title, "data-field": name });
    const text = element("output", { class: "tv-value" });
    let timer = 0, busy = 0;
    const show = () => { text.textContent = describe(Number(node.value)); node.setAttribute("aria-valuetext", text.textContent); };
    node.addEventListener("input", () => {
      show();
      busy = performance.now();
      if (!timer) timer = setTimeout(() => { timer = 0; busy = performance.now(); send(Number(node.value)); }, 100);
    });
    ui.undo.push(() => clearTimeout(timer));
    show();
    return { node, text, set(p, words) {
      if (timer || performance.now() - busy < 600) return;   // the hand is on it
      put(node, { value: String(Math.round(p)) });
      put(text, { textContent: words });   // the value as it is: the slider has but a hundred places
      put(node, { ariaValueText: words });
    } };
  }

  // ---- what was told ----
  const isReplay = () => live.kind === "replay";
  function fill() {
    const config = live.config || {};
    if (document.activeElement !== policy && config.scheduling_policy) put(policy, { value: config.scheduling_policy });
    for (const [name, node] of Object.entries(fields))
      if (!node.dataset.dirty && document.activeElement !== node && config[name] !== undefined) put(node, { value: String(config[name]) });
    for (const [name, box] of Object.entries(boxes)) if (!box.dataset.dirty && config[name] !== undefined) put(box, { checked: config[name] });
    if (!cache.dataset.dirty) put(prefix, { disabled: isReplay() || !cache.checked });
    tellSize();
  }
  const able = (nodes, why) => {
    for (const node of nodes) {
      if (node.dataset.title === undefined) node.dataset.title = node.title;
      put(node, { disabled: Boolean(why), title: why || node.dataset.title });
    }
  };
  let shown = null;
  function refresh() {
    const paused = isPaused();
    put(run, { textContent: paused ? "▶ Run" : "❚❚ Pause", ariaPressed: String(!paused && live.state === "running") });
    able([run, step, ten], hasFailed() ? "The engine stopped at an error: reset starts it afresh" : live.state === "closed" ? "This engine is closed" : "");
    put(reset, { title: isReplay() ? "Play it from the beginning" : "Forget every request and the whole cache, and begin anew (with what is set under Options)" });
    put(paceField, { hidden: !isReplay() });
    const config = live.config || {};
    put(counters.step, { textContent: asCount(live.step || 0) });
    put(counters.blocks, { textContent: config.num_blocks ? `${asCount(live.used_blocks || 0)} / ${asCount(config.num_blocks)}` : "–" });
    if (shown !== live.error) {  // an error that is over takes its message away; the user's own mistakes stay until the next act
      if (live.error) ui.complain(`The engine stopped: ${live.error}. Reset starts it afresh.`);
      else if (shown) ui.complain(null);
      shown = live.error;
    }
    fill();
  }
  function tell(now) {
    told = now;
    live = ui.client.live;
    for (const key of ["running", "waiting", "finished", "tokens_per_s"]) put(counters[key], { textContent: asCount(now[key] || 0) });
    speed.set(fromSpeed(now.speed), inSteps(now.speed));
    if (now.rate && document.activeElement !== pace) showPace(now.rate);
    rate.set(fromRate(now.arrivals.rate), inRequests(now.arrivals.rate));
    put(arrived, { textContent: now.arrivals.error ? `no more arrivals: ${now.arrivals.error}` : now.arrivals.sent ? `${asCount(now.arrivals.sent)} came` : "" });
    const { recording, cannot } = now;
    put(record, { textContent: recording.on ? "■ Save" : recording.unsaved ? "Save again" : "● Record", ariaPressed: String(Boolean(recording.on)) });
    record.dataset.title = recording.on || recording.unsaved ? "End the recording and write its file" : "Keep every event from now on";
    put(recorded, { textContent: recording.on ? "recording …" : recording.path
      ? `${recording.path}: ${asCount(recording.events)} events, ${asCount(recording.steps)} steps` : "" });
    for (const [name, most] of Object.entries(now.limits)) fields[name].dataset.title = `${name === "max_num_seqs" ? "Requests that one step may hold" : "Tokens that one step may compute"}: 1 to ${asCount(most)} at once, more on reset`;
    able([policy, budget, seats], cannot.policy);
    able([blockSize, numBlocks, cache, apply], cannot.options);
    able([prefix], cannot.options || (cache.checked ? "" : "Without a KV cache there is no prefix to share"));
    able([rate.node, burstCount, burst], cannot.arrivals);
    able([record], cannot.record);
    able([replay], recording.on ? "Save the recording first" : "");
    put(back, { hidden: !now.can_go_back });
    ui.say(`${live.state}: step ${live.step}, ${now.running} running, ${now.waiting} waiting`);
  }

  // ---- the page ----
  const now = button("Back to now", "These panels show the past; the run goes on meanwhile", () => ui.client.setCursor(null), { "data-do": "now" });
  const setNow = () => { now.hidden = ui.client.cursor === null || ui.client.cursor === undefined; };
  ui.undo.push(ui.client.onCursor(setNow));
  setNow();
  const more = button("Options", "Scheduling, cache, recording", () => { model.set("options", !model.get("options")); model.save_changes(); },
    { "data-do": "options" });
  const group = (title, note, ...nodes) => element("fieldset", { class: "tv-group" },
    element("legend", null, element("b", { text: title }), note ? element("span", { class: "tv-muted", text: ` ${note}` }) : null), ...nodes);
  const options = element("div", { class: "tv-options" },
    group("Scheduling", "at once", label("policy", policy.title, policy), label("token budget", budget.title, budget), label("most requests", seats.title, seats)),
    group("KV cache", "on reset: requests and cache are forgotten", label("block size", blockSize.title, blockSize, sizes), label("blocks", numBlocks.title, numBlocks),
      size, label("prefix caching", prefix.title, prefix), label("KV cache", cache.title, cache), apply),
    group("Recording", "", label("file", fileName.title, fileName), record, replay, back, recorded));
  const unfold = () => { options.hidden = !model.get("options"); more.setAttribute("aria-expanded", String(!options.hidden)); more.textContent = options.hidden ? "Options ▾" : "Options ▴"; };
  ui.listen(model, "change:options", unfold);
  unfold();
  ui.body.append(
    row(run, step, ten, stop, reset, label("speed", speed.node.title, speed.node, speed.text), paceField, numbers),
    row(label("arrivals", rate.node.title, rate.node, rate.text), burstCount, burst, arrived, element("span", { class: "tv-space" }), now, more), options);

  // Space, right arrow and Esc, unless something is being typed or moved. After a click the bar itself has the focus, so
  // that space is not the last button once more.
  const isField = (node) => node.matches("input, select, textarea");
  ui.root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const where = event.target;
    let done = true;
    if (event.key === "Escape" && isField(where)) ui.root.focus();
    else if (isField(where)) return;
    else if (event.key === "Escape") act("stop");
    else if (event.key === "ArrowRight") { if (!step.disabled) act("step", { count: 1 }); }
    else if (event.key === " " && where.tagName !== "BUTTON") { if (!event.repeat && !run.disabled) toggle(); }
    else done = false;
    if (!done) return;
    event.preventDefault();
    event.stopPropagation();
  });
  ui.root.addEventListener("click", (event) => { if (event.detail > 0 && event.target.closest("button")) ui.root.focus({ preventScroll: true }); });

  ui.undo.push(ui.client.onLive((now) => { live = now; refresh(); }));
  ui.subscribe("control", {}, { snapshot: tell });
  refresh();
  return ui.dispose;
}
export default { render };
