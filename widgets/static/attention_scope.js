// AttentionScope: thumbnails of all heads at the left, the head in focus in the middle, the arithmetic of a cell beside it.

const EMPTY = "Nothing to show yet. Give the engine a prompt: every head's attention appears here, row by row, as its tokens are computed.";

async function render({ model, el }) {
  const ui = await panel(model, el, "Attention", "Each row is a token that looks back at the columns before it. Click a head, then a cell for its arithmetic. "
    + "Keys: arrows move, Enter opens the arithmetic, + and − zoom, Esc lets go.");
  const tip = tooltip(ui), atlas = new Atlas(), image = new RowImage(), unmasked = new RowImage();
  let v = null, tokens = [], cell = null, hover = null, zoom = 0, root = true, table = weightColours(true), what = null, version = 0;
  let causal = true, scaled = true, opened = false, view = null, thumbBox = null;

  // ---- the frame ----
  const em = (n) => `calc(${n}px * var(--tv-scale, 1))`;
  const layout = element("div", { style: { display: "flex", flexWrap: "wrap", gap: em(12), alignItems: "flex-start" } });
  const left = element("div", { style: { flex: "0 0 auto", minWidth: "0", maxWidth: "100%" } });
  const middle = element("div", { style: { flex: `6 1 ${em(300)}`, minWidth: `min(100%, ${em(300)})` } });
  const right = element("div", { style: { flex: `4 1 ${em(300)}`, minWidth: `min(100%, ${em(280)})` } });
  const note = element("div", { class: "tv-muted", style: { padding: ".6em 0", fontSize: "1.1em" }, text: EMPTY });
  const said = element("div", { class: "tv-row-text", style: { lineHeight: "1.75", maxHeight: "9em", overflowY: "auto", marginTop: "4px" }, tabindex: "0", "aria-label": "the selected row as text" });
  layout.append(left, middle, right);
  ui.body.append(note, layout, said);
  const thumbs = canvas(ui, { parent: left, label: "all heads: arrows choose one", draw: drawThumbs });
  const map = canvas(ui, { parent: middle, label: "attention of the head in focus: rows look at columns", draw: drawMap });
  const arithmetic = arithmeticBox(ui, right);
  arithmetic.message("Click a cell: its arithmetic appears here, from q · k to the weight.");

  const requests = element("select", { class: "tv-select", title: "whose attention", style: { maxWidth: "14em" }, onchange: () => {
    ui.client.select({ request: requests.value === "" ? null : requests.value.slice(1), token: null });
    cell = null;
  } });
  const toggle = (text, title, get, set) => {
    const node = button(text, title, () => { set(!get()); node.setAttribute("aria-pressed", String(get())); changed(); }, { "aria-pressed": String(get()) });
    return node;
  };
  const rootButton = toggle("√ colours", "colours by the square root of the weight, so that small weights show", () => root, (on) => { root = on; table = weightColours(root); });
  const maskButton = toggle("causal mask", "off: what if every token could look at those after it?", () => causal, (on) => { causal = on; askWhatIf(); refreshCell(); });
  const scaleButton = toggle("÷ √d", "off: what if scores were not scaled?", () => scaled, (on) => { scaled = on; askWhatIf(); refreshCell(); });
  const zoomOut = button("−", "zoom out", () => setZoom(zoom - 1), { "aria-label": "zoom out" }), zoomIn = button("+", "zoom in", () => setZoom(zoom + 1), { "aria-label": "zoom in" });
  ui.tools.append(requests, rootButton, maskButton, scaleButton, zoomOut, zoomIn);

  // ---- what comes in ----
  function take(x) {
    if (x.whole) {
      const other = !v || v.request !== x.request;
      v = x;
      tokens = [];
      image.clear();
      if (other) { cell = null; opened = false; arithmetic.message("Click a cell: its arithmetic appears here, from q · k to the weight."); }
      if (x.extent) atlas.whole(x);
      dropWhatIf();
    } else {
      if (x.extent && x.bins.length) atlas.part(x);
      v = { ...v, ...x };
    }
    tokens.length = x.tokens_from;
    tokens.push(...x.tokens);
    let at = 0;
    for (const position of x.positions || []) { image.add(position, x.full.slice(at, at + position + 1)); at += position + 1; }
    if (x.request !== null && (!causal || !scaled)) askWhatIf();
    if (opened && cell && x.whole) refreshCell();
    list();
    changed();
  }

  function list() {
    const wanted = v.selected === null ? "" : `=${v.selected}`;
    const options = [["", "follow: who runs"], ...v.requests.map(([id, status]) => [`=${id}`, `request ${id} (${status})`])];
    if (wanted && !options.some(([value]) => value === wanted)) options.push([wanted, `request ${v.selected}`]);
    const text = JSON.stringify([options, wanted]);
    if (text === list.text) return;
    list.text = text;
    requests.replaceChildren(...options.map(([value, label]) => element("option", { value, text: label })));
    requests.value = wanted;
  }

  // ---- what if ----
  function dropWhatIf() { what = null; unmasked.clear(); }
  async function askWhatIf() {
    if (causal && scaled) { dropWhatIf(); return changed(); }
    if (!v || !v.extent || askWhatIf.busy) { askWhatIf.again = true; return; }
    askWhatIf.busy = true;
    askWhatIf.again = false;
    try {
      const asked = { request: v.request, layer: v.layer, head: v.head, causal, scaled };
      const x = await ui.ask("attention_what_if", asked);
      if (asked.request === v.request && x.layer === v.layer && x.head === v.head && x.causal === causal && x.scaled === scaled) {
        unmasked.clear();
        [...x.positions].forEach((position, i) => unmasked.add(position, x.weights.slice(i * x.context, causal ? i * x.context + position + 1 : (i + 1) * x.context)));
        what = x;
      } else askWhatIf.again = true;
      ui.complain(null);
    } catch (error) { dropWhatIf(); ui.complain(error); }
    setTimeout(() => { askWhatIf.busy = false; if (askWhatIf.again) askWhatIf(); }, 400);  // it may well change with every token
    changed();
  }

  // ---- cells and heads ----
  const shown = () => what ? unmasked : image;
  const byteAt = (row, column) => shown().rows.get(row)?.[column];
  const newest = () => Math.max(-1, ...shown().rows.keys());
  const selectedRow = () => cell ? cell.row : newest();
  function largest(row, from = 0) {
    const bytes = shown().rows.get(row) || [];
    let best = Math.min(from, Math.max(0, bytes.length - 1));
    for (let i = 0; i < bytes.length; i++) if (bytes[i] > bytes[best]) best = i;
    return best;
  }
  function setCell(row, column) {
    const size = Math.max(shown().size, 1);
    cell = { row: Math.max(0, Math.min(row, size - 1)), column: Math.max(0, Math.min(column, size - 1)) };
    ui.client.select({ token: cell.row });
    if (opened) refreshCell();
    changed();
  }
  function letGo() {
    cell = null;
    opened = false;
    arithmetic.message("Click a cell: its arithmetic appears here, from q · k to the weight.");
    ui.client.select({ token: null });
    changed();
  }
  async function refreshCell() {
    if (!opened || !cell || !v?.extent) return;
    if (refreshCell.busy) { refreshCell.again = true; return; }
    refreshCell.busy = true;
    refreshCell.again = false;
    const asked = { request: v.request, layer: v.layer, head: v.head, ...cell, causal, scaled };
    try {
      if (!image.rows.has(asked.row)) throw new Error(`There is no row for ${asked.row}: ${whyMissing(asked.row)}.`);
      const x = await ui.ask("attention_cell", asked);
      if (opened) arithmetic.show(x, tokens);
    } catch (error) { if (opened) arithmetic.message(error.message); }
    refreshCell.busy = false;
    if (refreshCell.again) refreshCell();
  }
  const open = () => { if (!cell) setCell(newest(), largest(newest())); opened = true; refreshCell(); };
  const setHead = (layer, head) => ui.client.select({ layer: Math.max(0, Math.min(layer, v.layers - 1)), head: Math.max(0, Math.min(head, v.heads - 1)) });
  const setZoom = (level) => { zoom = Math.max(0, Math.min(3, level)); changed(); };
  const whyMissing = (row) => row < v.num_cached ? "its keys came from the prefix cache, so it was never computed and has no query"
    : row >= v.kept_tokens ? `only the first ${v.kept_tokens} tokens are kept` : "it was computed before anybody looked, or is yet to come";

  ui.undo.push(ui.client.onSelection(() => {
    const { token, request } = ui.client.selection;
    if (v && (request === null || request === v.request) && Number.isInteger(token) && token >= 0 && (!cell || cell.row !== token)) {
      if (token < Math.max(image.size, 1)) { cell = { row: token, column: largest(token) }; refreshCell(); }
    } else if (token === null && cell) { cell = null; }
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
    Object.assign(ui.root.dataset, { request: v?.request ?? "", layer: v?.layer ?? "", head: v?.head ?? "", rows: image.rows.size, tokens: tokens.length,
      thumbnails: there ? v.rows.reduce((n, [a, b]) => n + b - a + 1, 0) : 0, whatIf: what ? `${what.causal},${what.scaled},${unmasked.rows.size}` : "", note: v?.note || "",
      cell: cell ? `${cell.row},${cell.column}` : "" });
  }
  function waitingText() {
    const over = v.status !== "waiting" && v.status !== "running" && v.status !== "preempted";
    return over ? `Request ${v.request} has ended, and nothing of its attention was kept. Run it again while this panel can be seen.`
      : `Request ${v.request} is ${v.status}: its rows appear as its tokens are computed.`;
  }

  const font = (t, size, weight = "") => `${weight} ${Math.round(size * ui.scale)}px ${t.font}`;

  function drawThumbs(ctx, width, height, t) {
    if (!v || !v.extent) return;
    const s = ui.scale, gutter = 26 * s, top = 34 * s, room = left.parentNode.clientWidth;
    const size = Math.max(9, Math.min(44 * Math.min(s, 1.35), (Math.min(room, 640 * s) - gutter) / v.heads - 4, (ui.height * 1.25 - top) / v.layers - 4)), step = size + 4;
    const wantWidth = Math.ceil(gutter + v.heads * step), wantHeight = Math.ceil(top + v.layers * step + 22 * s);
    if (left.style.width !== `${wantWidth}px`) { left.style.width = `${wantWidth}px`; }
    if (height !== wantHeight) { thumbs.setHeight(wantHeight); return; }
    atlas.paint(table, v.rows, v.extent);
    const last = v.rows.length ? v.rows[v.rows.length - 1][1] + 1 : 1;
    const used = Math.max(1, Math.ceil(last / (v.extent / v.side))), group = v.heads / v.kv_heads;
    thumbBox = { gutter, top, step };
    ctx.font = font(t, 11);
    ctx.textAlign = "center";
    for (let kv = 0; kv < v.kv_heads; kv++) {
      ctx.fillStyle = OKABE_ITO[kv % OKABE_ITO.length];
      ctx.fillRect(gutter + kv * group * step, 15 * s, group * step - 4, 3 * s);
      ctx.fillStyle = t.text;
      if (group * step > 34 * s) ctx.fillText(`KV ${kv}`, gutter + (kv + 0.5) * group * step - 2, 7 * s);
    }
    ctx.fillStyle = t.muted;
    for (let head = 0; head < v.heads; head++) if (step > 13 * s || head % 4 === 0) ctx.fillText(String(head), gutter + head * step + size / 2, 26 * s);
    ctx.textAlign = "right";
    for (let layer = 0; layer < v.layers; layer++) if (step > 12 * s || layer % 4 === 0) ctx.fillText(String(layer), gutter - 6 * s, top + layer * step + size / 2);
    ctx.textAlign = "left";
    ctx.imageSmoothingEnabled = false;
    let drawn = 0;
    for (let layer = 0; layer < v.layers; layer++) {
      for (let head = 0; head < v.heads; head++) {
        const x = gutter + head * step, y = top + layer * step, chosen = layer === v.layer && head === v.head;
        ctx.fillStyle = t.raised;
        ctx.fillRect(x, y, size, size);
        ctx.drawImage(atlas.node, head * v.side, layer * v.side, used, used, x, y, size, size);
        ctx.strokeStyle = OKABE_ITO[Math.floor(head / group) % OKABE_ITO.length];
        ctx.lineWidth = 1.5;
        ctx.strokeRect(x - 0.5, y - 0.5, size + 1, size + 1);
        if (chosen) { ctx.strokeStyle = t.text; ctx.lineWidth = 3; ctx.strokeRect(x - 2, y - 2, size + 4, size + 4); }
        drawn += 1;
      }
    }
    ctx.fillStyle = t.muted;
    ctx.fillText("layer ↓   head →", gutter, top + v.layers * step + 10 * s);
    thumbs.node.dataset.drawn = drawn;
  }

  // Which tokens are in sight, and how large a cell is.
  function window_(width, height, s) {
    const gutter = 92 * s, top = 74 * s, bottom = 30 * s, size = Math.max(1, shown().size);
    const room = { x: width - gutter - 4, y: height - top - bottom };
    const whole = Math.min(room.x / size, room.y / size, 64 * s);
    const each = Math.max(whole, [0, 13, 24, 42][zoom] * s);
    const columns = Math.min(size, Math.max(1, Math.floor(room.x / each))), rows = Math.min(size, Math.max(1, Math.floor(room.y / each)));
    const fit = (at, count) => Math.max(0, Math.min(size - count, at - Math.floor(count / 2)));
    const row = selectedRow(), column = cell ? cell.column : row;
    return { gutter, top, each, columns, rows, row: each > whole ? fit(row, rows) : 0, column: each > whole ? fit(column, columns) : 0, size };
  }

  function drawMap(ctx, width, height, t) {
    if (!v || !v.extent || !shown().size) { drawText(t); return; }
    const s = ui.scale, w = view = window_(width, height, s), source = shown(), ratio = window.devicePixelRatio || 1;
    const most = zoom && w.columns < w.size ? 4096 : Math.max(64, Math.floor(w.each * w.size * ratio));
    source.paint(most, table);
    const mapWidth = w.columns * w.each, mapHeight = w.rows * w.each;
    ctx.fillStyle = t.raised;
    ctx.fillRect(w.gutter, w.top, mapWidth, mapHeight);
    // Rows that nobody has: hatched, so that "not known" does not look like "looks at nothing".
    ctx.fillStyle = hatched(ctx, t.dark ? "#3a3a3a" : "#d8d8d8", 1);
    for (let row = w.row; row < w.row + w.rows; row++) if (!source.rows.has(row)) ctx.fillRect(w.gutter, w.top + (row - w.row) * w.each, Math.max(0, Math.min(w.columns, row + 1 - w.column)) * w.each, w.each);
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(source.node, w.column / source.pool, w.row / source.pool, w.columns / source.pool, w.rows / source.pool, w.gutter, w.top, mapWidth, mapHeight);
    drawLabels(ctx, w, t, s);
    if (w.each >= 38 * s) drawNumbers(ctx, w, s, t);
    for (const [place, colour, thick] of [[cell, t.dark ? "#ffffff" : "#000000", 2.5], [hover, "#D55E00", 2]]) {
      if (!place || place.row < w.row || place.row >= w.row + w.rows) continue;
      ctx.strokeStyle = colour;
      ctx.lineWidth = thick;
      ctx.strokeRect(w.gutter, w.top + (place.row - w.row) * w.each, mapWidth, w.each);
      if (place.column >= w.column && place.column < w.column + w.columns) {
        ctx.strokeRect(w.gutter + (place.column - w.column) * w.each, w.top, w.each, mapHeight);
        ctx.strokeStyle = "#D55E00";
        ctx.lineWidth = 3;
        ctx.strokeRect(w.gutter + (place.column - w.column) * w.each - 1, w.top + (place.row - w.row) * w.each - 1, w.each + 2, w.each + 2);
      }
    }
    weightLegend(ctx, w.gutter, height - 26 * s, Math.min(180 * s, width / 3), 8 * s, table, root, t, font(t, 10));
    ctx.fillStyle = t.text;
    ctx.font = font(t, 12, "600");
    ctx.textAlign = "right";
    ctx.fillText(`layer ${v.layer}, head ${v.head}`, width - 4, height - 14 * s);
    ctx.textAlign = "left";
    if (what) {
      const text = `WHAT IF: ${[causal ? "" : "no mask", scaled ? "" : "no scale"].filter(Boolean).join(", ")}`;
      ctx.font = font(t, 13, "600");
      ctx.fillStyle = "#7a4a00";
      ctx.fillRect(2, 2, ctx.measureText(text).width + 12 * s, 20 * s);
      ctx.fillStyle = "#ffffff";
      ctx.fillText(text, 2 + 6 * s, 2 + 10 * s);
    }
    Object.assign(map.node.dataset, { pool: source.pool, first: `${w.row},${w.column}`, cellPx: w.each });
    drawText(t);
  }

  function drawLabels(ctx, w, t, s) {
    const size = Math.max(10 * s, Math.min(13 * s, w.each * 0.95)), every = Math.ceil(size * 1.1 / w.each);
    const marked = new Set([cell?.row, hover?.row]), markedColumns = new Set([cell?.column, hover?.column]);
    ctx.textAlign = "right";
    const label = (position, strong, most) => {
      ctx.font = `${strong ? "bold" : ""} ${Math.round(size)}px ${t.mono}`;
      ctx.fillStyle = strong ? t.text : t.muted;
      return cutToWidth(ctx, visibleText(tokens[position] ?? ""), most);
    };
    const near = (set, position) => [...set].some((p) => p !== undefined && p !== position && Math.abs(p - position) * w.each < size);
    for (let row = w.row; row < w.row + w.rows; row++) {
      const strong = marked.has(row);
      if (!strong && (row % every || near(marked, row))) continue;
      const text = label(row, strong, w.gutter - 8 * s);
      ctx.fillText(text, w.gutter - 5 * s, w.top + (row - w.row + 0.5) * w.each);
    }
    ctx.textAlign = "left";
    for (let column = w.column; column < w.column + w.columns; column++) {
      const strong = markedColumns.has(column);
      if (!strong && (column % every || near(markedColumns, column))) continue;
      ctx.save();
      ctx.translate(w.gutter + (column - w.column + 0.5) * w.each, w.top - 5 * s);
      ctx.rotate(-Math.PI / 2);
      ctx.fillText(label(column, strong, w.top - 10 * s), 0, 0);
      ctx.restore();
    }
  }

  function drawNumbers(ctx, w, s, t) {
    ctx.font = `${Math.round(w.each * 0.3)}px ${t.mono}`;
    ctx.textAlign = "center";
    for (let row = w.row; row < w.row + w.rows; row++) {
      const bytes = shown().rows.get(row);
      for (let column = w.column; bytes && column < Math.min(bytes.length, w.column + w.columns); column++) {
        ctx.fillStyle = inkOnWeight(table, bytes[column]);
        ctx.fillText((bytes[column] / 255).toFixed(2).replace(/^0/, ""), w.gutter + (column - w.column + 0.5) * w.each, w.top + (row - w.row + 0.5) * w.each);
      }
    }
    ctx.textAlign = "left";
  }

  // The selected row as a sentence: what this token looks at, in the words themselves.
  function drawText() {
    if (drawText.version === version) return;
    drawText.version = version;
    const row = selectedRow(), bytes = shown().rows.get(row);
    if (!v || !bytes) { said.replaceChildren(v && row >= 0 ? element("span", { class: "tv-muted", text: `No row for token ${row}: ${whyMissing(row)}.` }) : ""); return; }
    const chips = [...bytes].map((byte, i) => element("span", { title: `${i}: about ${(byte / 255).toFixed(3)}`, text: visibleText(tokens[i] ?? ""), class: "tv-mono", style: {
      background: colourOf(table, byte), color: inkOnWeight(table, byte), padding: "1px 3px", borderRadius: "3px", marginRight: "1px", whiteSpace: "pre", display: "inline-block", lineHeight: "1.4",
      outline: cell && cell.column === i ? "2px solid #D55E00" : "" } }));
    said.replaceChildren(element("b", { text: `“${visibleText(tokens[row] ?? "")}” looks at  ` }), ...chips);
    said.dataset.row = row;
    const best = largest(row);
    ui.say(`Layer ${v.layer}, head ${v.head}: token ${row}, ${tokens[row]}, looks most at ${tokens[best]}, weight ${(bytes[best] / 255).toFixed(2)}`);
  }

  // ---- the mouse and the keyboard ----
  const place = (event) => {
    if (!view) return null;
    const column = view.column + Math.floor((event.offsetX - view.gutter) / view.each), row = view.row + Math.floor((event.offsetY - view.top) / view.each);
    return row >= view.row && row < view.row + view.rows && column >= view.column && column < view.column + view.columns ? { row, column } : null;
  };
  map.node.addEventListener("mousemove", (event) => {
    const at = place(event);
    if (at?.row !== hover?.row || at?.column !== hover?.column) { hover = at; map.invalidate(); }
    if (!at) return tip.hide();
    const byte = byteAt(at.row, at.column), name = (i) => `“${visibleText(tokens[i] ?? "")}” (${i})`;
    tip.show(event, !shown().rows.has(at.row) ? `${name(at.row)}: no row; ${whyMissing(at.row)}`
      : byte === undefined ? `${name(at.row)} may not look at ${name(at.column)}: it comes later` : `${name(at.row)} looks at ${name(at.column)}: about ${(byte / 255).toFixed(3)}${what ? ", WHAT IF" : ""}`);
  });
  map.node.addEventListener("mouseleave", () => { hover = null; tip.hide(); map.invalidate(); });
  map.node.addEventListener("click", (event) => { const at = place(event); if (at) { opened = true; setCell(at.row, at.column); } });
  map.node.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }, move = moves[event.key];
    if (move) { const from = cell || { row: newest(), column: largest(newest()) }; setCell(from.row + (cell ? move[0] : 0), from.column + (cell ? move[1] : 0)); }
    else if (event.key === "Enter") open();
    else if (event.key === "Escape") letGo();
    else if (event.key === "+" || event.key === "=") setZoom(zoom + 1);
    else if (event.key === "-") setZoom(zoom - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const thumbAt = (event) => {
    if (!thumbBox || !v?.extent) return null;
    const head = Math.floor((event.offsetX - thumbBox.gutter) / thumbBox.step), layer = Math.floor((event.offsetY - thumbBox.top) / thumbBox.step);
    return head >= 0 && head < v.heads && layer >= 0 && layer < v.layers ? { layer, head } : null;
  };
  thumbs.node.addEventListener("click", (event) => { const at = thumbAt(event); if (at) setHead(at.layer, at.head); });
  thumbs.node.addEventListener("mousemove", (event) => {
    const at = thumbAt(event);
    if (!at) return tip.hide();
    const group = v.heads / v.kv_heads, kv = Math.floor(at.head / group);
    tip.show(event, `layer ${at.layer}, head ${at.head}${group > 1 ? `: heads ${kv * group} to ${(kv + 1) * group - 1} read the same keys and values, KV head ${kv}` : ""}`);
  });
  thumbs.node.addEventListener("mouseleave", () => tip.hide());
  thumbs.node.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || !v?.extent) return;
    setHead(v.layer + move[0], v.head + move[1]);
    event.preventDefault();
    event.stopPropagation();
  });

  // What is really in the picture, for tests: the bytes of a row, and the colours of its pixels.
  ui.root.attentionRow = (position) => [...(shown().rows.get(position) || [])];
  ui.root.attentionPixels = (position) => {
    shown().paint(4096, table);
    const data = shown().ctx.getImageData(0, position, shown().size, 1).data;
    return Array.from({ length: position + 1 }, (_, i) => [data[4 * i], data[4 * i + 1], data[4 * i + 2]]);
  };
  ui.subscribe("attention", {}, { snapshot: take, delta: take });
  changed();
  return ui.dispose;
}

export default { render };
