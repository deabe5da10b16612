// The pool of KV-cache blocks as the topic "blocks" told it: what each block and each request is like.

class BlockPool {
  constructor() { this.begin({ num_blocks: 0, block_size: 1, max_model_len: 0 }); }

  begin({ num_blocks, block_size, max_model_len }) {
    this.num = num_blocks;
    this.size = block_size;
    this.most = max_model_len;       // tokens that a request may become
    this.ref = new Uint16Array(num_blocks);      // how many requests hold a block
    this.filled = new Int32Array(num_blocks);    // slots with keys
    this.cached = new Uint8Array(num_blocks);    // findable by the prefix cache
    this.owners = new Array(num_blocks).fill(null);  // keys of requests
    this.rows = new Map();           // key -> a request that has not ended
    this.keys = new Map();           // request id -> key
    this.totals = { slots: 0, filled: 0, saved: 0, found: 0 };
  }

  // A snapshot (it says how many blocks there are) or a delta.
  take(value) {
    if (value.num_blocks !== undefined) this.begin(value);
    let at = 0;
    for (let i = 0; i < value.ref.length; i++) {
      const id = value.ids ? value.ids[i] : i;
      this.ref[id] = value.ref[i];
      this.filled[id] = value.filled[i];
      this.cached[id] = value.cached[i];
      this.owners[id] = value.ref[i] ? Array.from(value.owners.subarray(at, at += value.ref[i])) : null;
    }
    for (const key of value.gone || []) {
      const row = this.rows.get(key);
      if (row) this.keys.delete(row.id);
      this.rows.delete(key);
    }
    for (const [key, id, status, computed, tokens, most, found] of value.rows) {
      const row = this.rows.get(key) || { key, id, table: [] };
      this.rows.set(key, Object.assign(row, { status, computed, tokens, most, found }));
      this.keys.set(id, key);
    }
    at = 0;
    value.table_keys.forEach((key, i) => { this.rows.get(key).table = Array.from(value.tables.subarray(at, at += value.table_sizes[i])); });
    this.totals = value.totals;
  }

  nameOf(key) { return this.rows.get(key)?.id; }
  rowOf(id) { return id === null ? undefined : this.rows.get(this.keys.get(id)); }
  ownersOf(id) { return (this.owners[id] || []).map((key) => this.nameOf(key)); }
  get holding() { return [...this.rows.values()].filter((row) => row.table.length); }
  // Who holds blocks first, then who waits.
  get ordered() { return [...this.holding, ...[...this.rows.values()].filter((row) => !row.table.length)]; }

  counts() {
    let held = 0, shared = 0, cached = 0;
    for (let i = 0; i < this.num; i++) {
      if (this.ref[i]) held++; else if (this.cached[i]) cached++;
      if (this.ref[i] > 1) shared++;
    }
    return { held, shared, cached };
  }

  // Slots that all who hold blocks would reserve in one piece each, and how many of them have a token.
  inOnePiece() {
    const holding = this.holding;
    return { slots: holding.length * this.most, tokens: holding.reduce((sum, row) => sum + row.computed, 0), requests: holding.length };
  }

  // The waste that the present tokens would make in blocks of other sizes (nothing shared): arithmetic, not a run.
  wasteBySize() {
    const holding = this.holding, used = holding.reduce((sum, row) => sum + row.computed, 0);
    return [...new Set([1, 4, 16, 64, 256, this.size])].sort((a, b) => a - b).map((size) => {
      const slots = holding.reduce((sum, row) => sum + Math.ceil(row.computed / size) * size, 0);
      return [size, slots ? (slots - used) / slots : 0];
    });
  }
}

const shortId = (id) => String(id).length > 14 ? `${String(id).slice(0, 13)}…` : String(id);
