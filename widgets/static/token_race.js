// TokenRace: a card for each running request, and the bars of the selected one's next token.

const STATUS = { waiting: "waiting", prefill: "prefill", decode: "decode", preempted: "preempted", stop: "✓ stop",
  length: "■ length", abort: "✕ abort" };
const FRESH = 3;      // stretches of text that are highlighted at once; older ones become plain text
const LONGEST = 4000; // characters that are remembered of a request, for the tooltip
const TAIL = 500;     // characters in a card: more than its lines hold, little enough to lay out in every frame

function makeCard(slot) {
  const parts = { stripe: element("div", { class: "tv-race-stripe" }), id: element("b"),
    status: element("span", { class: "tv-race-status" }),
    origin: element("div", { class: "tv-race-origin", hidden: true }), text: element("div", { class: "tv-race-words" }),
    numbers: element("div", { class: "tv-race-numbers" }), times: element("div", { class: "tv-race-numbers" }) };
  const plain = document.createTextNode("");
  parts.text.append(plain);
  const node = element("div", { class: "tv-race-card", role: "option", tabindex: "-1", "data-slot": slot, hidden: true,
    title: "TTFT: from arrival to the first token. ITL: between two tokens, mean and last. Rate: tokens over the time from arrival to the newest." },
    parts.stripe, element("div", { class: "tv-race-top" }, parts.id, parts.status), parts.origin,
    element("div", { class: "tv-race-text" }, parts.text), parts.numbers, parts.times);
  const short = (ms) => ms === null ? "–" : asMs(ms);
  let state = { id: null }, whole = "";
  node.addEventListener("mouseenter", () => { parts.text.title = whole; });
  return {
    node,
    get id() { return state.id; },
    get hasEnded() { return ["stop", "length", "abort"].includes(state.status); },
    apply(change) {
      if (change.id !== state.id) state = {};
      state = { ...state, ...change };
      node.hidden = state.id === null;
      if (node.hidden) return;
      if (change.text !== undefined) {
        parts.text.replaceChildren(plain);
        whole = change.text;
        plain.data = whole.slice(-TAIL);
        Object.assign(parts.stripe.style, lookStyle(state.id));
        parts.id.textContent = state.id;
        parts.id.title = `request ${state.id}: ${state.prompt} prompt tokens`;
        parts.origin.hidden = !state.parent;
        if (state.parent) {
          const forced = state.forced_text == null ? state.forced : `“${visibleText(state.forced_text)}”`;
          parts.origin.textContent = `↳ from ${state.parent}: ${forced} at ${state.position}`;
          parts.origin.title = parts.origin.textContent;
        }
        node.dataset.request = state.id;
        node.dataset.parent = state.parent || "";
      } else if (change.new) {
        parts.text.append(element("span", { class: "tv-race-new", text: change.new }));
        while (parts.text.childNodes.length > FRESH + 1) {
          plain.data += parts.text.childNodes[1].textContent;
          parts.text.childNodes[1].remove();
        }
        if (plain.data.length > 2 * TAIL) plain.data = plain.data.slice(-TAIL);
        whole = (whole + change.new).slice(-LONGEST);
      }
      node.toggleAttribute("data-ended", this.hasEnded);
      if (node.dataset.status !== state.status) {
        parts.status.textContent = STATUS[state.status] || state.status;
        parts.status.style.boxShadow = `inset 0 0 0 1.5px ${KIND_COLOURS[state.status] || "transparent"}`;
        node.dataset.status = state.status;
      }
      node.dataset.tokens = state.tokens;
      put(parts.numbers, { textContent: state.tokens ? `${asCount(state.tokens)} tok · ${asRate(state.rate)} · TTFT ${short(state.ttft)}`
        : state.status === "prefill" ? `${asCount(state.computed)} of ${asCount(state.prompt)} prompt tokens computed`
        : `${asCount(state.prompt)} prompt tokens` });
      put(parts.times, { textContent: state.tokens > 1 ? `ITL ${short(state.itl)}, last ${short(state.last)}` : "\u00a0" });
    },
  };
}

const asRate = (rate) => rate === null || rate === undefined ? "–" : `${rate < 10 ? rate.toFixed(1) : asCount(Math.round(rate))} tok/s`;

// ---- the panel ----

