// What AttentionScope draws: the grid of thumbnails, and the map of the head in focus with its tokens at both axes.
// A scene is what they need to know: {v, tokens, table, root, cell, hover, source, scale, zoom, row}.

const whatIfWords = (causal, scaled) =>
  `WHAT IF: ${[causal ? "" : "no mask", scaled ? "" : "no scale"].filter(Boolean).join(", ")}`;
const sized = (t, scale, size, weight = "") => `${weight} ${Math.round(size * scale)}px ${t.font}`;
const kvColour = (kv) => OKABE_ITO[kv % OKABE_ITO.length];

// Where the thumbnails stand in a room of so many CSS pixels.
function thumbnailBox(v, scale, room, tallest) {
  const gutter = 26 * scale, top = 34 * scale;
  const size = Math.max(9, Math.min(44 * Math.min(scale, 1.35), (Math.min(room, 640 * scale) - gutter) / v.heads - 4,
    (tallest - top) / v.layers - 4));
  const step = size + 4;
  return { gutter, top, size, step, width: Math.ceil(gutter + v.heads * step),
    height: Math.ceil(top + v.layers * step + 22 * scale) };
}

// All heads; returns how many. Heads that read the same keys and values have frames of one colour.
function drawThumbnails(ctx, box, scene, atlas, t) {
  const { v, scale: s } = scene, { gutter, top, size, step } = box;
  const last = v.rows.length ? v.rows[v.rows.length - 1][1] + 1 : 1, group = v.heads / v.kv_heads;
  const used = Math.max(1, Math.ceil(last / (v.extent / v.side)));
  ctx.font = sized(t, s, 11);
  ctx.textAlign = "center";
  for (let kv = 0; kv < v.kv_heads; kv++) {
    ctx.fillStyle = kvColour(kv);
    ctx.fillRect(gutter + kv * group * step, 15 * s, group * step - 4, 3 * s);
    ctx.fillStyle = t.text;
    if (group * step > 34 * s) ctx.fillText(`KV ${kv}`, gutter + (kv + 0.5) * group * step - 2, 7 * s);
  }
  ctx.fillStyle = t.muted;
  for (let head = 0; head < v.heads; head++) {
    if (step > 13 * s || head % 4 === 0) ctx.fillText(String(head), gutter + head * step + size / 2, 26 * s);
  }
  ctx.textAlign = "right";
  for (let layer = 0; layer < v.layers; layer++) {
    if (step > 12 * s || layer % 4 === 0) ctx.fillText(String(layer), gutter - 6 * s, top + layer * step + size / 2);
  }
  ctx.textAlign = "left";
  ctx.imageSmoothingEnabled = false;
  let drawn = 0;
  for (let layer = 0; layer < v.layers; layer++) {
    for (let head = 0; head < v.heads; head++) {
      const x = gutter + head * step, y = top + layer * step;
      ctx.fillStyle = t.raised;
      ctx.fillRect(x, y, size, size);
      ctx.drawImage(atlas.node, head * v.side, layer * v.side, used, used, x, y, size, size);
      ctx.strokeStyle = kvColour(Math.floor(head / group));
      ctx.lineWidth = 1.5;
      ctx.strokeRect(x - 0.5, y - 0.5, size + 1, size + 1);
      if (layer === v.layer && head === v.head) {
        ctx.strokeStyle = t.text;
        ctx.lineWidth = 3;
        ctx.strokeRect(x - 2, y - 2, size + 4, size + 4);
      }
      drawn += 1;
    }
  }
  ctx.fillStyle = t.muted;
  ctx.fillText("layer ↓   head →", gutter, top + v.layers * step + 10 * s);
  return drawn;
}

// Which tokens are in sight, and how large a cell is: the whole map, or a part around the selected cell.
function mapView(scene, width, height) {
  const { scale: s, zoom, row, cell } = scene, gutter = 92 * s, top = 74 * s, size = Math.max(1, scene.source.size);
  const room = { x: width - gutter - 4, y: height - top - 30 * s };
  const whole = Math.min(room.x / size, room.y / size, 64 * s), each = Math.max(whole, [0, 13, 24, 42][zoom] * s);
  const columns = Math.min(size, Math.max(1, Math.floor(room.x / each)));
  const rows = Math.min(size, Math.max(1, Math.floor(room.y / each)));
  const around = (at, count) => each > whole ? Math.max(0, Math.min(size - count, at - Math.floor(count / 2))) : 0;
  return { gutter, top, each, columns, rows, size, row: around(row, rows),
    column: around(cell ? cell.column : row, columns) };
}

