// A tensor as a picture: each cell the element of largest magnitude of a small rectangle, blue below zero, orange above.

const NEGATIVE = [0, 114, 178], POSITIVE = [230, 120, 0];

// heatMap(ui, {load, pick, open}): load(rows, columns of the window or null, most rows, most columns) is a promise of an
// answer of tensor_heat; pick(row, column) when an element is chosen; open() on Enter.
function heatMap(ui, { load, pick, open }) {
  let shape = [0, 0], heat = null, picture = null, full = 1, window_ = null, at = [0, 0], asked = 0, colours = "";
  const view = canvas(ui, { height: 240, label: "Heat map of the tensor. Arrow keys move, plus and minus zoom, Enter opens the bits", draw });
  const node = view.node;
  node.classList.add("tf-heat");
  const legend = element("div", { class: "tv-muted tf-legend" });
  ui.body.append(legend);
  const area = { left: 0, top: 0, width: 1, height: 1 };

  async function reload() {
    const mine = ++asked, s = ui.scale;
    if (!shape[0] || !shape[1]) { heat = picture = null; legend.textContent = "This tensor has no elements."; view.invalidate(); return; }
    const [rows, columns] = window_ ? [[window_[0], window_[1]], [window_[2], window_[3]]] : [null, null];
    try {
      const answer = await load(rows, columns, Math.max(16, Math.floor(tallest() / 2)), Math.max(32, Math.floor((node.clientWidth || 600) / (2 * s))));
      if (mine !== asked) return;
      heat = answer;
      paint();
    } catch (error) {
      if (mine !== asked) return;
      heat = picture = null;
      legend.textContent = String(error.message || error);
      node.dataset.cells = 0;
    }
    view.invalidate();
  }
  const tallest = () => Math.max(24, Math.min(240, shape[0] === 1 ? 24 : 240));

  // The picture, one pixel a cell; full colour from the 99th percentile on, so that a few outliers do not hide the rest.
  function paint() {
    const [height, width] = heat.values.shape, t = theme(ui.root), ground = t.dark ? [20, 20, 20] : [255, 255, 255];
    const sizes = Float32Array.from(heat.values, Math.abs).filter((v) => v < Infinity).sort();
    full = sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1 : 1;
    picture = element("canvas", { width, height });
    const ctx = picture.getContext("2d"), image = ctx.createImageData(width, height);
    heat.values.forEach((value, i) => {
      const share = Math.min(1, Math.abs(value) / full), to = value < 0 ? NEGATIVE : POSITIVE;
      const colour = Number.isNaN(value) ? [204, 0, 204] : ground.map((g, k) => g + (to[k] - g) * share);
      image.data.set([...colour, 255], 4 * i);
    });
    ctx.putImageData(image, 0, 0);
    colours = String(t.dark);
    const [tall, wide] = heat.cell, [r0, r1, c0, c1] = heat.window;
    const cell = tall * wide === 1 ? "each cell one element" : `each cell the largest of ${tall} × ${wide} elements (with its sign)`;
    const stride = heat.stride > 1 ? `; only every ${heat.stride}th row was read` : "";
    legend.textContent = `rows ${r0} to ${r1 - 1}, columns ${c0} to ${c1 - 1}: ${cell}${stride}. Blue below 0, orange above; full colour from ±${full.toPrecision(3)}.`;
    Object.assign(node.dataset, { cells: width * height, rows: height, columns: width, window: heat.window.join(",") });
  }

  function draw(ctx, width, height, t) {
    const s = ui.scale, wanted = tallest() * s + 4 * s;
    if (Math.abs(height - wanted) > 0.5) { view.setHeight(wanted); return; }
    if (!picture) return;
    if (colours !== String(t.dark)) paint();
    Object.assign(area, { left: 2 * s, top: 2 * s, width: width - 4 * s, height: height - 4 * s });
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(picture, area.left, area.top, area.width, area.height);
    ctx.strokeStyle = t.line;
    ctx.lineWidth = 1;
    ctx.strokeRect(area.left - 0.5, area.top - 0.5, area.width + 1, area.height + 1);
    const [r0, r1, c0, c1] = heat.window, [row, column] = at;
    if (row < r0 || row >= r1 || column < c0 || column >= c1) return;
    const [tall, wide] = heat.cell, cw = area.width / picture.width, ch = area.height / picture.height;
    const x = area.left + Math.floor((column - c0) / wide) * cw, y = area.top + Math.floor((row - r0) / tall) * ch;
    ctx.strokeStyle = t.text;
    ctx.lineWidth = 1.5 * s;
    ctx.globalAlpha = 0.6;
    ctx.strokeRect(area.left, y - s, area.width, ch + 2 * s);
    ctx.globalAlpha = 1;
    ctx.lineWidth = 2.5 * s;
    ctx.strokeRect(x - 3 * s, y - 3 * s, cw + 6 * s, ch + 6 * s);
  }

  const cellAt = (event) => {
    if (!picture) return null;
    const j = Math.floor(((event.offsetX - area.left) / area.width) * picture.width), i = Math.floor(((event.offsetY - area.top) / area.height) * picture.height);
    if (i < 0 || j < 0 || i >= picture.height || j >= picture.width) return null;
    const k = i * picture.width + j;
    return { row: heat.row[k], column: heat.column[k], value: heat.values[k] };
  };
  function zoom(factor) {
    const [rows, columns] = shape, now = window_ || [0, rows, 0, columns];
    const span = (n, size) => Math.max(Math.min(8, size), Math.min(size, Math.round(n * factor)));
    const place = (center, length, size) => { const a = Math.min(Math.max(0, center - (length >> 1)), size - length); return [a, a + length]; };
    const next = [...place(at[0], span(now[1] - now[0], rows), rows), ...place(at[1], span(now[3] - now[2], columns), columns)];
    window_ = next[1] - next[0] === rows && next[3] - next[2] === columns ? null : next;
    reload();
  }
  const tip = tooltip(ui);
  node.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) pick(cell.row, cell.column); });
  node.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) tip.show(event, `[${cell.row}, ${cell.column}]  ${cell.value}`); else tip.hide();
  });
  node.addEventListener("pointerleave", () => tip.hide());
  node.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) pick(at[0] + step[0], at[1] + step[1]);
    else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === "Enter") open();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  ui.listen(ui.model, "change:scale", reload);
  return {
    node, zoomIn: () => zoom(0.5), zoomOut: () => zoom(2),
    set(rows, columns) { shape = [rows, columns]; window_ = null; heat = picture = null; view.invalidate(); return reload(); },
    hide(hidden) { node.hidden = legend.hidden = hidden; },
    // Follow the chosen element, also out of a zoomed window.
    select(row, column) {
      at = [row, column];
      if (window_ && (row < window_[0] || row >= window_[1] || column < window_[2] || column >= window_[3])) zoom(1);
      view.invalidate();
    },
  };
}
