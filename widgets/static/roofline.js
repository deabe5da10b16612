// A roofline (Williams, Waterman and Patterson 2009): what a machine could reach at so many flops a byte, and what was reached.

const STEP_KINDS = {
  prefill: { colour: "#E69F00", shape: "square", words: "prefill" },
  decode: { colour: "#0072B2", shape: "diamond", words: "decode" },
  mixed: { colour: "#009E73", shape: "triangle", words: "both" },
};

function marker(ctx, shape, x, y, r) {
  const path = {
    square: [[-1, -1], [1, -1], [1, 1], [-1, 1]], diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
    triangle: [[0, -1.2], [1.2, 1], [-1.2, 1]],
  }[shape];
  ctx.beginPath();
  if (path) path.forEach(([dx, dy], i) => i ? ctx.lineTo(x + dx * r, y + dy * r) : ctx.moveTo(x + dx * r, y + dy * r));
  else ctx.arc(x, y, r, 0, 2 * Math.PI);
  ctx.closePath();
}

// What the marks mean, in one line.
function drawRooflineKey(ctx, x, y, width, s, t) {
  ctx.font = `${Math.round(11 * s)}px ${t.font}`;
  ctx.textAlign = "left";
  for (const { shape, colour, words } of [...Object.values(STEP_KINDS), { shape: "circle", words: "one operation" }]) {
    marker(ctx, shape, x, y, (colour ? 5 : 4) * s);
    if (colour) { ctx.fillStyle = colour; ctx.fill(); } else { ctx.strokeStyle = t.text; ctx.lineWidth = 1.8 * s; ctx.stroke(); }
    ctx.fillStyle = t.text;
    ctx.fillText(cutToWidth(ctx, words, width - x - 12 * s), x + 10 * s, y);
    x += ctx.measureText(words).width + 30 * s;
  }
}

const asRate = (perSecond, unit) => {
  const [scale, prefix] = perSecond >= 1e12 ? [1e12, "T"] : perSecond >= 1e9 ? [1e9, "G"] : perSecond >= 1e6 ? [1e6, "M"] : [1e3, "k"];
  const value = perSecond / scale;
  return `${value >= 100 ? value.toFixed(0) : value.toPrecision(2)} ${prefix}${unit}`;
};

