// What the timeline knows of a run: its steps in columns, its requests with their spans and chunks, and where each
// request lies. Nothing here draws.

const SPAN_KINDS = ["waiting", "prefill", "decode", "preempted"];
const STATUSES = ["waiting", "running", "preempted", "stop", "length", "abort"];
const MOST_STEPS = 131072;      // in the page; older ones are forgotten
const MOST_REQUESTS_KEPT = 4000;

// Index of the first element of a sorted array that is above `value`.
function upperBound(array, length, value) {
  let low = 0, high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (array[middle] <= value) low = middle + 1; else high = middle;
  }
  return low;
}

// The steps, oldest first, one typed array a column. `first`: how many older ones were forgotten.
class StepColumns {
  constructor() { this.clear(); }

  clear() {
    this.length = 0;
    this.first = 0;
    this.grow(1024);
  }

  grow(capacity) {
    const types = { number: Uint32Array, begin: Float64Array, end: Float64Array, prefill: Uint32Array,
      decode: Uint32Array, rows: Uint32Array, failed: Uint8Array };
    for (const [name, Type] of Object.entries(types)) {
      const old = this[name];
      this[name] = new Type(capacity);
      if (old && this.length) this[name].set(old.subarray(0, this.length));
    }
    this.capacity = capacity;
  }

  // Those that begin at or after the first new one are replaced by the new ones.
  put(part) {
    const count = part.step_begin ? part.step_begin.length : 0;
    if (!count) return;
    while (this.length && this.begin[this.length - 1] >= part.step_begin[0]) this.length -= 1;
    if (this.length + count > this.capacity && this.capacity < MOST_STEPS) {
      this.grow(Math.min(MOST_STEPS, 2 ** Math.ceil(Math.log2(this.length + count))));
    }
    if (this.length + count > this.capacity) this.forget(Math.max(this.length + count - this.capacity, MOST_STEPS >> 3));
    for (const name of ["begin", "end", "prefill", "decode", "rows", "failed"]) {
      this[name].set(part[`step_${name}`].subarray(-this.capacity), this.length);
    }
    this.number.set(part.step_step.subarray(-this.capacity), this.length);
    this.length = Math.min(this.capacity, this.length + count);
  }

  forget(count) {
    const gone = Math.min(count, this.length);
    for (const name of ["number", "begin", "end", "prefill", "decode", "rows", "failed"]) {
      this[name].copyWithin(0, gone, this.length);
    }
    this.length -= gone;
    this.first += gone;
  }

  tokens(i) { return this.prefill[i] + this.decode[i]; }

  // Index of the step that is running at a time, or of the last one before it; -1 before the first.
  at(ms) { return upperBound(this.begin, this.length, ms) - 1; }

  // Index of the newest step of that number, or -1. Numbers rise, so it is found by halving.
  find(number) {
    const i = upperBound(this.number, this.length, number) - 1;
    return i >= 0 && this.number[i] === number ? i : -1;
  }

  // Share of the budget that the newest `count` steps up to index `last` used, or null.
  use(budget, count, last) {
    const from = Math.max(0, last - count + 1);
    if (last < 0 || !budget) return null;
    let sum = 0;
    for (let i = from; i <= last; i++) sum += this.tokens(i);
    return sum / (budget * (last - from + 1));
  }
}

class TimelineModel {
  constructor() {
    this.steps = new StepColumns();
    this.comfortable = 8;        // lanes that are opened before one is used again
    this.clear();
  }

  clear() {
    this.steps.clear();
    this.requests = [];          // in order of arrival
    this.byNumber = new Map();
    this.byId = new Map();       // the newest of that id
    this.lanes = [];             // of each lane, its last request
    this.lastMs = 0;
    this.beginMs = null;
  }

  // Take in a snapshot or a delta of the topic.
  put(part) {
    if (part.clear) this.clear();
    this.steps.put(part);
    for (const [number, id, prompt, added] of part.added) this.add(number, id, prompt, added);
    for (let i = 0; part.span_begin && i < part.span_begin.length; i++) {
      const request = this.byNumber.get(part.span_request[i]);
      if (!request) continue;
      const begin = part.span_begin[i], end = part.span_end[i];
      while (request.spans.length && request.spans[request.spans.length - 1].begin >= begin) request.spans.pop();
      request.spans.push({ kind: SPAN_KINDS[part.span_kind[i]], begin, end });
      this.seen(begin);
      this.seen(end);
    }
    for (let i = 0; part.chunk_begin && i < part.chunk_begin.length; i++) {
      const request = this.byNumber.get(part.chunk_request[i]);
      if (!request) continue;
      const begin = part.chunk_begin[i], chunks = request.chunks;
      while (chunks.length && chunks[chunks.length - 1].begin >= begin) chunks.pop();
      chunks.push({ begin, step: part.chunk_step[i], start: part.chunk_start[i], count: part.chunk_count[i] });
    }
    for (let i = 0; part.request_number && i < part.request_number.length; i++) {
      const request = this.byNumber.get(part.request_number[i]);
      if (!request) continue;
      request.tokens = part.request_tokens[i];
      request.first = part.request_first[i];
      request.cached = part.request_cached[i];
      request.preemptions = part.request_preemptions[i];
      request.status = STATUSES[part.request_status[i]];
      request.end = part.request_end[i];
      if (!isNaN(request.end)) this.byNumber.delete(part.request_number[i]);
    }
    if (this.steps.length) {
      this.seen(this.steps.begin[0]);
      this.seen(this.steps.begin[this.steps.length - 1]);
      this.seen(this.steps.end[this.steps.length - 1]);
    }
    if (this.requests.length > MOST_REQUESTS_KEPT) {
      const newest = this.requests.length - MOST_REQUESTS_KEPT / 2;
      this.requests = this.requests.filter((request, i) => isNaN(request.end) || i >= newest);
      this.byId = new Map(this.requests.map((request) => [request.id, request]));
    }
  }

