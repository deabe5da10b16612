// The timeline's numbers in words: what the newest step did, what a request got, and the batch of a chosen step.

const TABLE_ROWS = 64;

// Puts them around the picture, and returns what brings them up to date: {tellNumbers, showStep, showRequest}.
function timelineDetails(ui, model) {
  const client = ui.client;
  const status = element("div", { class: "tv-timeline-status",
    style: { margin: "0 0 4px", fontVariantNumeric: "tabular-nums" } });
  const legend = element("div", { class: "tv-legend" });
  const fill = (kind, tall, hatch, alpha) => (ctx, width, height) => {
    ctx.fillStyle = hatched(ctx, KIND_COLOURS[kind], hatch || 0);
    ctx.globalAlpha = alpha || 1;
    ctx.fillRect(0, height * (1 - tall) / 2, width, height * tall);
  };
  const chunk = (ctx, width, height) => {
    fill("prefill", 0.6, 0, 0.3)(ctx, width, height);
    ctx.globalAlpha = 1;
    ctx.fillRect(0, 0, width * 0.4, height);
  };
  const mark = (ctx, width, height) => fill("cached", 1)(ctx, width * 0.3, height);
  const setLegend = () => legend.replaceChildren(...legendSwatches([["waiting", fill("waiting", THIN.waiting)],
    ["prefill, chunk by chunk", chunk], ["prefix found in cache", mark], ["decode", fill("decode", 1)],
    ["preempted", fill("preempted", 0.7, 2)]], ui.scale));
  setLegend();
  ui.listen(ui.model, "change:scale", setLegend);
  ui.body.prepend(status);
  const info = element("div", { style: { display: "flex", flexWrap: "wrap", gap: "0.5em 2em", alignItems: "flex-start" } });
  ui.body.append(legend, info);
  const requestBox = element("div", { class: "tv-timeline-request", hidden: true });
  const stepBox = element("div", { class: "tv-timeline-step", hidden: true, style: { overflowX: "auto", maxWidth: "100%" } });
  info.append(requestBox, stepBox);

  function tellNumbers() {
    const steps = model.steps, budget = client.live.config?.max_num_batched_tokens;
    const i = client.cursor === null ? steps.length - 1 : steps.at(client.cursor);
    if (i < 0) { status.textContent = ""; return; }
    const use = steps.use(budget, 100, i), tokens = steps.tokens(i);
    const unit = tokens === 1 ? "token" : "tokens";
    const share = budget ? ` of ${asCount(budget)} = ${Math.round(100 * tokens / budget)}% of the budget` : "";
    status.textContent = `step ${asCount(steps.number[i])}: ${asCount(tokens)} ${unit}${share} ` +
      `(${steps.prefill[i]} prefill, ${steps.decode[i]} decode)${use === null ? "" : ` · last ${Math.min(100, i + 1)} steps: ${Math.round(100 * use)}% used`}`;
    status.dataset.use = use === null ? "" : use;
    const waiting = model.count("waiting") + model.count("preempted");
    ui.say(`${status.textContent}. ${model.count("running")} running, ${waiting} waiting.`);
  }

  const row = (tag, cells) => element("tr", {}, ...cells.map((text, i) => element(tag, { text: String(text),
    style: { padding: "0 0.7em 0 0", textAlign: i === 1 || i === 2 ? "right" : "left", fontWeight: tag === "th" ? "600" : "400" } })));

  let asked = 0;
  async function showStep() {
    const { step } = client.selection, question = ++asked;
    if (step === null) { stepBox.hidden = true; return; }
    try {
      const found = await ui.ask("timeline_step", { step });
      if (question !== asked) return;
      const took = found.end === null ? "running" : asMs(found.end - found.begin);
      const head = `Step ${asCount(found.step)}: ${asCount(found.tokens)} of ${asCount(found.budget)} tokens, ` +
        `${found.rows.length} requests, ${took}${found.errors.map((text) => `; failed: ${text}`).join("")}`;
      const left = found.rows.length - TABLE_ROWS;
      stepBox.replaceChildren(element("strong", { text: head }),
        element("table", { class: "tv-mono", style: { borderCollapse: "collapse", maxHeight: "16em", overflowY: "auto",
          display: "block" } },
          row("th", ["request", "start", "count", "kind", "sampled"]),
          ...found.rows.slice(0, TABLE_ROWS).map((cells) => row("td", [...cells.slice(0, 4), cells[4] ? "yes" : "no"]))),
        left > 0 ? element("div", { class: "tv-muted", text: `and ${left} more` }) : "");
      stepBox.hidden = false;
      ui.complain(null);
    } catch (error) {
      if (question !== asked) return;
      stepBox.replaceChildren(element("span", { class: "tv-muted", text: error.message }));
      stepBox.hidden = false;
    }
  }

  let lastAsked = 0, shownRequest = null;
  async function showRequest(again) {
    const { request } = client.selection;
    if (request === null || !model.byId.has(request)) { requestBox.hidden = true; shownRequest = null; return; }
    if (again && (performance.now() - lastAsked < 500 || (shownRequest === request && requestBox.dataset.final))) return;
    lastAsked = performance.now();
    try {
      const r = await ui.ask("timeline_request", { request });
      if (client.selection.request !== request) return;
      const ms = (value) => value === null ? "-" : asMs(value);
      const lines = [["status", r.status], ["prompt", `${asCount(r.prompt)} tokens, ${asCount(r.cached)} of them cached`],
        ["output", `${asCount(r.output)} tokens`], ["waited", ms(r.waited)], ["TTFT", ms(r.ttft)],
        ["ITL", `mean ${ms(r.itl.mean)}, p50 ${ms(r.itl.p50)}, p95 ${ms(r.itl.p95)}, max ${ms(r.itl.max)}`],
        ["preemptions", r.preemptions]];
      requestBox.replaceChildren(element("strong", { text: `Request ${r.request}`, style: { overflowWrap: "anywhere" } }),
        element("table", {}, ...lines.map(([name, value]) => element("tr", {}, element("td", { class: "tv-muted", text: name,
          style: { paddingRight: "0.8em" } }), element("td", { text: String(value) })))));
      requestBox.dataset.final = STATUSES.indexOf(r.status) > 2 ? "1" : "";
      requestBox.hidden = false;
      shownRequest = request;
    } catch (error) {
      requestBox.replaceChildren(element("span", { class: "tv-muted", text: error.message }));
      requestBox.hidden = false;
    }
  }

  return { tellNumbers, showStep, showRequest };
}