// dots: [{flops, bytes, ns, label, kind, strong, faded}]; roofs: {bandwidth, cache_bandwidth, peak} or null.
// Returns the places of the dots: [{x, y, dot}].
function drawRoofline(ctx, box, dots, roofs, t, s) {
  const usable = dots.filter((dot) => dot.flops > 0 && dot.bytes > 0 && dot.ns > 0);
  const intensity = (dot) => dot.flops / dot.bytes, rate = (dot) => dot.flops / dot.ns * 1e9;
  const ridge = roofs ? roofs.peak / roofs.bandwidth : 8;
  const xs = [0.125, ridge * 4, ...usable.map(intensity)], ys = [...usable.map(rate), ...(roofs ? [roofs.peak] : [1e9, 1e11])];
  const range = (values, low, high) => [Math.floor(Math.log10(Math.min(...values) * low)),
    Math.ceil(Math.log10(Math.max(...values) * high))];
  const [x0, x1] = range(xs, 1, 1), [y0, y1] = range(ys, 0.8, 1.3);
  const left = box.x + 66 * s, right = box.x + box.width - 10 * s, top = box.y + 10 * s, bottom = box.y + box.height - 40 * s;
  const X = (v) => left + (Math.log10(v) - x0) / (x1 - x0) * (right - left);
  const Y = (v) => bottom - (Math.log10(v) - y0) / (y1 - y0) * (bottom - top);

  // Axes.
  ctx.font = `${Math.round(11 * s)}px ${t.font}`;
  ctx.lineWidth = 1;
  for (let d = x0; d <= x1; d++) {
    ctx.strokeStyle = t.faint;
    ctx.beginPath(); ctx.moveTo(X(10 ** d), top); ctx.lineTo(X(10 ** d), bottom); ctx.stroke();
    ctx.fillStyle = t.muted;
    ctx.textAlign = "center";
    const words = d < 0 ? (10 ** d).toFixed(-d) : asCount(10 ** d);
    // The last one is at the edge, and "1,000" wider than the margin there.
    ctx.fillText(words, Math.min(X(10 ** d), box.x + box.width - ctx.measureText(words).width / 2 - 1), bottom + 10 * s);
  }
  for (let d = y0; d <= y1; d++) {
    ctx.strokeStyle = t.faint;
    ctx.beginPath(); ctx.moveTo(left, Y(10 ** d)); ctx.lineTo(right, Y(10 ** d)); ctx.stroke();
    ctx.fillStyle = t.muted;
    ctx.textAlign = "right";
    ctx.fillText(asRate(10 ** d, "").replace(/\.0 /, " "), left - 5 * s, Y(10 ** d));
  }
  ctx.fillStyle = t.text;
  ctx.textAlign = "center";
  ctx.fillText("flops for each byte moved", (left + right) / 2, bottom + 28 * s);
  ctx.save();
  ctx.translate(box.x + 9 * s, (top + bottom) / 2);
  ctx.rotate(-Math.PI / 2);
  ctx.fillText("flops a second", 0, 0);
  ctx.restore();

  // Roofs.
  ctx.save();
  ctx.beginPath(); ctx.rect(left, top, right - left, bottom - top); ctx.clip();
  const taken = [];  // [x, y, width] of texts
  if (roofs) {
    const roof = (bandwidth, dash, text, below) => {
      const knee = roofs.peak / bandwidth;
      ctx.setLineDash(dash);
      ctx.strokeStyle = ctx.fillStyle = t.text;
      ctx.lineWidth = 2 * s;
      ctx.beginPath();
      ctx.moveTo(X(10 ** x0), Y(10 ** x0 * bandwidth));
      ctx.lineTo(X(knee), Y(roofs.peak));
      ctx.lineTo(right, Y(roofs.peak));
      ctx.stroke();
      ctx.setLineDash([]);
      // Along the slope, where there is room for it.
      const angle = -Math.atan2((bottom - top) / (y1 - y0), (right - left) / (x1 - x0));
      const at = Math.max(10 ** x0, 10 ** y0 / bandwidth) * 1.6;
      ctx.save();
      ctx.translate(X(at), Y(at * bandwidth));
      ctx.rotate(angle);
      ctx.textAlign = "left";
      ctx.fillText(text, 6 * s, below ? 9 * s : -9 * s);
      ctx.restore();
      const length = ctx.measureText(text).width;
      for (let along = 0; along < length; along += 12 * s) {
        taken.push([X(at) + along * Math.cos(angle) - 4 * s,
          Y(at * bandwidth) + along * Math.sin(angle) + (below ? 9 : -9) * s, 14 * s]);
      }
    };
    roof(roofs.bandwidth, [], `memory ${asRate(roofs.bandwidth, "B/s")}`, true);
    if (roofs.cache_bandwidth > roofs.bandwidth * 1.1) {
      roof(roofs.cache_bandwidth, [5 * s, 4 * s], `cache ${asRate(roofs.cache_bandwidth, "B/s")}`, false);
    }
    ctx.textAlign = "right";
    ctx.fillText(`peak ${asRate(roofs.peak, "flop/s")}`, right - 4, Y(roofs.peak) - 9 * s);
  }

  // Dots: the weak first, so that the strong lie on top.
  const places = [];
  for (const dot of [...usable].sort((a, b) => (a.strong ? 1 : 0) - (b.strong ? 1 : 0))) {
    const x = X(intensity(dot)), y = Y(rate(dot)), kind = STEP_KINDS[dot.kind] || STEP_KINDS.mixed, r = (dot.strong ? 6 : 4) * s;
    ctx.globalAlpha = dot.faded ? 0.45 : 1;
    marker(ctx, dot.strong ? kind.shape : "circle", x, y, r);
    ctx.fillStyle = dot.strong ? kind.colour : t.panel;
    ctx.fill();
    ctx.strokeStyle = dot.strong ? t.text : kind.colour;
    ctx.lineWidth = dot.chosen ? 4 * s : 1.8 * s;
    ctx.stroke();
    ctx.globalAlpha = 1;
    places.push({ x, y, dot });
  }
  ctx.font = `${Math.round(11 * s)}px ${t.font}`;
  const rank = ({ dot }) => dot.chosen ? 2 : dot.strong ? 1 : 0;
  for (const { x, y, dot } of [...places].sort((a, b) => rank(b) - rank(a))) {
    if (!dot.label) continue;
    const width = ctx.measureText(dot.label).width;
    // To the right, the left, above or below: wherever nothing is yet.
    const isFree = ([a, b]) => a >= left && a + width <= right && b > top && b < bottom
      && !taken.some((o) => a < o[0] + o[2] && o[0] < a + width && Math.abs(b - o[1]) < 12 * s)
      && !places.some((p) => p.dot !== dot && p.x > a - 5 * s && p.x < a + width + 5 * s && Math.abs(p.y - b) < 9 * s);
    const spots = [[x + 9 * s, y], [x - 9 * s - width, y], [x - width / 2, y - 14 * s], [x - width / 2, y + 14 * s]];
    // The chosen operation is named whatever is there, as long as it lies within the picture.
    const [a, b] = spots.find(isFree) || (dot.chosen && spots.find(([at]) => at >= left && at + width <= right)) || [];
    if (a === undefined) continue;
    taken.push([a, b, width]);
    ctx.textAlign = "left";
    ctx.lineWidth = 3 * s;   // a ground of its own, where it crosses a roof or the grid
    ctx.lineJoin = "round";
    ctx.strokeStyle = t.panel;
    ctx.strokeText(dot.label, a, b);
    ctx.fillStyle = t.text;
    ctx.fillText(dot.label, a, b);
  }
  ctx.restore();
  return places;
}