  seen(ms) {
    if (isNaN(ms)) return;
    this.lastMs = Math.max(this.lastMs, ms);
    this.beginMs = this.beginMs === null ? ms : Math.min(this.beginMs, ms);
  }

  add(number, id, prompt, added) {
    const old = this.byId.get(id);
    if (old && isNaN(old.end)) {   // the id was given again before we heard how the first one ended
      old.end = added;
      if (old.spans.length && isNaN(old.spans[old.spans.length - 1].end)) old.spans[old.spans.length - 1].end = added;
    }
    const request = { id, prompt, added, spans: [], chunks: [], tokens: 0, first: NaN, cached: 0, preemptions: 0,
      status: "waiting", end: NaN, lane: 0, look: requestLook(id) };
    this.byNumber.set(number, request);
    this.byId.set(id, request);
    this.requests.push(request);
    this.seat(request);
  }

  // A request keeps its lane for life. New lanes are opened until they fill the picture; after that the one is used
  // again that has been free longest, for what ended just now is worth looking at a little longer.
  seat(request) {
    const free = (lane) => { const last = this.lanes[lane]; return !isNaN(last.end) && last.end <= request.added; };
    let found = -1;
    if (this.lanes.length >= this.comfortable) {
      for (let lane = 0; lane < this.comfortable; lane++) {
        if (free(lane) && (found < 0 || this.lanes[lane].end < this.lanes[found].end)) found = lane;
      }
      for (let lane = this.comfortable; found < 0 && lane < this.lanes.length; lane++) if (free(lane)) found = lane;
    }
    request.lane = found < 0 ? this.lanes.length : found;
    this.lanes[request.lane] = request;
  }

  // The picture is of another height now: seat everybody anew.
  setComfortable(count) {
    if (count === this.comfortable) return;
    this.comfortable = count;
    this.lanes = [];
    for (const request of this.requests) this.seat(request);
  }

  count(status) {
    let found = 0;
    for (const request of this.requests) found += request.status === status;
    return found;
  }
}

// The horizontal axis: from milliseconds to its own units and back. "time": they are the same. "steps": every step has
// the width 1, and the time between two steps has none.
class Axis {
  constructor(model, mode) { this.model = model; this.mode = mode; }

  of(ms) {
    if (this.mode === "time") return ms;
    const steps = this.model.steps, i = steps.at(ms);
    if (i < 0) return steps.first;
    const end = steps.end[i];
    const share = isNaN(end) ? (i === steps.length - 1 && ms > steps.begin[i] ? 1 : 0)
      : Math.min(1, (ms - steps.begin[i]) / Math.max(1e-9, end - steps.begin[i]));
    return steps.first + i + share;
  }

  toMs(x) {
    if (this.mode === "time") return x;
    const steps = this.model.steps;
    if (!steps.length) return 0;
    const i = Math.max(0, Math.min(steps.length - 1, Math.floor(x - steps.first)));
    const end = isNaN(steps.end[i]) ? this.model.lastMs : steps.end[i];
    return steps.begin[i] + Math.max(0, Math.min(1, x - steps.first - i)) * (end - steps.begin[i]);
  }

  // Begin and end of step i in the axis' units.
  stepBegin(i) { return this.mode === "time" ? this.model.steps.begin[i] : this.model.steps.first + i; }
  stepEnd(i, now) {
    if (this.mode === "steps") return this.model.steps.first + i + 1;
    const end = this.model.steps.end[i];
    return isNaN(end) ? Math.max(now, this.model.steps.begin[i]) : end;
  }

  // [index of the first step, index after the last] that lie, in part at least, between two places.
  range(low, high) {
    const steps = this.model.steps;
    if (this.mode === "steps") {
      return [Math.max(0, Math.floor(low - steps.first)), Math.min(steps.length, Math.ceil(high - steps.first))];
    }
    return [Math.max(0, steps.at(low)), upperBound(steps.begin, steps.length, high)];
  }
}
