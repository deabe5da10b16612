// The representable numbers of a format around a value, as ticks on a line, and where rounding sends the value.

const TICKS = [2, 4, 8, 16, 32, 64];  // on each side of the middle

// numberLine(ui, {state, pick}): state() gives {format, bits, real, text}; pick(bits) is called for a tick that is chosen.
function numberLine(ui, { state, pick }) {
  let zoom = 1, places = [];
  const view = canvas(ui, { height: 128, label: "Number line of the representable values nearby", draw });
  const node = view.node;
  node.classList.add("bl-line");

  function ticksAround(format, bits, count) {
    const middle = format.order(bits), ticks = [];
    for (let order = middle - count; order <= middle + count; order++) {
      const pattern = format.fromOrder(order);
      if (pattern === null) continue;
      const [n, p] = format.integerAndPower(pattern);  // of infinity: where the next number would be
      ticks.push({ bits: pattern, real: finite(pattern >= format.signBit, BigInt(n), 1n, p) });
    }
    return ticks;
  }

  function draw(ctx, width, height, t) {
    const { format, bits, real, text } = state(), s = ui.scale;
    if (height !== 128 * s) { view.setHeight(128 * s); return; }
    const small = 12 * s, font = (size, weight = "") => { ctx.font = `${weight} ${size}px ${t.font}`; };
    places = [];
    node.dataset.ticks = 0;
    if (format.kind(bits) === "nan") {
      font(14 * s);
      ctx.fillStyle = t.muted;
      ctx.textAlign = "left";
      ctx.fillText("NaN is not on the number line: it is neither below nor above anything.", 8 * s, height / 2);
      return;
    }
    const ticks = ticksAround(format, bits, TICKS[zoom]);
    const first = ticks[0].real, span = approximately(minus(ticks[ticks.length - 1].real, first)) || 1;
    const margin = 46 * s, y = 74 * s;
    const at = (r) => margin + (approximately(minus(r, first)) / span) * (width - 2 * margin);
    ctx.lineWidth = 1.5 * s;
    ctx.strokeStyle = t.line;
    ctx.beginPath();
    ctx.moveTo(margin / 2, y);
    ctx.lineTo(width - margin / 2, y);
    ctx.stroke();
    // Ticks; taller where a power of two begins, since the distance to the next doubles there.
    for (const tick of ticks) {
      const x = at(tick.real), [, , mantissa] = format.parts(tick.bits), chosen = tick.bits === bits;
      const power = mantissa === 0 && format.kind(tick.bits) === "normal";
      ctx.strokeStyle = chosen ? t.accent : power ? t.text : t.muted;
      ctx.lineWidth = (chosen ? 4 : power ? 2 : 1.2) * s;
      ctx.beginPath();
      ctx.moveTo(x, y - (chosen || power ? 11 : 7) * s);
      ctx.lineTo(x, y + (chosen || power ? 11 : 7) * s);
      ctx.stroke();
      places.push({ x, bits: tick.bits });
    }
    labels(ctx, ticks, at, { format, bits, y, small, t, width, font });
    arrows(ctx, at, { format, bits, real, text, y, small, t, width, margin, font });
    node.dataset.ticks = ticks.length;
    node.dataset.first = ticks[0].bits;
    node.dataset.last = ticks[ticks.length - 1].bits;
  }

  // Values under the ticks: the chosen one first, then its neighbours, then whatever has room.
  function labels(ctx, ticks, at, { format, bits, y, small, t, width, font }) {
    const middle = ticks.findIndex((tick) => tick.bits === bits), taken = [];
    const order = ticks.map((_, i) => i).sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle));
    ctx.textAlign = "center";
    for (const i of order) {
      const tick = ticks[i], kind = format.kind(tick.bits);
      const value = kind === "infinity" ? `${tick.bits >= format.signBit ? "\u2212" : ""}∞` : withMinus(shortDecimal(tick.real, 7));
      font(small, i === middle ? "bold" : "");
      const half = Math.max(ctx.measureText(value).width, ctx.measureText(format.hex(tick.bits)).width) / 2 + 5 * ui.scale;
      const x = Math.min(Math.max(at(tick.real), half), width - half);
      if (taken.some(([a, b]) => x + half > a && x - half < b)) continue;
      taken.push([x - half, x + half]);
      ctx.fillStyle = i === middle ? t.text : t.muted;
      ctx.fillText(value, x, y + 22 * ui.scale);
      ctx.fillText(format.hex(tick.bits), x, y + 39 * ui.scale);
    }
  }

  // The value itself, above the line, with arrows to where rounding to nearest and cutting off send it.
  function arrows(ctx, at, { format, real, text, y, small, t, width, margin, font }) {
    if (real.kind !== "finite") return;
    const nearest = format.encode(real), cut = format.encode(real, true), s = ui.scale;
    node.dataset.nearest = nearest;
    node.dataset.cut = cut;
    const place = at(real), x = Math.min(Math.max(place, margin / 3), width - margin / 3), top = y - 42 * s;
    ctx.fillStyle = "#D55E00";
    ctx.beginPath();
    if (place > x) { ctx.moveTo(x + 8 * s, top); ctx.lineTo(x - 4 * s, top - 6 * s); ctx.lineTo(x - 4 * s, top + 6 * s); }
    else if (place < x) { ctx.moveTo(x - 8 * s, top); ctx.lineTo(x + 4 * s, top - 6 * s); ctx.lineTo(x + 4 * s, top + 6 * s); }
    else { ctx.moveTo(x, top + 7 * s); ctx.lineTo(x - 6 * s, top - 4 * s); ctx.lineTo(x + 6 * s, top - 4 * s); }
    ctx.fill();
    font(small + 1, "bold");
    ctx.fillStyle = t.text;
    const shown = text.length > 28 ? `${text.slice(0, 27)}…` : text, half = ctx.measureText(shown).width / 2 + 4;
    ctx.fillText(withMinus(shown), Math.min(Math.max(x, half), width - half), top - 16 * s);
    if (place !== x) return;
    const arrow = (bits, dash, colour) => {
      const end = places.find((p) => p.bits === bits);
      if (!end || Math.abs(end.x - x) < 1) return;
      const far = end.x, high = y - 14 * s;
      ctx.strokeStyle = ctx.fillStyle = colour;
      ctx.lineWidth = 2 * s;
      ctx.setLineDash(dash);
      ctx.beginPath();
      ctx.moveTo(x, top + 8 * s);
      ctx.lineTo(far, high);
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.beginPath();
      ctx.arc(far, high, 3.5 * s, 0, 7);
      ctx.fill();
    };
    if (cut !== nearest) arrow(cut, [5 * s, 4 * s], t.muted);
    arrow(nearest, [], "#D55E00");
  }

  const setZoom = (value) => {
    zoom = Math.min(TICKS.length - 1, Math.max(0, value));
    view.invalidate();
  };
  const step = (by) => {
    const { format, bits } = state(), order = format.order(bits);
    const next = order === null ? null : format.fromOrder(order + by);
    if (next !== null) pick(next);
  };
  node.addEventListener("click", (event) => {
    const nearest = places.reduce((a, b) => !a || Math.abs(b.x - event.offsetX) < Math.abs(a.x - event.offsetX) ? b : a, null);
    if (nearest) pick(nearest.bits);
  });
  node.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) step(by);
    else if (event.key === "+" || event.key === "=") setZoom(zoom - 1);
    else if (event.key === "-") setZoom(zoom + 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return { node, invalidate: view.invalidate, zoomIn: () => setZoom(zoom - 1), zoomOut: () => setZoom(zoom + 1), step };
}
