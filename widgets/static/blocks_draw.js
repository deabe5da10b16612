// How blocks are drawn: a cell, the pool as a grid, a request's block table above it, what each request uses, the legend.

const MANY_OWNERS = 4;       // stripes in a cell; the number tells of more
const TABLE_ROWS = 2;        // of boxes of the block table
const LINES = 32;            // from the table into the pool; more would hide it

// ---- cells ----

// A style for each owner, made once a drawing: pool.nameOf(key) decides the colour.
function ownerLooks(ctx, pool) {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) {
      const look = requestLook(pool.nameOf(key) ?? "");
      known.set(key, { ...look, fill: hatched(ctx, look.colour, look.hatch), pale: `${look.colour}40` });
    }
    return known.get(key);
  };
}

// One cell. cell: {ref, filled (0 to 1), cached, owners}. Returns what it was drawn as.
function paintCell(ctx, x, y, size, cell, lookOf, t) {
  const gap = size >= 40 ? 2 : size >= 10 ? 1 : size >= 5 ? 0.5 : 0;
  const w = size - 2 * gap;
  x += gap; y += gap;
  ctx.lineJoin = "miter";  // whatever was painted before: a cell looks the same in any order
  if (!cell.ref) {
    ctx.fillStyle = cell.cached ? findableStyle(ctx, t) : t.raised;
    ctx.fillRect(x, y, w, w);
    if (size >= 10) {
      ctx.strokeStyle = t.muted; ctx.lineWidth = 1;
      ctx.setLineDash(cell.cached ? [3, 2] : []); ctx.strokeRect(x + 0.5, y + 0.5, w - 1, w - 1); ctx.setLineDash([]);
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
    ctx.strokeStyle = edgeOn(lookOf(owners[0]).colour, t); ctx.lineWidth = 1;
    ctx.strokeRect(x + 0.5, y + 0.5, w - 1, w - 1);
  }
  if (cell.cached && size >= 16) {  // a folded corner: the prefix cache can find it
    ctx.fillStyle = t.text;
    ctx.beginPath(); ctx.moveTo(x + w, y); ctx.lineTo(x + w - w / 5, y); ctx.lineTo(x + w, y + w / 5); ctx.fill();
  }
  return cell.ref > 1 ? "shared" : "held";
}

// Free and still findable: thin lines on the panel's own colour.
let findableTile = null;
function findableStyle(ctx, t) {
  if (!findableTile || findableTile.t !== t) {
    const tile = element("canvas", { width: 6, height: 6 }), c = tile.getContext("2d");
    c.fillStyle = t.panel; c.fillRect(0, 0, 6, 6);
    c.strokeStyle = t.muted; c.lineWidth = 1.2;
    c.beginPath(); c.moveTo(-1, 1); c.lineTo(1, -1); c.moveTo(0, 6); c.lineTo(6, 0); c.moveTo(5, 7); c.lineTo(7, 5); c.stroke();
    findableTile = { t, pattern: ctx.createPattern(tile, "repeat") };
  }
  return findableTile.pattern;
}

// Text that reads on any colour.
function outlined(ctx, text, x, y, t) {
  ctx.lineWidth = 3; ctx.lineJoin = "round"; ctx.strokeStyle = t.panel; ctx.strokeText(text, x, y);
  ctx.fillStyle = t.text; ctx.fillText(text, x, y);
}

// ---- the pool ----

// Where the cells lie: as large as they can be. top: what the block table takes.
function gridOf(num, width, height, scale) {
  const top = Math.round(scale * (TABLE_ROWS * 24 + 26)), room = Math.max(1, height - top);
  if (!num) return { cell: 0, columns: 1, top, boxes: [] };
  let columns = Math.max(1, Math.ceil(Math.sqrt(num * width / room)));
  while (Math.ceil(num / columns) * Math.floor(width / columns) > room && Math.floor(width / columns) > 2) columns++;
  const cell = Math.max(2, Math.min(Math.floor(width / columns), Math.round(64 * scale)));
  return { cell, columns: Math.min(num, Math.max(columns, Math.floor(width / cell))), top, boxes: [] };
}
const cornerOf = (grid, id) => [(id % grid.columns) * grid.cell, grid.top + Math.floor(id / grid.columns) * grid.cell];

function blockUnder(grid, num, x, y) {
  const box = grid.boxes.find((b) => x >= b.x && x < b.x + b.w && y >= b.y && y < b.y + b.h);
  if (box) return box.block;
  if (!grid.cell || y < grid.top || x < 0 || x >= grid.columns * grid.cell) return null;
  const id = Math.floor((y - grid.top) / grid.cell) * grid.columns + Math.floor(x / grid.cell);
  return id < num ? id : null;
}

function ring(ctx, grid, num, id, colour, width) {
  if (id === null || id === undefined || id >= num || !grid.cell) return;
  const [x, y] = cornerOf(grid, id);
  ctx.strokeStyle = colour; ctx.lineWidth = width;
  ctx.strokeRect(x + 1, y + 1, Math.max(2, grid.cell - 2), Math.max(2, grid.cell - 2));
}

// The pool as a picture of its own, which is kept: of thousands of cells a step changes a handful, and only these are
// painted again.
class PoolPicture {
  constructor() {
    this.node = document.createElement("canvas");
    this.ctx = this.node.getContext("2d");
    this.like = "";      // what all cells depend on
    this.theme = null;
    this.cells = [];     // of each: what it shows, as text
    this.kinds = [];
  }

  // Bring it up to date and draw it; returns how many cells are drawn as what, the owners of the shared ones, and how
  // many had to be painted.
  draw(ctx, pool, grid, t, scale, lookOf) {
    const drawn = { held: 0, shared: 0, cached: 0, free: 0 }, counts = {}, ratio = window.devicePixelRatio || 1;
    const width = grid.columns * grid.cell, height = Math.ceil(pool.num / grid.columns) * grid.cell;
    const like = `${pool.num} ${pool.size} ${grid.columns} ${grid.cell} ${scale} ${ratio}`;
    if (like !== this.like || t !== this.theme) {
      this.like = like;
      this.theme = t;
      this.cells = new Array(pool.num);
      this.kinds = new Array(pool.num);
      this.node.width = Math.max(1, Math.ceil(width * ratio));
      this.node.height = Math.max(1, Math.ceil(height * ratio));
      this.ctx.textBaseline = "middle";
    }
    this.ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    let painted = 0;
    for (let i = 0; i < pool.num; i++) {
      const owners = pool.owners[i], shows = `${pool.ref[i]} ${pool.filled[i]} ${pool.cached[i]} ${owners ? owners.join() : ""}`;
      if (shows !== this.cells[i]) {
        this.cells[i] = shows;
        this.kinds[i] = this.paint(pool, grid, i, t, scale, lookOf);
        painted++;
      }
      drawn[this.kinds[i]]++;
      if (this.kinds[i] === "shared") counts[i] = pool.ref[i];
    }
    if (pool.num) ctx.drawImage(this.node, 0, 0, width * ratio, height * ratio, 0, grid.top, width, height);
    return { drawn, counts, painted };
  }

  paint(pool, grid, i, t, scale, lookOf) {
    const { cell } = grid, x = (i % grid.columns) * cell, y = Math.floor(i / grid.columns) * cell;
    this.ctx.clearRect(x, y, cell, cell);
    const kind = paintCell(this.ctx, x, y, cell, { ref: pool.ref[i], filled: pool.filled[i] / pool.size, cached: pool.cached[i], owners: pool.owners[i] }, lookOf, t);
    if (cell >= 13) drawNumber(this.ctx, x, y, cell, i, pool.ref[i], pool.cached[i], t, scale);
    return kind;
  }
}

// How many own a shared block; from 30 pixels on, the block's own number too.
function drawNumber(ctx, x, y, cell, i, ref, cached, t, scale) {
  const large = cell >= 30;
  if (ref > 1) {
    ctx.font = `bold ${Math.min(0.5 * cell, 22 * scale)}px ${t.font}`;
    ctx.textAlign = "center";
    outlined(ctx, large ? `×${ref}` : String(ref), x + cell / 2, y + cell / 2 + (large ? 0.1 * cell : 0), t);
  }
  if (!large) return;
  ctx.textAlign = "left";
  ctx.font = `${Math.min(0.3 * cell, 14 * scale)}px ${t.font}`;
  if (ref || cached) outlined(ctx, String(i), x + 4, y + 0.24 * cell, t);
  else { ctx.fillStyle = t.muted; ctx.fillText(String(i), x + 4, y + 0.24 * cell); }
}

// ---- the block table of a request: logical block -> physical block. Its boxes go into grid.boxes. ----
function drawTable(ctx, pool, grid, chosen, hovered, width, t, scale, lookOf) {
  const { request, block: marked } = chosen, row = pool.rowOf(request);
  ctx.textAlign = "left";
  ctx.font = `${13 * scale}px ${t.font}`;
  ctx.fillStyle = t.muted;
  if (!row || !row.table.length) {
    ctx.fillText(request === null ? "Select a request to see its block table." : !row ? `Request ${shortId(request)} has ended: its blocks went back.`
      : `Request ${shortId(request)} is ${row.status}: it holds no block.`, 0, 10 * scale, width);
    return;
  }
  const digits = String(Math.max(0, pool.num - 1)).length, h = 20 * scale;
  const w = (10 + 9 * digits) * scale, perRow = Math.max(1, Math.floor(width / w)), room = perRow * TABLE_ROWS;
  // All of it if there is room; else the end, where it grows, or the stretch around the selected block.
  const at = row.table.indexOf(marked), n = row.table.length;
  const first = n <= room ? 0 : Math.max(0, Math.min(n - room, at < 0 ? n : at - (room >> 1)));
  ctx.fillText(`Block table of request ${shortId(request)}: its blocks in order${first ? `, from number ${first} on,` : ""} → where they lie`, 0, 10 * scale, width);
  const look = lookOf(row.key);
  ctx.textAlign = "center";
  ctx.font = `bold ${13 * scale}px ${t.font}`;
  row.table.slice(first, first + room).forEach((block, i) => {
    const box = { x: (i % perRow) * w, y: (24 + 24 * Math.floor(i / perRow)) * scale, w: w - 3 * scale, h, block };
    grid.boxes.push(box);
    ctx.fillStyle = look.fill;
    ctx.fillRect(box.x, box.y, box.w, h);
    ctx.strokeStyle = block === marked ? t.text : edgeOn(look.colour, t);
    ctx.lineWidth = block === marked ? 3 : 1;
    ctx.strokeRect(box.x + 0.5, box.y + 0.5, box.w - 1, h - 1);
    outlined(ctx, String(block), box.x + box.w / 2, box.y + h / 2, t);
  });
  for (const block of row.table) ring(ctx, grid, pool.num, block, t.text, grid.cell >= 10 ? 2 : 1);
  const isStrong = (box) => box.block === marked || box.block === hovered;
  for (const box of grid.boxes.length <= LINES ? grid.boxes : grid.boxes.filter(isStrong)) {
    const [x, y] = cornerOf(grid, box.block);
    ctx.strokeStyle = t.text;
    ctx.globalAlpha = isStrong(box) ? 0.95 : 0.4;
    ctx.lineWidth = isStrong(box) ? 2.5 : 1.2;
    const x0 = box.x + box.w / 2, y0 = box.y + h, x1 = x + grid.cell / 2, y1 = y + 2, bend = y0 + (y1 - y0) * 0.5;
    ctx.beginPath(); ctx.moveTo(x0, y0); ctx.bezierCurveTo(x0, bend, x1, bend, x1, y1); ctx.stroke();
  }
  ctx.globalAlpha = 1;
}

// ---- what each request uses, to the scale of what one piece of the greatest length would be ----

const useTop = (scale) => 24 * scale, useRow = (scale) => 26 * scale;

function emptyText(pool) {
  if (!pool.num) return "The pool appears as soon as the engine has told of it.";
  if (pool.kind === "replay") {
    return "No request holds a block. Drag the scale of the timeline to look back, or press Reset for the run to begin anew.";
  }
  return "No request holds a block. Press Burst in the control bar, or run live.chat([...]) in a cell, and the blocks fill.";
}

// Returns the rows that were drawn, from the top.
function drawUse(ctx, pool, selected, width, height, t, scale) {
  const rows = pool.ordered, h = useRow(scale), top = useTop(scale), lookOf = ownerLooks(ctx, pool);
  ctx.textAlign = "left";
  ctx.font = `${13 * scale}px ${t.font}`;
  ctx.fillStyle = t.muted;
  if (!rows.length) {
    wrapText(ctx, emptyText(pool), 0, 14 * scale, width, 18 * scale);
    return [];
  }
  ctx.fillText(`Each request: filled, wasted, and of ${asCount(pool.most)} in one piece`, 0, 10 * scale, width);
  const tooMany = rows.length * h > height - top;
  const room = Math.max(1, Math.floor((height - top) / h) - (tooMany ? 1 : 0));
  const at = rows.findIndex((row) => row.id === selected);
  const first = Math.max(0, Math.min(rows.length - room, at < 0 ? 0 : at - room + 1));
  const shown = rows.slice(first, first + room), x0 = 76 * scale, w = Math.max(20, width - x0 - 2), per = w / Math.max(1, pool.most);
  shown.forEach((row, i) => {
    const y = top + i * h, look = lookOf(row.key), bar = h - 9 * scale, slots = row.table.length * pool.size;
    if (row.id === selected) { ctx.fillStyle = t.raised; ctx.fillRect(0, y - 2 * scale, width, h - 2 * scale); }
    ctx.fillStyle = look.fill; ctx.fillRect(2, y, 12 * scale, bar);
    ctx.fillStyle = t.text; ctx.fillText(cutToWidth(ctx, row.id, x0 - 22 * scale), 18 * scale, y + bar / 2);
    ctx.strokeStyle = t.muted; ctx.lineWidth = 1;
    ctx.setLineDash([4, 3]); ctx.strokeRect(x0 + 0.5, y + 0.5, w - 1, bar - 1); ctx.setLineDash([]);
    ctx.fillStyle = look.pale; ctx.fillRect(x0, y, Math.min(w, slots * per), bar);
    ctx.fillStyle = look.fill; ctx.fillRect(x0, y, Math.min(w, row.computed * per), bar);
    if (slots) { ctx.strokeStyle = edgeOn(look.colour, t); ctx.strokeRect(x0 + 0.5, y + 0.5, Math.max(0, Math.min(w, slots * per) - 1), bar - 1); }
    ctx.textAlign = "right";
    outlined(ctx, row.table.length ? `${row.computed} in ${row.table.length} × ${pool.size}, ${slots - row.computed} wasted` : row.status, width - 6, y + bar / 2, t);
    ctx.textAlign = "left";
  });
  ctx.fillStyle = t.muted;
  if (rows.length > shown.length) ctx.fillText(`and ${asCount(rows.length - shown.length)} more`, x0, top + shown.length * h + 8 * scale);
  return shown;
}

function wrapText(ctx, text, x, y, width, line) {
  let now = "";
  for (const word of text.split(" ")) {
    if (now && ctx.measureText(`${now} ${word}`).width > width) { ctx.fillText(now, x, y); y += line; now = word; } else now = now ? `${now} ${word}` : word;
  }
  ctx.fillText(now, x, y);
}

// ---- the legend, painted as the cells are ----

const LEGEND = [["held, full", { ref: 1, filled: 1, owners: ["0"] }],
  ["held, partly filled: the pale slots are wasted", { ref: 1, filled: 0.4, owners: ["0"] }],
  ["shared: stripes of its owners, and how many", { ref: 2, filled: 1, owners: ["0", "1"] }],
  ["corner: findable by its prefix", { ref: 1, filled: 1, cached: 1, owners: ["2"] }],
  ["free, still findable", { ref: 0, cached: 1 }], ["free", { ref: 0 }]];

function legendItems(t, scale) {
  const size = 20 * scale, ratio = window.devicePixelRatio || 1;
  return LEGEND.map(([text, cell]) => {
    const node = element("canvas", { width: Math.round(size * ratio), height: Math.round(size * ratio), style: { width: `${size}px`, height: `${size}px` } });
    const ctx = node.getContext("2d");
    ctx.scale(ratio, ratio);
    paintCell(ctx, 0, 0, size, cell, (id) => ({ ...requestLook(id), fill: requestLook(id).colour, pale: `${requestLook(id).colour}40` }), t);
    return element("span", { class: "tv-legend-item" }, node, text);
  });
}