async function render({ model, el }) {
  const ui = await panel(model, el, "TokenRace",
    "Arrow keys: another request. Enter: to its bars, Enter there: run on with that token. Esc: back. "
    + "The sliders change the picture, not the run.");
  const { client } = ui;
  const totals = element("div", { class: "tv-race-totals" });
  const empty = element("p", { class: "tv-muted",
    text: "No request yet. Add one, for example live.chat([{\"role\": \"user\", \"content\": \"Tell me a story.\"}]): "
      + "its text will stream here." });
  const grid = element("div", { class: "tv-race-cards", role: "listbox", "aria-label": "running requests" });
  const left = element("div", { class: "tv-race-left" }, totals, empty, grid);
  const bars = makeBars(ui, () => client.selection.request ?? fallback);
  ui.body.append(element("div", { class: "tv-race" }, left, bars.node));
  const cards = [];
  const list = makeList(ui);

  let pending = [], wanted = 0, lastTotals = null, fallback = null;
  const draw = () => {
    wanted = 0;
    const changed = new Set();
    for (const value of pending.splice(0)) {
      if (value.everything) for (const card of cards) card.apply({ id: null });
      while (cards.length < value.slots) {
        cards.push(makeCard(cards.length));
        grid.append(cards[cards.length - 1].node);
      }
      for (const change of value.cards) { cards[change.slot].apply(change); changed.add(cards[change.slot]); }
      lastTotals = value.totals;
    }
    const shown = cards.filter((card) => card.id !== null);
    empty.hidden = shown.length > 0;
    showTotals(shown.length);
    mark();
    // A newcomer sees bars at once: while nothing is selected, those of the first request that runs.
    if (!shown.some((card) => card.id === fallback && !card.hasEnded)) {
      fallback = (shown.find((card) => !card.hasEnded) || shown[0] || {}).id ?? null;
    }
    if ([...changed].some((card) => card.id === (client.selection.request ?? fallback))) bars.refresh();
    if (lastTotals) ui.say(`${lastTotals.running} running, ${lastTotals.waiting} waiting, ${lastTotals.finished} finished`);
  };
  const schedule = () => { if (!wanted) wanted = requestAnimationFrame(draw); };
  ui.undo.push(() => cancelAnimationFrame(wanted));

  const showTotals = (shown) => {
    if (!lastTotals) return;
    const { requests, running, waiting, preempted, finished, rate } = lastTotals;
    const parts = [`${running} running`, `${waiting} waiting`, preempted ? `${preempted} preempted` : "", `${asCount(finished)} finished`];
    const text = `${parts.filter(Boolean).join(" · ")} · ${asRate(rate)} in all (last second)`;
    const more = requests - shown;
    put(totals, { textContent: more > 0 ? `${text} · ${asCount(more)} more without a card` : text });
    Object.assign(ui.root.dataset, { requests, shown, more, running });
    put(list.button, { textContent: `All ${asCount(requests)}…`, disabled: !requests });
  };

  // Which card is selected; one of them can be reached with Tab.
  const mark = () => {
    const selected = client.selection.request;
    let reachable = null;
    for (const card of cards) {
      const is = card.id !== null && card.id === selected;
      put(card.node, { ariaSelected: String(is) });
      if (card.id !== null && (is || !reachable)) reachable = card;
    }
    for (const card of cards) put(card.node, { tabIndex: card === reachable ? 0 : -1 });
    if (selected !== marked) {
      marked = selected;
      const card = cards.find((c) => c.id !== null && c.id === selected);
      if (card) scrollInto(grid, card.node);
    }
  };
  let marked = null;

  const cardOf = (event) => cards[event.target.closest?.(".tv-race-card")?.dataset.slot];
  grid.addEventListener("click", (event) => {
    const card = cardOf(event);
    if (!card) return;
    client.select({ request: card.id });
    card.node.focus({ preventScroll: true });
  });
  grid.addEventListener("keydown", (event) => {
    const shown = cards.filter((card) => card.id !== null), at = shown.indexOf(cardOf(event));
    const columns = Math.max(1, getComputedStyle(grid).gridTemplateColumns.split(" ").length);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step && shown.length) {
      const next = shown[Math.max(0, Math.min(shown.length - 1, at + step))];
      client.select({ request: next.id });
      next.node.focus({ preventScroll: true });
    } else if (event.key === "Enter" || event.key === " ") {
      if (at >= 0) client.select({ request: shown[at].id });
      bars.focus();
    }
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  ui.tools.append(list.button);
  ui.body.append(list.node);
  bars.onEscape = () => cards.find((card) => card.id !== null && card.id === client.selection.request)?.node
    .focus({ preventScroll: true });
  ui.undo.push(client.onSelection(() => { mark(); bars.refresh(true); }));
  let told = "";
  ui.undo.push(client.onLive((live) => { if (live.state !== told) { told = live.state; bars.refresh(); } }));
  const setHeight = () => { grid.style.maxHeight = `${ui.height}px`; ui.root.classList.toggle("tv-large", ui.scale >= 1.5); };
  setHeight();
  window.addEventListener("resize", setHeight);
  ui.undo.push(() => window.removeEventListener("resize", setHeight));
  ui.listen(model, "change:height", setHeight);
  ui.listen(model, "change:scale", setHeight);
  let end = null;
  const subscribe = () => {
    if (end) { end(); for (const card of cards.splice(0)) card.node.remove(); pending = []; }
    end = client.subscribe(ui.root, "race", { shown: model.get("shown") }, {
      snapshot(value) { pending = [{ ...value, everything: true }]; schedule(); },
      delta(value) { pending.push(value); schedule(); },
    });
  };
  subscribe();
  ui.undo.push(() => end());
  ui.listen(model, "change:shown", subscribe);
  return ui.dispose;
}

// Scroll a box, and only it, until a child is in sight.
function scrollInto(box, child) {
  const outer = box.getBoundingClientRect(), inner = child.getBoundingClientRect();
  if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top;
  else if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
}

// The list of all requests, to pick one that has no card.
function makeList(ui) {
  const select = element("select", { size: 10, "aria-label": "all requests" });
  const node = element("div", { class: "tv-race-list", hidden: true }, select);
  const show = async () => {
    try {
      const { requests } = await ui.ask("race.list");
      select.replaceChildren(...requests.map(([id, status, tokens, text]) => element("option", { value: id,
        text: `${id} · ${STATUS[status] || status} · ${tokens} tok · ${visibleText(text)}`,
        selected: id === ui.client.selection.request })));
      node.hidden = false;
      select.focus();
    } catch (error) { ui.complain(error); }
  };
  const hide = () => { node.hidden = true; button_.focus(); };
  const button_ = button("All…", "pick any request, also one without a card", () => node.hidden ? show() : hide());
  select.addEventListener("change", () => ui.client.select({ request: select.value }));
  select.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key !== "Escape" && event.key !== "Enter") return;
    hide();
    event.preventDefault();
  });
  select.addEventListener("dblclick", hide);
  return { node, button: button_ };
}

export default { render };
