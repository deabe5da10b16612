// The block map: the pool as a grid, the selected request's block table above it, what every request uses beside it, and
// one block in words. What is drawn is what the topic "blocks" told.

async function render({ model, el }) {
  const ui = await panel(model, el, "KV blocks", "Click a block for its tokens, a request for its block table. Arrows move, Enter opens, Esc closes.");
  ui.root.classList.add("tv-blocks");
  const pool = new BlockPool(), picture = new PoolPicture(), tip = tooltip(ui);
  let grid = gridOf(0, 0, 0, 1), hovered = null, shownRows = [];
  const chosen = () => ({ request: ui.client.selection.request, block: ui.client.selection.block });

  // ---- the page ----
  const words = element("div", { class: "tv-blocks-words" });
  const kill = button("Kill request", "", () => killRequest(), { "data-do": "kill", disabled: true });
  ui.tools.append(kill);
  const left = element("div", { class: "tv-blocks-pool" }), right = element("div", { class: "tv-blocks-use" });
  const legend = element("div", { class: "tv-legend" });
  const detail = element("div", { class: "tv-blocks-detail", hidden: true, "data-told": "block" });
  ui.body.append(words, element("div", { class: "tv-blocks-columns" }, left, right), legend, detail);
  const map = canvas(ui, { parent: left, label: "The pool of KV-cache blocks", draw: drawMap });
  const use = canvas(ui, { parent: right, label: "What each request uses of the KV cache", draw: drawUses });
  map.node.dataset.part = "pool";
  use.node.dataset.part = "use";
  const redraw = () => { map.invalidate(); use.invalidate(); };

  let legendOf = null;
  function drawMap(ctx, width, height, t) {
    const began = performance.now(), lookOf = ownerLooks(ctx, pool), { request, block } = chosen();
    grid = gridOf(pool.num, width, height, ui.scale);
    const { drawn, counts, painted } = picture.draw(ctx, pool, grid, t, ui.scale, lookOf);
    drawTable(ctx, pool, grid, chosen(), hovered, width, t, ui.scale, lookOf);
    ring(ctx, grid, pool.num, hovered, t.muted, 1.5);
    ring(ctx, grid, pool.num, block, t.panel, 6);
    ring(ctx, grid, pool.num, block, t.text, 3.5);
    Object.assign(map.node.dataset, { coloured: drawn.held + drawn.shared, shared: JSON.stringify(counts), cached: drawn.cached, free: drawn.free, painted,
      cell: grid.cell, columns: grid.columns, top: grid.top, table: (pool.rowOf(request)?.table || []).join(" "), ms: (performance.now() - began).toFixed(2) });
    if (legendOf !== t || legend.dataset.scale !== String(ui.scale)) legend.replaceChildren(...legendItems(t, ui.scale));
    legendOf = t;
    legend.dataset.scale = String(ui.scale);
  }
  function drawUses(ctx, width, height, t) {
    pool.kind = ui.client.live.kind;
    shownRows = drawUse(ctx, pool, chosen().request, width, height, t, ui.scale);
    use.node.dataset.rows = String(pool.rows.size);
  }

  // ---- in words ----
  const spoken = {};  // what -> its nodes: only their texts change
  const bySize = element("span", { class: "tv-muted", "data-said": "what-if", title: "How much the present tokens would waste in blocks of this size, nothing shared" });
  function tell() {
    const { held, shared, cached } = pool.counts(), { slots, filled, saved, found } = pool.totals, piece = pool.inOnePiece();
    const share = (part, all) => all ? `${(100 * part / all).toFixed(part / all < 0.1 ? 1 : 0)}%` : "0%";
    const said = (what, big, text, title) => {
      if (!spoken[what]) {
        const number = element("b"), rest = document.createTextNode("");
        spoken[what] = { number, rest, node: element("span", { class: "tv-said", "data-said": what }, number, rest) };
      }
      const { node, number, rest } = spoken[what];
      put(node, { title });
      put(number, { textContent: big });
      put(rest, { data: ` ${text}` });
      return node;
    };
    const sayings = [
      said("held", `${asCount(held)} of ${asCount(pool.num)}`, "blocks held", "Blocks that requests hold"),
      said("shared", asCount(shared), "shared",
        `Blocks with several owners; sharing saves ${asCount(saved)} slots now. Found in the prefix cache so far: ${asCount(found)} tokens`),
      said("cached", asCount(cached), "free, findable", "Nobody holds them; the prefix cache finds them until they are given away"),
      said("waste", asCount(slots - filled), `of ${asCount(slots)} slots wasted (${share(slots - filled, slots)})`, "Slots of held blocks without a token in them"),
      said("contiguous", share(piece.slots - piece.tokens, piece.slots), "wasted if contiguous",
        `In one piece each, ${piece.requests} requests would reserve ${asCount(pool.most)} slots each, ${asCount(piece.slots)} in all, for ${asCount(piece.tokens)} tokens`),
      ...(piece.requests ? [bySize] : [])];
    put(bySize, { textContent: `waste by block size ${pool.wasteBySize().map(([size, part]) => `${size}: ${Math.round(100 * part)}%`).join("  ")}` });
    if (sayings.length !== words.childNodes.length) words.replaceChildren(...sayings);
    const why = whyNoKill();
    put(kill, { disabled: Boolean(why), title: why || "End it now; its blocks go back to the pool",
      textContent: chosen().request === null ? "Kill request" : `Kill request ${shortId(chosen().request)}` });
    ui.say(`${held} of ${pool.num} blocks held, ${shared} shared, ${cached} findable, ${slots - filled} slots wasted`);
  }
  function describe(id) {
    const owners = pool.ownersOf(id);
    if (!owners.length) return `block ${id}: free${pool.cached[id] ? ", still findable by its prefix" : ""}`;
    return `block ${id}: request ${owners.slice(0, 12).map(shortId).join(", ")}${owners.length > 12 ? ", …" : ""}\n${pool.filled[id]} of ${pool.size} slots filled`
      + (owners.length > 1 ? `\nshared by ${owners.length}` : "") + (pool.cached[id] ? "\nfindable by its prefix" : "");
  }
  const whyNoKill = () => ui.client.live.kind === "replay" ? "This is a recorded run: its requests ended as they ended."
    : chosen().request === null ? "Select a request first" : !pool.rowOf(chosen().request) ? "This request has ended" : "";
  async function killRequest() {
    try {
      await ui.ask("kill_request", { request_id: chosen().request });
      ui.complain(null);
    } catch (error) { ui.complain(error); }
  }

  // ---- one block: asked again, at most three times a second, while things change ----
  let opened = null, asked = 0, timer = 0;
  function open(id) { opened = id; ask(); }
  function close() {
    opened = null;
    detail.hidden = true;
    detail.replaceChildren();
  }
  function askAgain() {
    if (opened !== null && !timer) timer = setTimeout(() => { timer = 0; if (opened !== null) ask(); }, Math.max(30, 330 - (performance.now() - asked)));
  }
  ui.undo.push(() => clearTimeout(timer));
  async function ask() {
    asked = performance.now();
    const id = opened;
    try {
      const told = await ui.ask("block", { block_id: id });
      if (id === opened) showBlock(told);
    } catch (error) { if (id === opened) ui.complain(error); }
  }
  function showBlock(told) {
    const { owners, tokens } = told;
    const who = owners.length ? `held by request ${owners.map(shortId).join(", ")}${owners.length > 1 ? ` (×${owners.length})` : ""}`
      : told.last !== null ? `free; request ${shortId(told.last)} had it last` : "free";
    const found = told.cached ? "the prefix cache can find it" : "not findable";
    const where = told.start === null ? "" : ` · positions ${told.start} to ${told.start + told.size - 1}`;
    const note = !told.known ? "What lies in it was not recorded." : told.left_out ? `and ${asCount(told.left_out)} more`
      : tokens.length ? "" : owners.length ? "Nothing is written into it yet." : "Nothing of value lies in it.";
    detail.replaceChildren(
      element("div", null, element("b", { text: `Block ${told.block}` }), `: ${who} · ${found} · ${told.filled} of ${told.size} slots filled${where}`),
      element("div", { class: "tv-tokens" }, ...tokens.map(([position, id, text]) => element("span", { class: "tv-token",
        title: `position ${position ?? "unknown"}, token id ${id}`, onclick: () => position !== null && ui.client.select({ token: position }),
        "aria-current": position !== null && position === ui.client.selection.token && owners.includes(chosen().request) ? "true" : null },
        element("span", { class: "tv-token-at", text: position === null ? "" : String(position) }),
        element("span", { class: "tv-mono", text: text === null ? "?" : visibleText(text) || "∅" }), element("span", { class: "tv-token-id", text: String(id) })))),
      element("div", { class: "tv-muted", text: note }));
    detail.hidden = false;
    detail.dataset.block = String(told.block);
    ui.say(`block ${told.block}, ${who}, ${found}`);
  }

  // ---- hands ----
  function pick(id) {
    const owners = pool.ownersOf(id), { request } = chosen();
    ui.client.select({ block: id, request: owners.length && !owners.includes(request) ? owners[0] : request });
  }
  function blockAt(event) {
    const box = map.node.getBoundingClientRect();
    return blockUnder(grid, pool.num, event.clientX - box.left, event.clientY - box.top);
  }
  function onKeys(node, handle) {
    node.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !handle(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
    });
  }
  map.node.addEventListener("click", (event) => {
    const id = blockAt(event);
    if (id !== null) { pick(id); open(id); }
  });
  map.node.addEventListener("mousemove", (event) => {
    const id = blockAt(event);
    map.node.style.cursor = id === null ? "" : "pointer";
    if (id === null) tip.hide(); else tip.show(event, describe(id));
    if (id !== hovered) { hovered = id; map.invalidate(); }
  });
  map.node.addEventListener("mouseleave", () => { hovered = null; tip.hide(); map.invalidate(); });
  onKeys(map.node, (key) => {
    const now = chosen().block ?? -1, step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: grid.columns, ArrowUp: -grid.columns }[key];
    if (step && pool.num) pick(now < 0 ? 0 : Math.max(0, Math.min(pool.num - 1, now + step)));
    else if (key === "Enter" && now >= 0 && now < pool.num) open(now);
    else if (key === "Escape") { close(); ui.client.select({ block: null }); }
    else return false;
    return true;
  });
  use.node.addEventListener("click", (event) => {
    const y = event.clientY - use.node.getBoundingClientRect().top - useTop(ui.scale);
    const row = y < 0 ? undefined : shownRows[Math.floor(y / useRow(ui.scale))];
    if (row) ui.client.select({ request: row.id });
  });
  onKeys(use.node, (key) => {
    const rows = pool.ordered, at = rows.findIndex((row) => row.id === chosen().request);
    const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + (key === "ArrowDown" ? 1 : -1)))];
    if (key === "Escape") ui.client.select({ request: null });
    else if ((key === "ArrowDown" || key === "ArrowUp") && next) ui.client.select({ request: next.id });
    else return false;
    return true;
  });

  // ---- what other panels select ----
  let lastToken = null;
  ui.undo.push(ui.client.onSelection(() => {
    const { request, token, block } = ui.client.selection, row = pool.rowOf(request);
    const isNew = token !== lastToken && token !== null && row;
    lastToken = token;
    const home = isNew ? row.table[Math.floor(token / pool.size)] : undefined;  // a token elsewhere: its block here
    if (home !== undefined && home !== block) { ui.client.select({ block: home }); return; }
    if (opened !== null && block !== null && block !== opened && block < pool.num) open(block);
    else askAgain();
    tell();
    redraw();
  }));
  function take(value) {
    pool.take(value);
    if (opened !== null && opened >= pool.num) close();
    askAgain();
    tell();
    redraw();
  }
  ui.subscribe("blocks", {}, { snapshot: take, delta: take });
  return ui.dispose;
}
export default { render };
