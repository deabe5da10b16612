// AttentionScope: all heads at the left, the head in focus in the middle, the arithmetic of a cell beside it.

const EMPTY = "Nothing to show yet. Give the engine a prompt: every head's attention appears here, row by row, as its "
  + "tokens are computed.";
const CLICK = "Click a cell: its arithmetic appears here, from q · k to the weight.";
const HINT = "Each row is a token that looks back at the columns before it. Click a head, then a cell for its arithmetic. "
  + "Keys: arrows move, Enter opens the arithmetic, + and − zoom, Esc lets go.";
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

async function render({ model, el }) {
  const ui = await panel(model, el, "Attention", HINT);
  const tip = tooltip(ui), atlas = new Atlas(), image = new RowImage(), imagined = new RowImage();
  let v = null, tokens = [], cell = null, hover = null, zoom = 0, version = 0, opened = false;
  let root = true, table = weightColours(true), causal = true, scaled = true, what = null;  // what: an answered "what if"
  let view = null, box = null;  // where the map and the thumbnails were drawn

  // ---- the frame ----
  const em = (n) => `calc(${n}px * var(--tv-scale, 1))`;
  const column = (grow, basis, least) => element("div", { style: {
    flex: `${grow} 1 ${em(basis)}`, minWidth: `min(100%, ${em(least)})` } });
  const left = element("div", { style: { flex: "0 0 auto", minWidth: "0", maxWidth: "100%" } });
  const middle = column(6, 300, 300), right = column(4, 300, 280);
  const layout = element("div", { style: { display: "flex", flexWrap: "wrap", gap: em(12), alignItems: "flex-start" } },
    left, middle, right);
  const note = element("div", { class: "tv-muted", style: { padding: ".6em 0", fontSize: "1.1em" }, text: EMPTY });
  const said = element("div", { class: "tv-row-text", tabindex: "0", "aria-label": "the selected row as text", style: {
    lineHeight: "1.75", maxHeight: "9em", overflowY: "auto", marginTop: "4px" } });
  ui.body.append(note, layout, said);
  const thumbs = canvas(ui, { parent: left, label: "all heads: arrows choose one", draw: drawThumbs });
  const map = canvas(ui, { parent: middle, label: "attention of the head in focus: rows look at columns", draw: drawMap });
  const arithmetic = arithmeticBox(ui, right);
  arithmetic.message(CLICK);

  const requests = element("select", { class: "tv-select", title: "whose attention", style: { maxWidth: "14em" },
    onchange: () => {
      cell = null;
      ui.client.select({ request: requests.value === "" ? null : requests.value.slice(1), token: null });
    } });
  const toggle = (text, title, flip) => {
    const node = button(text, title, () => { node.setAttribute("aria-pressed", String(flip())); changed(); },
      { "aria-pressed": "true" });
    return node;
  };
  ui.tools.append(requests,
    toggle("√ colours", "colours by the square root of the weight, so that small weights show", () => {
      root = !root;
      table = weightColours(root);
      return root;
    }),
    toggle("causal mask", "off: what if every token could look at those after it?", () => {
      causal = !causal;
      askWhatIf();
      refreshCell();
      return causal;
    }),
    toggle("÷ √d", "off: what if scores were not scaled?", () => {
      scaled = !scaled;
      askWhatIf();
      refreshCell();
      return scaled;
    }),
    button("−", "zoom out", () => setZoom(zoom - 1), { "aria-label": "zoom out" }),
    button("+", "zoom in", () => setZoom(zoom + 1), { "aria-label": "zoom in" }));

  // ---- what comes in ----
  function take(x) {
    if (x.whole) {
      const other = !v || v.request !== x.request;
      v = x;
      tokens = [];
      image.clear();
      if (other) closeCell();
      if (x.extent) atlas.whole(x);
      dropWhatIf();
    } else {
      if (x.extent && x.bins.length) atlas.part(x);
      v = { ...v, ...x };
    }
    tokens.length = x.tokens_from;
    tokens.push(...x.tokens);
    const hadRow = !cell || image.rows.has(cell.row);
    let at = 0;
    for (const position of x.positions || []) {
      image.add(position, x.full.slice(at, at + position + 1));
      at += position + 1;
    }
    if (x.request !== null && (!causal || !scaled)) askWhatIf();
    if (x.whole || (!hadRow && image.rows.has(cell.row))) refreshCell();
    listRequests();
    changed();
  }

  let listed = "";
  function listRequests() {
    const wanted = v.selected === null ? "" : `=${v.selected}`;
    const options = [["", "follow: who runs"], ...v.requests.map(([id, status]) => [`=${id}`, `request ${id} (${status})`])];
    if (wanted && !options.some(([value]) => value === wanted)) options.push([wanted, `request ${v.selected}`]);
    if (listed === (listed = JSON.stringify([options, wanted]))) return;
    requests.replaceChildren(...options.map(([value, text]) => element("option", { value, text })));
    requests.value = wanted;
  }

  // ---- what if ----
  function dropWhatIf() { what = null; imagined.clear(); }

  // One question at a time, and a pause after each: while tokens come, it changes with every one.
  let asking = false, askAgain = false;
  async function askWhatIf() {
    if (causal && scaled) { dropWhatIf(); return; }
    if (!v || !v.extent || asking) { askAgain = true; return; }
    asking = true;
    askAgain = false;
    const asked = { request: v.request, layer: v.layer, head: v.head, causal, scaled };
    try {
      const x = await ui.ask("attention_what_if", asked);
      const now = { request: v.request, layer: v.layer, head: v.head, causal, scaled };
      if (Object.keys(asked).every((key) => asked[key] === now[key])) {
        imagined.clear();
        [...x.positions].forEach((position, i) => {
          const from = i * x.context;
          imagined.add(position, x.weights.slice(from, causal ? from + position + 1 : from + x.context));
        });
        what = x;
      } else askAgain = true;
      ui.complain(null);
    } catch (error) { dropWhatIf(); ui.complain(error); }
    const again = setTimeout(() => { asking = false; if (askAgain) askWhatIf(); }, 400);
    ui.undo.push(() => clearTimeout(again));
    changed();
  }

  // ---- cells and heads ----
  const source = () => what ? imagined : image;
  const newest = () => Math.max(-1, ...source().rows.keys());
  const selectedRow = () => cell ? cell.row : newest();
  const largest = (row) => {
    const bytes = source().rows.get(row) || [];
    return bytes.reduce((best, byte, i) => byte > bytes[best] ? i : best, 0);
  };
  const whyMissing = (row) => row < v.num_cached
    ? "its keys came from the prefix cache, so it was never computed and has no query"
    : row >= v.kept_tokens ? `only the first ${v.kept_tokens} tokens are kept`
      : "it was computed before anybody looked, or is yet to come";
  const setZoom = (level) => { zoom = Math.max(0, Math.min(3, level)); changed(); };

  function setCell(row, column) {
    const size = Math.max(source().size, 1), within = (at) => Math.max(0, Math.min(at, size - 1));
    cell = { row: within(row), column: within(column) };
    ui.client.select({ token: cell.row });
    refreshCell();
    changed();
  }
  function openCell() {
    opened = true;
    if (cell) refreshCell(); else setCell(newest(), largest(newest()));
  }
  function closeCell() {
    cell = null;
    opened = false;
    arithmetic.message(CLICK);
  }
  function setHead(layer, head) {
    const within = (at, count) => Math.max(0, Math.min(at, count - 1));
    ui.client.select({ layer: within(layer, v.layers), head: within(head, v.heads) });
  }

  let refreshing = false, refreshAgain = false;
  async function refreshCell() {
    if (!opened || !cell || !v?.extent) return;
    if (refreshing) { refreshAgain = true; return; }
    refreshing = true;
    refreshAgain = false;
    try {
      if (!image.rows.has(cell.row)) throw new Error(`There is no row for ${cell.row}: ${whyMissing(cell.row)}.`);
      const asked = { request: v.request, layer: v.layer, head: v.head, ...cell, causal, scaled };
      const x = await ui.ask("attention_cell", asked);
      if (opened) arithmetic.show(x, tokens);
    } catch (error) { if (opened) arithmetic.message(error.message); }
    refreshing = false;
    if (refreshAgain) refreshCell();
  }

  ui.undo.push(ui.client.onSelection(() => {
    const { token, request } = ui.client.selection;
    const ours = v && (request === null || request === v.request);
    if (ours && Number.isInteger(token) && token >= 0 && token < image.size && cell?.row !== token) {
      cell = { row: token, column: largest(token) };
      refreshCell();
    } else if (token === null) cell = null;
    changed();
  }));

  // ---- drawing ----
  function changed() {
    version += 1;
    const there = Boolean(v && v.extent);
    note.hidden = there && !v.note;
    note.textContent = v?.note || (v?.request && !there ? waitingText() : EMPTY);
    layout.style.display = there ? "flex" : "none";
    said.hidden = !there;
    thumbs.invalidate();
    map.invalidate();
    Object.assign(ui.root.dataset, { request: v?.request ?? "", layer: v?.layer ?? "", head: v?.head ?? "",
      rows: image.rows.size, tokens: tokens.length, note: v?.note || "", cell: cell ? `${cell.row},${cell.column}` : "",
      thumbnails: there ? v.rows.reduce((n, [first, last]) => n + last - first + 1, 0) : 0,
      whatIf: what ? `${what.causal},${what.scaled},${imagined.rows.size}` : "" });
  }
  function waitingText() {
    return ["waiting", "running", "preempted"].includes(v.status)
      ? `Request ${v.request} is ${v.status}: its rows appear as its tokens are computed.`
      : `Request ${v.request} has ended, and nothing of its attention was kept. Run it again while this panel can be seen.`;
  }
  const scene = () => ({ v, tokens, table, root, cell, hover, zoom, what, source: source(), scale: ui.scale,
    row: selectedRow() });

  function drawThumbs(ctx, width, height, t) {
    if (!v || !v.extent) return;
    box = thumbnailBox(v, ui.scale, layout.clientWidth, ui.height * 1.25);
    left.style.width = `${box.width}px`;
    if (height !== box.height) { thumbs.setHeight(box.height); return; }
    atlas.paint(table, v.rows, v.extent);
    thumbs.node.dataset.drawn = drawThumbnails(ctx, box, scene(), atlas, t);
  }

  function drawMap(ctx, width, height, t) {
    drawText();
    if (!v || !v.extent || !source().size) return;
    const wanted = Math.round(Math.min(ui.height, width + 12 * ui.scale));  // a square has no use for more
    if (height !== wanted) { map.setHeight(wanted); return; }
    const now = scene(), ratio = window.devicePixelRatio || 1;
    view = mapView(now, width, height);
    const isPart = view.columns < view.size || view.rows < view.size;
    now.source.paint(isPart ? 4096 : Math.max(64, Math.floor(view.each * view.size * ratio)), table);
    drawAttentionMap(ctx, view, width, height, now, t);
    Object.assign(map.node.dataset, { pool: now.source.pool, first: `${view.row},${view.column}`, cellPx: view.each });
  }

  // The selected row as a sentence: what this token looks at, in the words themselves.
  let textOf = -1;
  function drawText() {
    if (textOf === version || !v) return;
    textOf = version;
    const row = selectedRow(), bytes = source().rows.get(row);
    if (!bytes) {
      said.replaceChildren(row < 0 ? "" : element("span", { class: "tv-muted",
        text: `No row for token ${row}: ${whyMissing(row)}.` }));
      return;
    }
    said.replaceChildren(element("b", { text: `“${visibleText(tokens[row] ?? "")}” looks at  ` }),
      ...rowChips(bytes, tokens, table, cell?.column));
    said.dataset.row = row;
    const best = largest(row);
    ui.say(`Layer ${v.layer}, head ${v.head}: token ${row}, ${tokens[row]}, looks most at ${tokens[best]}, `
      + `weight ${(bytes[best] / 255).toFixed(2)}`);
  }

  // ---- the mouse and the keyboard ----
  function place(event) {
    if (!view) return null;
    const column = view.column + Math.floor((event.offsetX - view.gutter) / view.each);
    const row = view.row + Math.floor((event.offsetY - view.top) / view.each);
    const inside = row >= view.row && row < view.row + view.rows && column >= view.column
      && column < view.column + view.columns;
    return inside ? { row, column } : null;
  }
  map.node.addEventListener("mousemove", (event) => {
    const at = place(event);
    if (at?.row !== hover?.row || at?.column !== hover?.column) { hover = at; map.invalidate(); }
    if (!at) return tip.hide();
    const byte = source().rows.get(at.row)?.[at.column], name = (i) => `“${visibleText(tokens[i] ?? "")}” (${i})`;
    tip.show(event, !source().rows.has(at.row) ? `${name(at.row)}: no row; ${whyMissing(at.row)}`
      : byte === undefined ? `${name(at.row)} may not look at ${name(at.column)}: it comes later`
        : `${name(at.row)} looks at ${name(at.column)}: about ${(byte / 255).toFixed(3)}${what ? ", WHAT IF" : ""}`);
  });
  map.node.addEventListener("mouseleave", () => { hover = null; tip.hide(); map.invalidate(); });
  map.node.addEventListener("click", (event) => {
    const at = place(event);
    if (at) { opened = true; setCell(at.row, at.column); }
  });
  const onKeys = (node, handle) => node.addEventListener("keydown", (event) => {
    if (!v?.extent || !handle(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  });
  onKeys(map.node, (key) => {
    const move = MOVES[key];
    if (move && cell) setCell(cell.row + move[0], cell.column + move[1]);
    else if (move) setCell(newest(), largest(newest()));
    else if (key === "Enter") openCell();
    else if (key === "Escape") { closeCell(); ui.client.select({ token: null }); changed(); }
    else if (key === "+" || key === "=") setZoom(zoom + 1);
    else if (key === "-") setZoom(zoom - 1);
    else return false;
    return true;
  });
  onKeys(thumbs.node, (key) => {
    // From the selection, which is ahead of what has arrived when keys come fast.
    const { layer, head } = ui.client.selection, move = MOVES[key];
    if (move) setHead(Math.min(layer, v.layers - 1) + move[0], Math.min(head, v.heads - 1) + move[1]);
    return Boolean(move);
  });
  function thumbAt(event) {
    if (!box || !v?.extent) return null;
    const head = Math.floor((event.offsetX - box.gutter) / box.step);
    const layer = Math.floor((event.offsetY - box.top) / box.step);
    return head >= 0 && head < v.heads && layer >= 0 && layer < v.layers ? { layer, head } : null;
  }
  thumbs.node.addEventListener("click", (event) => { const at = thumbAt(event); if (at) setHead(at.layer, at.head); });
  thumbs.node.addEventListener("mousemove", (event) => {
    const at = thumbAt(event);
    if (!at) return tip.hide();
    const group = v.heads / v.kv_heads, kv = Math.floor(at.head / group);
    const shared = `: heads ${kv * group} to ${(kv + 1) * group - 1} read the same keys and values, KV head ${kv}`;
    tip.show(event, `layer ${at.layer}, head ${at.head}${group > 1 ? shared : ""}`);
  });
  thumbs.node.addEventListener("mouseleave", () => tip.hide());

  // What is really in the picture, for tests: the bytes of a row, and the colours of its pixels.
  ui.root.attentionRow = (position) => [...(source().rows.get(position) || [])];
  ui.root.attentionPixels = (position) => {
    source().paint(4096, table);
    const data = source().ctx.getImageData(0, position, source().size, 1).data;
    return Array.from({ length: position + 1 }, (_, i) => [data[4 * i], data[4 * i + 1], data[4 * i + 2]]);
  };
  ui.subscribe("attention", {}, { snapshot: take, delta: take });
  changed();
  return ui.dispose;
}

export default { render };
