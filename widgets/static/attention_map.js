// Maps of attention weights as pixels. A weight is a byte, round(255 * weight); a pixel is the largest of its cells.

// 256 colours: the byte itself, or its square root, which shows small weights.
function weightColours(root) {
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) table.set(viridis(root ? Math.sqrt(i / 255) : i / 255), 3 * i);
  return table;
}
const colourOf = (table, byte) => `rgb(${table[3 * byte]} ${table[3 * byte + 1]} ${table[3 * byte + 2]})`;
const inkOnWeight = (table, byte) => {
  const [r, g, b] = [0, 1, 2].map((i) => table[3 * byte + i]);
  return inkOn(`#${((r << 16) | (g << 8) | b).toString(16).padStart(6, "0")}`);
};

// Rows of one head as an image: one pixel for each pool x pool cells; what nobody may see or nobody has is transparent.
class RowImage {
  constructor() {
    this.node = document.createElement("canvas");
    this.ctx = this.node.getContext("2d", { willReadFrequently: true });
    this.clear();
  }

  clear() { this.rows = new Map(); this.size = 0; this.pool = 0; this.dirty = new Set(); }

  // rows: position -> bytes; row p has p + 1 of them, or more where nothing is masked.
  add(position, bytes) {
    this.rows.set(position, bytes);
    this.size = Math.max(this.size, position + 1, bytes.length);
    this.dirty.add(position);
  }

  // Bring the pixels up to date; at most `most` pixels a side.
  paint(most, table) {
    const pool = Math.max(1, Math.ceil(this.size / most));
    const side = Math.max(1, Math.ceil(this.size / pool));
    if (pool !== this.pool || table !== this.table || side > this.node.width) {
      // Room to grow, so that not every new row makes a new image.
      this.node.width = this.node.height = Math.min(Math.max(side, Math.ceil(side * 1.5)), Math.max(side, most));
      this.bytes = new Uint8Array(this.node.width ** 2);
      this.pixels = new ImageData(this.node.width, this.node.height);
      this.dirty = new Set(this.rows.keys());
      this.pool = pool;
      this.table = table;
    }
    if (!this.dirty.size) return side;
    const width = this.node.width, data = this.pixels.data;
    let first = width, last = -1;
    for (const position of this.dirty) {
      const row = this.rows.get(position), y = Math.floor(position / pool);
      for (let x = 0; x < row.length; x++) {
        const at = y * width + Math.floor(x / pool), byte = Math.max(this.bytes[at], row[x]);
        this.bytes[at] = byte;
        data[4 * at] = table[3 * byte];
        data[4 * at + 1] = table[3 * byte + 1];
        data[4 * at + 2] = table[3 * byte + 2];
        data[4 * at + 3] = 255;
      }
      first = Math.min(first, y);
      last = Math.max(last, y);
    }
    this.dirty.clear();
    this.ctx.putImageData(this.pixels, 0, 0, 0, first, width, last - first + 1);
    return side;
  }
}

// The thumbnails of all heads in one image: head h of layer l at (h * side, l * side).
class Atlas {
  constructor() { this.node = document.createElement("canvas"); this.ctx = this.node.getContext("2d"); this.bytes = null; }

  whole(v) {
    Object.assign(this, { layers: v.layers, heads: v.heads, side: v.side, bytes: new Uint8Array(v.thumbnails) });
    this.dirty = [...Array(v.side).keys()];
    this.node.width = v.heads * v.side;
    this.node.height = v.layers * v.side;
    this.pixels = new ImageData(this.node.width, this.node.height);
  }

  // bins: rows of every thumbnail that have changed; thumbnails: [layers * heads, bins, side].
  part(v) {
    const n = v.bins.length, side = this.side;
    for (let head = 0; head < this.layers * this.heads; head++) {
      for (let i = 0; i < n; i++) {
        const from = (head * n + i) * side;
        this.bytes.set(v.thumbnails.subarray(from, from + side), (head * side + v.bins[i]) * side);
      }
    }
    this.dirty.push(...v.bins);
  }

  paint(table, ranges, extent) {
    if (table !== this.table) { this.table = table; this.dirty = [...Array(this.side).keys()]; }
    if (!this.dirty.length) return;
    const { side, heads, pixels } = this, each = extent / side;
    const there = new Uint8Array(side);
    for (const [first, last] of ranges) there.fill(1, Math.floor(first / each), Math.floor(last / each) + 1);
    for (const y of new Set(this.dirty)) {
      for (let head = 0; head < this.layers * heads; head++) {
        const from = (head * side + y) * side;
        let to = 4 * ((Math.floor(head / heads) * side + y) * this.node.width + (head % heads) * side);
        for (let x = 0; x < side; x++, to += 4) {
          const byte = this.bytes[from + x];
          pixels.data[to] = table[3 * byte];
          pixels.data[to + 1] = table[3 * byte + 1];
          pixels.data[to + 2] = table[3 * byte + 2];
          pixels.data[to + 3] = there[y] && x <= y ? 255 : 0;
        }
      }
    }
    this.dirty = [];
    this.ctx.putImageData(pixels, 0, 0);
  }
}

// What the colours mean: a bar with numbers. Returns the x where it ends.
function weightLegend(ctx, x, y, width, height, table, root, colours, font) {
  for (let i = 0; i < width; i++) {
    const share = i / (width - 1);
    ctx.fillStyle = colourOf(table, Math.round(255 * (root ? share * share : share)));
    ctx.fillRect(x + i, y, 1, height);
  }
  ctx.fillStyle = colours.text;
  ctx.font = font;
  ctx.textAlign = "center";
  for (const weight of [0, 0.1, 0.5, 1]) {
    const at = x + (root ? Math.sqrt(weight) : weight) * (width - 1);
    ctx.fillRect(at - 0.5, y + height, 1, 4);
    ctx.fillText(String(weight), at, y + height + 4 + parseFloat(font) * 0.7);
  }
  ctx.textAlign = "left";
  return x + width;
}
