// The pool of KV-cache blocks: a grid of cells, the selected request's block table above it, and beside it what every
// request uses, wastes, and would have to reserve in one piece. What is drawn is what the topic "blocks" told.

const MANY_OWNERS = 4;       // stripes in a cell; the number tells of more
const TABLE_ROWS = 2;        // of boxes of the block table
const LINES = 32;            // from the table into the pool; more would hide it

async function render({ model, el }) {
  const ui = await panel(model, el, "KV blocks", "Click a block for its tokens, a request for its block table. Arrows move, Enter opens, Esc closes.");
  ui.root.classList.add("tv-blocks");
  const tip = tooltip(ui);
  let pool = emptyPool(), places = null, hovered = null, opened = null, asked = 0, lookAt = null;
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
  const use = canvas(ui, { parent: right, label: "What each request uses of the KV cache", draw: drawUse });
  map.node.dataset.part = "pool";
  use.node.dataset.part = "use";
  const redraw = () => { map.invalidate(); use.invalidate(); };

  // ---- what was told ----
  function take(value) {
    const whole = value.num_blocks !== undefined;
    if (whole) pool = { ...emptyPool(), num: value.num_blocks, size: value.block_size, most: value.max_model_len, caching: value.caching,
      ref: new Uint16Array(value.num_blocks), filled: new Int32Array(value.num_blocks), cached: new Uint8Array(value.num_blocks), owners: new Array(value.num_blocks) };
    let at = 0;
    for (let i = 0; i < value.ref.length; i++) {
      const id = value.ids ? value.ids[i] : i;
      pool.ref[id] = value.ref[i];
      pool.filled[id] = value.filled[i];
      pool.cached[id] = value.cached[i];
      pool.owners[id] = value.ref[i] ? Array.from(value.owners.subarray(at, at += value.ref[i])) : null;
    }
    for (const key of value.gone || []) {
      const row = pool.rows.get(key);
      if (row) pool.keys.delete(row.id);
      pool.rows.delete(key);
    }
    for (const [key, id, status, computed, tokens, most, found] of value.rows) {
      const row = pool.rows.get(key) || { key, id, table: [] };
      pool.rows.set(key, Object.assign(row, { status, computed, tokens, most, found }));
      pool.keys.set(id, key);
    }
    at = 0;
    value.table_keys.forEach((key, i) => { pool.rows.get(key).table = Array.from(value.tables.subarray(at, at += value.table_sizes[i])); });
    pool.totals = value.totals;
    if (opened !== null && opened >= pool.num) close();
    if (opened !== null) askAgain();
    tell();
    redraw();
  }
  const nameOf = (key) => pool.rows.get(key)?.id;
  const rowOf = (id) => pool.rows.get(pool.keys.get(id));

  function tell() {
    let held = 0, shared = 0, cached = 0;
    for (let i = 0; i < pool.num; i++) {
      if (pool.ref[i]) held++; else if (pool.cached[i]) cached++;
      if (pool.ref[i] > 1) shared++;
    }
    const { slots, filled, saved, found } = pool.totals;
    const holding = [...pool.rows.values()].filter((row) => row.table.length);
    const whole = holding.length * pool.most, wanted = holding.reduce((sum, row) => sum + row.computed, 0);
    const share = (part, all) => all ? `${(100 * part / all).toFixed(part / all < 0.1 ? 1 : 0)}%` : "0%";
    const said = (big, text, what, title) => element("span", { class: "tv-said", title, "data-said": what }, element("b", { text: big }), ` ${text}`);
    words.replaceChildren(
      said(`${asCount(held)} of ${asCount(pool.num)}`, "blocks held", "held", "Blocks that requests hold"),
      said(asCount(shared), "shared", "shared", `Blocks with several owners; sharing saves ${asCount(saved)} slots now. Found in the prefix cache so far: ${asCount(found)} tokens`),
      said(asCount(cached), "free, findable", "cached", "Nobody holds them; the prefix cache finds them until they are given away"),
      said(`${asCount(slots - filled)}`, `of ${asCount(slots)} slots wasted (${share(slots - filled, slots)})`, "waste", "Slots of held blocks without a token in them"),
      said(share(whole - wanted, whole), "wasted if contiguous", "contiguous",
        `In one piece each, ${holding.length} requests would reserve ${asCount(pool.most)} slots each, ${asCount(whole)} in all, for ${asCount(wanted)} tokens`),
      whatIf(holding));
    words.dataset.waste = String(slots - filled);
    words.dataset.slots = String(slots);
    words.dataset.contiguous = String(whole - wanted);
    const why = whyNoKill();
    kill.disabled = Boolean(why);
    kill.title = why || "End it now; its blocks go back to the pool";
    kill.textContent = chosen().request === null ? "Kill request" : `Kill request ${shorten(chosen().request)}`;
    ui.say(`${held} of ${pool.num} blocks held, ${shared} shared, ${cached} findable, ${slots - filled} slots wasted`);
  }

  // The waste that the same tokens would make in blocks of other sizes (nothing shared): arithmetic, not a run.
  function whatIf(holding) {
    const sizes = [...new Set([1, 4, 16, 64, 256, pool.size])].sort((a, b) => a - b);
    const text = sizes.map((size) => {
      const slots = holding.reduce((sum, row) => sum + Math.ceil(row.computed / size) * size, 0);
      const used = holding.reduce((sum, row) => sum + row.computed, 0);
      return `${size}: ${slots ? Math.round(100 * (slots - used) / slots) : 0}%`;
    });
    return element("span", { class: "tv-muted", "data-said": "what-if", title: "How much the present tokens would waste in blocks of this size, nothing shared" },
      `waste by block size ${text.join("  ")}`);
  }
  const shorten = (id) => String(id).length > 14 ? `${String(id).slice(0, 13)}…` : String(id);

  // ---- the cells ----
  // A style for each owner, made once a drawing.
  function looks(ctx) {
    const known = new Map();
    return (key) => {
      if (!known.has(key)) {
        const look = requestLook(nameOf(key) ?? "");
        known.set(key, { ...look, fill: hatched(ctx, look.colour, look.hatch), pale: `${look.colour}40` });
      }
      return known.get(key);
    };
  }

  // One cell. cell: {ref, filled (0 to 1), cached, owners}. Returns what it was drawn as.
  function paint(ctx, x, y, size, cell, lookOf, t) {
    const gap = size >= 40 ? 2 : size >= 10 ? 1 : size >= 5 ? 0.5 : 0;
    const w = size - 2 * gap;
    x += gap; y += gap;
    if (!cell.ref) {
      ctx.fillStyle = cell.cached ? findable(ctx, t) : t.raised;
      ctx.fillRect(x, y, w, w);
      if (cell.cached && size >= 10) {
        ctx.strokeStyle = t.muted; ctx.lineWidth = 1;
        ctx.setLineDash([3, 2]); ctx.strokeRect(x + 0.5, y + 0.5, w - 1, w - 1); ctx.setLineDash([]);
      }
      return cell.cached ? "cached" : "free";
    }
    const owners = cell.owners.slice(0, MANY_OWNERS), h = w / owners.length;
    owners.forEach((key, i) => {
      const look = lookOf(key);
      ctx.fillStyle = look.pale;
      ctx.fillRect(x, y + i * h, w, h);
      ctx.fillStyle = look.fill;
      ctx.fillRect(x, y + i * h, w * cell.filled, h);
    });
    if (size >= 8) {
      ctx.strokeStyle = lookOf(owners[0]).colour; ctx.lineWidth = 1;
      ctx.strokeRect(x + 0.5, y + 0.5, w - 1, w - 1);
    }
    if (cell.cached && size >= 16) {  // a folded corner: the prefix cache can find it
      ctx.fillStyle = t.text;
      ctx.beginPath(); ctx.moveTo(x + w, y); ctx.lineTo(x + w - w / 5, y); ctx.lineTo(x + w, y + w / 5); ctx.fill();
    }
    return cell.ref > 1 ? "shared" : "held";
  }
  let stripe = null;
  function findable(ctx, t) {
    if (!stripe || stripe.t !== t) {
      const tile = element("canvas", { width: 6, height: 6 }), c = tile.getContext("2d");
      c.fillStyle = t.panel; c.fillRect(0, 0, 6, 6);
      c.strokeStyle = t.muted; c.lineWidth = 1.2;
      c.beginPath(); c.moveTo(-1, 1); c.lineTo(1, -1); c.moveTo(0, 6); c.lineTo(6, 0); c.moveTo(5, 7); c.lineTo(7, 5); c.stroke();
      stripe = { t, tile };
    }
    return ctx.createPattern(stripe.tile, "repeat");
  }
  // Text that reads on any colour.
  function outlined(ctx, text, x, y, t) {
    ctx.lineWidth = 3; ctx.lineJoin = "round"; ctx.strokeStyle = t.panel; ctx.strokeText(text, x, y);
    ctx.fillStyle = t.text; ctx.fillText(text, x, y);
  }

  // ---- the pool ----
  function drawMap(ctx, width, height, t) {
    const began = performance.now();
    const scale = ui.scale, head = tableHeight(scale);
    places = gridPlaces(width, height - head, head);
    const { cell, columns } = places, lookOf = looks(ctx);
    const drawn = { held: 0, shared: 0, cached: 0, free: 0 }, counts = {};
    for (let i = 0; i < pool.num; i++) {
      const kind = paint(ctx, (i % columns) * cell, head + Math.floor(i / columns) * cell, cell,
        { ref: pool.ref[i], filled: pool.filled[i] / pool.size, cached: pool.cached[i], owners: pool.owners[i] }, lookOf, t);
      drawn[kind]++;
      if (kind === "shared") counts[i] = pool.ref[i];
    }
    if (cell >= 13) drawNumbers(ctx, t, scale);
    drawTable(ctx, width, t, lookOf);
    ring(ctx, hovered, t.muted, 1.5);
    ring(ctx, chosen().block, t.panel, 6);
    ring(ctx, chosen().block, t.text, 3.5);
    Object.assign(map.node.dataset, { coloured: drawn.held + drawn.shared, shared: JSON.stringify(counts), cached: drawn.cached, free: drawn.free,
      cell: cell, columns, top: head, ms: (performance.now() - began).toFixed(2) });
    drawLegend(t);
  }

  function gridPlaces(width, height, top) {
    if (!pool.num) return { cell: 0, columns: 1, top };
    let columns = Math.max(1, Math.ceil(Math.sqrt(pool.num * width / Math.max(1, height))));
    while (Math.ceil(pool.num / columns) * Math.floor(width / columns) > height && Math.floor(width / columns) > 2) columns++;
    const cell = Math.min(Math.floor(width / columns), Math.round(64 * ui.scale));
    columns = Math.min(pool.num, Math.max(columns, Math.floor(width / cell)));
    return { cell: Math.max(2, cell), columns, top };
  }
  const corner = (id) => [(id % places.columns) * places.cell, places.top + Math.floor(id / places.columns) * places.cell];
  function blockAt(event) {
    const box = map.node.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const boxed = places?.boxes?.find((b) => x >= b.x && x < b.x + b.w && y >= b.y && y < b.y + b.h);
    if (boxed) return boxed.block;
    if (!places || !places.cell || y < places.top || x < 0 || x >= places.columns * places.cell) return null;
    const id = Math.floor((y - places.top) / places.cell) * places.columns + Math.floor(x / places.cell);
    return id < pool.num ? id : null;
  }

  function drawNumbers(ctx, t, scale) {
    const { cell } = places, large = cell >= 30;
    ctx.textAlign = "left";
    for (let i = 0; i < pool.num; i++) {
      const [x, y] = corner(i);
      if (pool.ref[i] > 1) {
        ctx.font = `bold ${Math.min(0.5 * cell, 22 * scale)}px ${t.font}`;
        ctx.textAlign = "center";
        outlined(ctx, large ? `×${pool.ref[i]}` : String(pool.ref[i]), x + cell / 2, y + cell / 2 + (large ? 0.1 * cell : 0), t);
        ctx.textAlign = "left";
      }
      if (large) {
        ctx.font = `${Math.min(0.3 * cell, 14 * scale)}px ${t.font}`;
        if (pool.ref[i]) outlined(ctx, String(i), x + 4, y + 0.24 * cell, t);
        else { ctx.fillStyle = t.muted; ctx.fillText(String(i), x + 4, y + 0.24 * cell); }
      }
    }
  }
  function ring(ctx, id, colour, width) {
    if (id === null || id === undefined || id >= pool.num || !places.cell) return;
    const [x, y] = corner(id);
    ctx.strokeStyle = colour; ctx.lineWidth = width;
    ctx.strokeRect(x + 1, y + 1, Math.max(2, places.cell - 2), Math.max(2, places.cell - 2));
  }

  // ---- the block table of the selected request: logical block -> physical block ----
  const tableHeight = (scale) => Math.round(scale * (TABLE_ROWS * 24 + 26));
  function drawTable(ctx, width, t, lookOf) {
    const scale = ui.scale, id = chosen().request, row = id === null ? null : rowOf(id);
    places.boxes = [];
    ctx.textAlign = "left";
    ctx.font = `${13 * scale}px ${t.font}`;
    ctx.fillStyle = t.muted;
    if (!row || !row.table.length) {
      ctx.fillText(id === null ? "Select a request to see its block table." : !row ? `Request ${shorten(id)} has ended: its blocks went back.`
        : `Request ${shorten(id)} is ${row.status}: it holds no block.`, 0, 10 * scale);
      map.node.dataset.table = "";
      return;
    }
    ctx.fillText(`Block table of request ${shorten(id)}: its blocks in order → where they lie`, 0, 10 * scale, width);
    const digits = String(Math.max(0, pool.num - 1)).length, h = 20 * scale;
    const w = (10 + 9 * digits) * scale, perRow = Math.max(1, Math.floor(width / w)), room = perRow * TABLE_ROWS;
    // All of it if there is room; else the end, where it grows, or the stretch around the selected block.
    const at = row.table.indexOf(chosen().block), n = row.table.length;
    const first = n <= room ? 0 : Math.max(0, Math.min(n - room, at < 0 ? n : at - (room >> 1)));
    const look = lookOf(row.key);
    ctx.textAlign = "center";
    row.table.slice(first, first + room).forEach((block, i) => {
      const box = { x: (i % perRow) * w, y: (24 + 24 * Math.floor(i / perRow)) * scale, w: w - 3 * scale, h, block, index: first + i };
      places.boxes.push(box);
      ctx.fillStyle = look.fill;
      ctx.fillRect(box.x, box.y, box.w, h);
      ctx.strokeStyle = block === chosen().block ? t.text : look.colour;
      ctx.lineWidth = block === chosen().block ? 3 : 1;
      ctx.strokeRect(box.x + 0.5, box.y + 0.5, box.w - 1, h - 1);
      ctx.font = `bold ${13 * scale}px ${t.font}`;
      outlined(ctx, String(block), box.x + box.w / 2, box.y + h / 2, t);
    });
    for (const block of row.table) ring(ctx, block, t.text, places.cell >= 10 ? 2 : 1);
    const lined = places.boxes.length <= LINES ? places.boxes : places.boxes.filter((b) => b.block === chosen().block || b.block === hovered);
    for (const box of lined) {
      const strong = box.block === chosen().block || box.block === hovered, [x, y] = corner(box.block);
      ctx.strokeStyle = t.text;
      ctx.globalAlpha = strong ? 0.95 : 0.4;
      ctx.lineWidth = strong ? 2.5 : 1.2;
      const x0 = box.x + box.w / 2, y0 = box.y + h, x1 = x + places.cell / 2, y1 = y + 2;
      ctx.beginPath(); ctx.moveTo(x0, y0); ctx.bezierCurveTo(x0, y0 + (y1 - y0) * 0.5, x1, y0 + (y1 - y0) * 0.5, x1, y1); ctx.stroke();
    }
    ctx.globalAlpha = 1;
    if (first > 0) { ctx.textAlign = "right"; ctx.font = `${12 * scale}px ${t.font}`; outlined(ctx, `from its block ${first} on`, width, 10 * scale, t); }
    map.node.dataset.table = row.table.join(" ");
  }

  // ---- what each request uses: to the scale of what one piece of the greatest length would be ----
  const rowHeight = () => 26 * ui.scale;
  let shownRows = [];
  function ordered() {
    const rows = [...pool.rows.values()];
    return [...rows.filter((row) => row.table.length), ...rows.filter((row) => !row.table.length)];
  }
  function drawUse(ctx, width, height, t) {
    const scale = ui.scale, rows = ordered(), h = rowHeight(), lookOf = looks(ctx);
    ctx.textAlign = "left";
    ctx.font = `${13 * scale}px ${t.font}`;
    ctx.fillStyle = t.muted;
    if (!rows.length) {
      wrapText(ctx, pool.num ? "No request holds a block. Press Burst in the control bar, or run live.chat([...]) in a cell, and the blocks fill."
        : "The pool appears as soon as the engine has told of it.", 0, 14 * scale, width, 18 * scale);
      use.node.dataset.rows = "0";
      shownRows = [];
      return;
    }
    ctx.fillText(`Each request: filled, wasted, and of ${asCount(pool.most)} in one piece`, 0, 10 * scale, width);
    const room = Math.max(1, Math.floor((height - 24 * scale) / h) - (rows.length * h > height - 24 * scale ? 1 : 0));
    const at = rows.findIndex((row) => row.id === chosen().request);
    const first = Math.max(0, Math.min(rows.length - room, at < 0 ? 0 : at - room + 1));
    shownRows = rows.slice(first, first + room);
    const x0 = 64 * scale, w = Math.max(20, width - x0 - 2);
    shownRows.forEach((row, i) => {
      const y = 24 * scale + i * h, look = lookOf(row.key), bar = h - 9 * scale, per = w / Math.max(1, pool.most);
      if (row.id === chosen().request) { ctx.fillStyle = t.raised; ctx.fillRect(0, y - 2 * scale, width, h - 2 * scale); }
      ctx.fillStyle = look.fill; ctx.fillRect(2, y, 12 * scale, bar);
      ctx.fillStyle = t.text; ctx.fillText(shorten(row.id).slice(0, 8), 18 * scale, y + bar / 2, x0 - 20 * scale);
      const slots = row.table.length * pool.size;
      ctx.strokeStyle = t.muted; ctx.lineWidth = 1; ctx.setLineDash([4, 3]); ctx.strokeRect(x0 + 0.5, y + 0.5, w - 1, bar - 1); ctx.setLineDash([]);
      ctx.fillStyle = look.pale; ctx.fillRect(x0, y, Math.min(w, slots * per), bar);
      ctx.fillStyle = look.fill; ctx.fillRect(x0, y, Math.min(w, row.computed * per), bar);
      const words = !row.table.length ? row.status : `${row.computed} in ${row.table.length} × ${pool.size}, ${slots - row.computed} wasted`;
      ctx.textAlign = "right";
      outlined(ctx, words, width - 6, y + bar / 2, t);
      ctx.textAlign = "left";
    });
    if (rows.length > shownRows.length) {
      ctx.fillStyle = t.muted;
      ctx.fillText(`and ${asCount(rows.length - shownRows.length)} more`, x0, 24 * scale + shownRows.length * h + 8 * scale);
    }
    use.node.dataset.rows = String(rows.length);
    use.node.dataset.first = shownRows.map((row) => row.id).join("\n");
  }
  function wrapText(ctx, text, x, y, width, line) {
    let now = "";
    for (const word of text.split(" ")) {
      if (now && ctx.measureText(`${now} ${word}`).width > width) { ctx.fillText(now, x, y); y += line; now = word; } else now = now ? `${now} ${word}` : word;
    }
    ctx.fillText(now, x, y);
  }

  // ---- the legend, painted as the cells are ----
  let legendOf = null;
  function drawLegend(t) {
    if (legendOf === t && legend.dataset.scale === String(ui.scale)) return;
    legendOf = t;
    legend.dataset.scale = String(ui.scale);
    const size = 20 * ui.scale, ratio = window.devicePixelRatio || 1;
    const items = [["held, full", { ref: 1, filled: 1, owners: ["0"] }], ["held, partly filled: the pale slots are wasted", { ref: 1, filled: 0.4, owners: ["0"] }],
      ["shared: stripes of its owners, and how many", { ref: 2, filled: 1, owners: ["0", "1"] }],
      ["corner: findable by its prefix", { ref: 1, filled: 1, cached: 1, owners: ["2"] }],
      ["free, still findable", { ref: 0, cached: 1 }], ["free", { ref: 0 }]];
    legend.replaceChildren(...items.map(([text, cell]) => {
      const node = element("canvas", { width: Math.round(size * ratio), height: Math.round(size * ratio), style: { width: `${size}px`, height: `${size}px` } });
      const ctx = node.getContext("2d");
      ctx.scale(ratio, ratio);
      paint(ctx, 0, 0, size, cell, (key) => ({ ...requestLook(key), fill: requestLook(key).colour, pale: `${requestLook(key).colour}40` }), t);
      return element("span", { class: "tv-legend-item" }, node, text);
    }));
  }

  // ---- one block ----
  function open(id) {
    opened = id;
    ask();
  }
  function close() {
    opened = null;
    detail.hidden = true;
    detail.replaceChildren();
  }
  function askAgain() {  // at most three times a second, while things change
    if (!lookAt) lookAt = setTimeout(() => { lookAt = null; if (opened !== null) ask(); }, Math.max(30, 330 - (performance.now() - asked)));
  }
  ui.undo.push(() => clearTimeout(lookAt));
  async function ask() {
    asked = performance.now();
    const id = opened;
    try {
      const told = await ui.ask("block", { block_id: id });
      if (id === opened) showBlock(told);
    } catch (error) { if (id === opened) ui.complain(error); }
  }
  function showBlock(told) {
    const who = told.owners.length ? `held by request ${told.owners.map(shorten).join(", ")}` : told.last !== null ? `free; request ${shorten(told.last)} had it last` : "free";
    const found = told.cached ? "the prefix cache can find it" : "not findable";
    const head = element("div", null, element("b", { text: `Block ${told.block}` }), `: ${who}${told.owners.length > 1 ? ` (×${told.owners.length})` : ""} · ${found} · `
      + `${told.filled} of ${told.size} slots filled`, told.start !== null ? ` · positions ${told.start} to ${told.start + told.size - 1}` : "");
    const tokens = element("div", { class: "tv-tokens" }, ...told.tokens.map(([position, id, text]) => {
      const chip = element("span", { class: "tv-token", title: `position ${position ?? "?"}, token id ${id}`, onclick: () => position !== null && ui.client.select({ token: position }) },
        element("span", { class: "tv-token-at", text: position === null ? "" : String(position) }),
        element("span", { class: "tv-mono", text: text === null ? "?" : visibleText(text) || "∅" }), element("span", { class: "tv-token-id", text: String(id) }));
      if (position !== null && position === ui.client.selection.token && told.owners.includes(chosen().request)) chip.setAttribute("aria-current", "true");
      return chip;
    }));
    const note = !told.known ? "What lies in it was not recorded." : !told.tokens.length ? (told.owners.length ? "Nothing is written into it yet." : "Nothing of value lies in it.")
      : told.left_out ? `and ${asCount(told.left_out)} more` : "";
    detail.replaceChildren(head, tokens, element("div", { class: "tv-muted", text: note }));
    detail.hidden = false;
    detail.dataset.block = String(told.block);
    ui.say(`block ${told.block}, ${who}, ${found}`);
  }

  // ---- hands ----
  function pick(id) {
    if (id === null) return;
    const owners = (pool.owners[id] || []).map(nameOf);
    const request = owners.length && !owners.includes(chosen().request) ? owners[0] : chosen().request;
    ui.client.select({ block: id, request });
  }
  const whyNoKill = () => ui.client.live.kind === "replay" ? "This is a recorded run: its requests ended as they ended."
    : chosen().request === null ? "Select a request first" : !rowOf(chosen().request) ? "This request has ended" : "";
  async function killRequest() {
    try {
      await ui.ask("kill_request", { request_id: chosen().request });
      ui.complain(null);
    } catch (error) { ui.complain(error); }
  }
  map.node.addEventListener("click", (event) => {
    const id = blockAt(event);
    if (id === null) return;
    pick(id);
    open(id);
  });
  map.node.addEventListener("mousemove", (event) => {
    const id = blockAt(event);
    map.node.style.cursor = id === null ? "" : "pointer";
    if (id === null) tip.hide(); else tip.show(event, describe(id));
    if (id !== hovered) { hovered = id; map.invalidate(); }
  });
  map.node.addEventListener("mouseleave", () => { hovered = null; tip.hide(); map.invalidate(); });
  function describe(id) {
    const owners = (pool.owners[id] || []).map(nameOf);
    if (!owners.length) return `block ${id}: free${pool.cached[id] ? ", still findable by its prefix" : ""}`;
    return `block ${id}: request ${owners.slice(0, 12).map(shorten).join(", ")}${owners.length > 12 ? ", …" : ""}\n${pool.filled[id]} of ${pool.size} slots filled`
      + (owners.length > 1 ? `\nshared by ${owners.length}` : "") + (pool.cached[id] ? "\nfindable by its prefix" : "");
  }
  map.node.addEventListener("keydown", (event) => {
    const now = chosen().block ?? -1, { columns } = places || { columns: 1 };
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step) pick(now < 0 ? 0 : Math.max(0, Math.min(pool.num - 1, now + step)));
    else if (event.key === "Enter" && now >= 0 && now < pool.num) open(now);
    else if (event.key === "Escape") { close(); ui.client.select({ block: null }); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  use.node.addEventListener("click", (event) => {
    const y = event.clientY - use.node.getBoundingClientRect().top - 24 * ui.scale;
    const row = y < 0 ? undefined : shownRows[Math.floor(y / rowHeight())];
    if (row) ui.client.select({ request: row.id });
  });
  use.node.addEventListener("keydown", (event) => {
    const rows = ordered(), at = rows.findIndex((row) => row.id === chosen().request);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + (event.key === "ArrowDown" ? 1 : -1)))];
      if (next) ui.client.select({ request: next.id });
    } else if (event.key === "Escape") ui.client.select({ request: null });
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  let lastToken = null;
  ui.undo.push(ui.client.onSelection(() => {
    const { request, token } = ui.client.selection, row = request === null ? null : rowOf(request);
    if (token !== lastToken && token !== null && row) {  // a token elsewhere: its block here
      const block = row.table[Math.floor(token / pool.size)];
      lastToken = token;
      if (block !== undefined && block !== chosen().block) { ui.client.select({ block }); return; }
    }
    lastToken = token;
    if (opened !== null && chosen().block !== null && chosen().block !== opened && chosen().block < pool.num) open(chosen().block);
    else if (opened !== null) askAgain();
    tell();
    redraw();
  }));
  ui.subscribe("blocks", {}, { snapshot: take, delta: take });
  return ui.dispose;
}

function emptyPool() {
  return { num: 0, size: 1, most: 0, caching: true, ref: [], filled: [], cached: [], owners: [], rows: new Map(), keys: new Map(),
    totals: { slots: 0, filled: 0, saved: 0, found: 0 } };
}
export default { render };