function drawAttentionMap(ctx, w, width, height, scene, t) {
  const { v, scale: s, source, table, root } = scene, mapWidth = w.columns * w.each, mapHeight = w.rows * w.each;
  ctx.fillStyle = t.raised;
  ctx.fillRect(w.gutter, w.top, mapWidth, mapHeight);
  // Rows that nobody has: hatched, so that "not known" does not look like "looks at nothing".
  ctx.fillStyle = hatched(ctx, t.dark ? "#3a3a3a" : "#d8d8d8", 1);
  for (let row = w.row; row < w.row + w.rows; row++) {
    const seen = Math.max(0, Math.min(w.columns, row + 1 - w.column));
    if (!source.rows.has(row)) ctx.fillRect(w.gutter, w.top + (row - w.row) * w.each, seen * w.each, w.each);
  }
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(source.node, w.column / source.pool, w.row / source.pool, w.columns / source.pool,
    w.rows / source.pool, w.gutter, w.top, mapWidth, mapHeight);
  drawLabels(ctx, w, scene, t);
  if (w.each >= 38 * s) drawNumbers(ctx, w, scene, t);
  drawCross(ctx, w, scene.cell, t.dark ? "#ffffff" : "#000000", 2.5);
  drawCross(ctx, w, scene.hover, "#D55E00", 2);
  weightLegend(ctx, w.gutter, height - 26 * s, Math.min(180 * s, width / 3), 8 * s, table, root, t, sized(t, s, 10));
  ctx.fillStyle = t.text;
  ctx.font = sized(t, s, 12, "600");
  ctx.textAlign = "right";
  ctx.fillText(`layer ${v.layer}, head ${v.head}`, width - 4, height - 14 * s);
  ctx.textAlign = "left";
  if (scene.what) {
    const text = whatIfWords(scene.what.causal, scene.what.scaled);
    ctx.font = sized(t, s, 13, "600");
    ctx.fillStyle = "#7a4a00";
    ctx.fillRect(2, 2, ctx.measureText(text).width + 12 * s, 20 * s);
    ctx.fillStyle = "#ffffff";
    ctx.fillText(text, 2 + 6 * s, 2 + 10 * s);
  }
}

// A cell's row and column, and the cell itself.
function drawCross(ctx, w, place, colour, thick) {
  if (!place || place.row < w.row || place.row >= w.row + w.rows) return;
  const x = w.gutter + (place.column - w.column) * w.each, y = w.top + (place.row - w.row) * w.each;
  ctx.strokeStyle = colour;
  ctx.lineWidth = thick;
  ctx.strokeRect(w.gutter, y, w.columns * w.each, w.each);
  if (place.column < w.column || place.column >= w.column + w.columns) return;
  ctx.strokeRect(x, w.top, w.each, w.rows * w.each);
  ctx.strokeStyle = "#D55E00";
  ctx.lineWidth = 3;
  ctx.strokeRect(x - 1, y - 1, w.each + 2, w.each + 2);
}

// The tokens at both axes: all of them where there is room, else every so many; the selected and the hovered always.
function drawLabels(ctx, w, { tokens, cell, hover, scale: s }, t) {
  const size = Math.max(11 * s, Math.min(13 * s, w.each * 0.95)), every = Math.ceil(size * 1.1 / w.each);
  const along = (first, count, marked, most, put) => {
    for (let position = first; position < first + count; position++) {
      const strong = marked.includes(position);
      const crowded = position % every || marked.some((p) => p !== undefined && Math.abs(p - position) * w.each < size);
      if (!strong && crowded) continue;
      ctx.font = `${strong ? "bold" : ""} ${Math.round(size)}px ${t.mono}`;
      ctx.fillStyle = strong ? t.text : t.muted;
      put(cutToWidth(ctx, visibleText(tokens[position] ?? ""), most), (position - first + 0.5) * w.each);
    }
  };
  ctx.textAlign = "right";
  along(w.row, w.rows, [cell?.row, hover?.row], w.gutter - 8 * s,
    (text, at) => ctx.fillText(text, w.gutter - 5 * s, w.top + at));
  ctx.textAlign = "left";
  along(w.column, w.columns, [cell?.column, hover?.column], w.top - 10 * s, (text, at) => {
    ctx.save();
    ctx.translate(w.gutter + at, w.top - 5 * s);
    ctx.rotate(-Math.PI / 2);
    ctx.fillText(text, 0, 0);
    ctx.restore();
  });
}

function drawNumbers(ctx, w, { source, table }, t) {
  ctx.font = `${Math.round(w.each * 0.3)}px ${t.mono}`;
  ctx.textAlign = "center";
  for (let row = w.row; row < w.row + w.rows; row++) {
    const bytes = source.rows.get(row) || [];
    for (let column = w.column; column < Math.min(bytes.length, w.column + w.columns); column++) {
      ctx.fillStyle = inkOnWeight(table, bytes[column]);
      ctx.fillText((bytes[column] / 255).toFixed(2).replace(/^0/, ""), w.gutter + (column - w.column + 0.5) * w.each,
        w.top + (row - w.row + 0.5) * w.each);
    }
  }
  ctx.textAlign = "left";
}

// A row as a sentence: a chip for each token that it looks at, coloured by the weight. Of a long row only the chips that
// could be told from nothing, and the newest few.
const CHIPS = 240;
function rowChips(bytes, tokens, table, column) {
  let kept = [...bytes.keys()];
  if (kept.length > CHIPS) {
    kept = kept.filter((i) => bytes[i] || i === column || i >= bytes.length - 12);
    if (kept.length > CHIPS) kept = kept.sort((i, j) => bytes[j] - bytes[i]).slice(0, CHIPS).sort((i, j) => i - j);
  }
  return kept.flatMap((i, n) => [i > (n ? kept[n - 1] + 1 : 0) ? " … " : "", element("span", {
    class: "tv-mono", title: `${i}: about ${(bytes[i] / 255).toFixed(3)}`, text: visibleText(tokens[i] ?? ""), style: {
      background: colourOf(table, bytes[i]), color: inkOnWeight(table, bytes[i]), padding: "1px 3px", marginRight: "1px",
      borderRadius: "3px", whiteSpace: "pre", display: "inline-block", lineHeight: "1.4",
      outline: i === column ? "2px solid #D55E00" : "" } })]);
}
