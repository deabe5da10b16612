const PROMPT = "Here will be seen what a token was drawn from.";

// The bars of the next token: what the newest token of the selected request was drawn from.
// wanted(): the id of the request to show, or null.
function makeBars(ui, wanted) {
  const { client, model } = ui;
  const title = element("div", { class: "tv-race-title" }), context = element("bdi", { class: "tv-mono" });
  const rows = element("div", { role: "group", "aria-label": "next tokens" }), note = element("div", { class: "tv-muted" });
  const sliders = {};
  const slider = (name, label, attributes, show) => {
    const input = element("input", { type: "range", "aria-label": label, ...attributes });
    const output = element("output");
    input.addEventListener("input", () => { model.set(name, Number(input.value)); model.save_changes(); });
    sliders[name] = { input, output, show };
    return element("label", { class: "tv-race-slider" }, element("span", { text: label }), input, output);
  };
  const reset = button("as sampled", "what the request itself samples with", () => {
    for (const name of Object.keys(sliders)) model.set(name, null);
    model.save_changes();
  });
  const modes = ["fork", "force"].map((mode) => button(mode, mode === "fork"
    ? "a click on a token starts a second request with it: both go on"
    : "a click on a token starts a request with it, and the old one is aborted", () => { model.set("mode", mode); model.save_changes(); }));
  const node = element("div", { class: "tv-race-right", }, title,
    element("div", { class: "tv-race-context tv-muted" }, context),
    slider("temperature", "temperature", { min: 0, max: 3, step: 0.05 }, (v) => v === 0 ? "0 greedy" : v.toFixed(2)),
    slider("top_k", "top-k", { min: 0, max: 50, step: 1 }, (v) => v ? String(v) : "off"),
    slider("top_p", "top-p", { min: 0.01, max: 1, step: 0.01 }, (v) => v < 1 ? v.toFixed(2) : "off"),
    element("div", { class: "tv-row" }, reset, element("span", { text: "click a token:" }), ...modes), rows, note);
  const controls = [...node.querySelectorAll(".tv-race-slider, .tv-row")];

  let data = null, busy = false, again = 0, timer = 0, ended = false;
  ui.undo.push(() => { ended = true; clearTimeout(timer); });
  const chosenBy = (name) => { const mine = model.get(name); return mine === null || mine === undefined ? data[name] : mine; };

  const draw = () => {
    for (const [i, mode] of ["fork", "force"].entries()) modes[i].setAttribute("aria-pressed", model.get("mode") === mode);
    node.dataset.request = data ? data.request : "";
    for (const control of controls) control.hidden = !data && client.live.kind === "replay";
    for (const name of Object.keys(sliders)) sliders[name].input.disabled = !data;
    reset.disabled = !data || Object.keys(sliders).every((name) => (model.get(name) ?? null) === null);
    if (!data) { rows.replaceChildren(); return; }
    const values = Object.fromEntries(Object.keys(sliders).map((name) => [name, chosenBy(name)]));
    for (const [name, { input, output, show }] of Object.entries(sliders)) {
      if (values[name] > Number(input.max)) input.max = values[name];
      if (Number(input.value) !== values[name]) input.value = values[name];
      output.textContent = show(values[name]);
    }
    const d = distribution(data.keys, data.counts, values.temperature, values.top_k, values.top_p, data.vocab_size);
        while (rows.children.length < data.ids.length) rows.append(makeRow());
    while (rows.children.length > data.ids.length) rows.lastChild.remove();
    data.ids.forEach((id, i) => fillRow(rows.children[i], i, id, d));
    title.textContent = `Request ${data.request}: what token ${data.position} was drawn from`;
    title.textContent += data.ended ? ", its last" : "";
    note.textContent = d.greedy ? "Greedy: the largest logit, nothing is drawn."
      : `${asCount(d.numKept)} of ${asCount(data.vocab_size)} tokens kept, `
        + `${asPercent(d.keptMass)} of the probability; renormalised to 100%.`;
    if (values.temperature !== 0 && d.greedy) note.textContent = "No finite largest logit: the first of the largest is taken.";
    Object.assign(node.dataset, { position: data.position, kept: d.numKept, temperature: values.temperature, keptMass: d.keptMass });
  };

  const makeRow = () => element("div", { class: "tv-race-row" },
    element("button", { class: "tv-race-bar", type: "button" }, element("span", { class: "tv-race-token tv-mono" }),
      element("span", { class: "tv-race-track" }, element("i", { class: "tv-race-after" }), element("i", { class: "tv-race-before" })),
      element("span", { class: "tv-race-end" })),
    element("button", { class: "tv-race-logit tv-muted", type: "button", title: "this logit, bit by bit, in BitLens" }));
  const fillRow = (row, i, id, d) => {
    const key = data.top_keys[i], logit = key === 0 ? NaN : key < LOWEST_KEY ? -Infinity : valueOfKey(key);
    const before = d.greedy ? NaN : d.probability(key), after = d.kept(key, i === 0);
    const isChosen = id === data.chosen, [bar, value] = row.children, [token, track, percent] = bar.children;
    token.textContent = `${isChosen ? "▶ " : ""}${data.texts[i] === null ? `#${id}` : visibleText(data.texts[i])}`;
    track.children[0].style.width = `${100 * after}%`;
    track.children[1].style.width = `${100 * (d.greedy ? 0 : before)}%`;
    track.children[0].hidden = after === 0;
    percent.textContent = after > 0 ? asPercent(after) : "–";
    value.textContent = Number.isNaN(logit) ? "NaN" : logit === -Infinity ? "-∞" : logit.toFixed(2);
    bar.title = `token ${id}${isChosen ? ", the one that was chosen" : ""}: logit ${logit}, `
      + (d.greedy ? "" : `probability ${asPercent(before)} before and `) + `${asPercent(after)} after the filters`;
    bar.setAttribute("aria-label", `${data.texts[i] ?? id}, ${after > 0 ? asPercent(after) : "filtered out"}${isChosen ? ", chosen" : ""}`);
    Object.assign(row.dataset, { id, kept: after > 0, chosen: isChosen, after, before, logit });
  };

  const ask = async () => {
    const request = wanted();
    if (ended || !request) { data = null; draw(); title.textContent = PROMPT; return; }
    busy = true;
    again = 0;
    try {
      const answer = await ui.ask("race.next", { request });
      if (ended) return;
      if (wanted() === request) {
        if (answer.ids) {
          data = answer;
          context.textContent = `…${visibleText(data.before)}▁`;
        } else if (!data || data.request !== request) {
          data = null;
          title.textContent = `Request ${request}: no token was drawn for it in the last step`;
        }
      }
    } catch (error) {
      if (ended) return;
      data = null;
      context.textContent = "";
      title.textContent = client.live.kind === "replay" ? "Next-token bars: not recorded" : "Next-token bars: not to be had";
      note.textContent = error.message;
    }
    draw();
    // At most four looks a second, and one more after the last change: paused, the bars are exactly the last step's.
    timer = setTimeout(() => { busy = false; if (again) ask(); }, 250);
  };
  const refresh = (other) => {
    if (other && data && data.request !== wanted()) { data = null; context.textContent = note.textContent = ""; draw(); }
    again = 1;
    if (!busy) ask();
  };
  const force = async (id) => {
    ui.complain(null);
    try {
      const mode = model.get("mode");
      const { request } = await ui.ask("race.fork", { request: data.request, position: data.position, token_id: id, mode });
      node.dataset.forked = request;
      if (mode === "force") client.select({ request });
    } catch (error) { ui.complain(error); }
  };
  rows.addEventListener("click", (event) => {
    const row = event.target.closest(".tv-race-row");
    if (!row || !data) return;
    if (event.target.closest(".tv-race-bar")) force(Number(row.dataset.id));
    else client.inspect({ kind: "logit", request: data.request, token: Number(row.dataset.id) });
  });
  rows.addEventListener("keydown", (event) => {
    const isBar = event.target.classList.contains("tv-race-bar"), step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const all = [...rows.querySelectorAll(isBar ? ".tv-race-bar" : ".tv-race-logit")];
    if (step) all[Math.max(0, Math.min(all.length - 1, all.indexOf(document.activeElement) + step))].focus({ preventScroll: true });
    else if (event.key === "Escape") result.onEscape();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  for (const name of [...Object.keys(sliders), "mode"]) ui.listen(model, `change:${name}`, draw);
  const result = { node, refresh, focus() { rows.querySelector(".tv-race-bar")?.focus({ preventScroll: true }); }, onEscape() {} };
  draw();
  title.textContent = PROMPT;
  return result;
}

const asPercent = (p) => p >= 0.9995 ? "100%" : p >= 0.1 ? `${(100 * p).toFixed(1)}%`
  : p >= 0.0001 ? `${(100 * p).toFixed(2)}%` : p > 0 ? "<0.01%" : "0%";
