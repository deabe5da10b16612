// One attention weight with every number on the way to it.

const asNumber = (x) => !Number.isFinite(x) ? (x > 0 ? "∞" : x < 0 ? "−∞" : "NaN")
  : x === 0 ? "0" : (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5 ? String(Number(x.toPrecision(4))) : x.toExponential(2)).replace("-", "−");

// A box that shows a cell. show(cell, tokens); message(text); cells: {q, k, products, exps, ...} as Python answered.
function arithmeticBox(ui, parent) {
  const node = element("div", { class: "tv-arithmetic", "aria-live": "off", style: {
    font: "inherit", overflowX: "auto", borderTop: "1px solid var(--jp-border-color2, #e0e0e0)", paddingTop: "4px" } });
  parent.append(node);
  const line = (left, right, title) => element("tr", { title },
    element("td", { style: { padding: "1px .7em 1px 0", whiteSpace: "nowrap", verticalAlign: "top" }, text: left }),
    element("td", { class: "tv-mono", style: { padding: "1px 0" } }, ...(typeof right === "string" ? [right] : right)));
  const bold = (text) => element("b", { text });

  const link = (text, title, address) => element("button", { class: "tv-mono", type: "button", title, text, onclick: () => ui.client.inspect(address),
    style: { font: "inherit", color: "inherit", background: "none", border: "none", borderBottom: "1px dotted", padding: "0", cursor: "pointer" } });

  // The largest products as bars; the others as one sum.
  function products(cell) {
    const order = [...cell.products.keys()].sort((a, b) => Math.abs(cell.products[b]) - Math.abs(cell.products[a]));
    const shown = order.slice(0, 6), rest = order.slice(6);
    const most = Math.abs(cell.products[order[0]]) || 1;
    const bar = (value) => element("td", { style: { width: "30%", minWidth: "6em" } }, element("div", { style: {
      height: ".8em", width: `${50 * Math.min(1, Math.abs(value) / most)}%`, marginLeft: value < 0 ? `${50 - 50 * Math.min(1, Math.abs(value) / most)}%` : "50%",
      background: value < 0 ? "#D55E00" : "#0072B2" } }));
    const rows = shown.map((d) => element("tr", {},
      element("td", { class: "tv-muted", text: `${d}` }),
      element("td", { style: { textAlign: "right", whiteSpace: "nowrap" } },
        link(asNumber(cell.q[d]), "this number's bits", { kind: "query", layer: cell.layer, head: cell.head, position: cell.row, dim: d }), " · ",
        link(asNumber(cell.k[d]), "this number's bits", { kind: "kv", part: "key", layer: cell.layer, block: cell.block_id, head: cell.kv_head, offset: cell.offset, dim: d })),
      element("td", { style: { textAlign: "right", padding: "0 .5em", whiteSpace: "nowrap" }, text: `= ${asNumber(cell.products[d])}` }), bar(cell.products[d])));
    const sum = rest.reduce((total, d) => total + cell.products[d], 0);
    if (rest.length) rows.push(element("tr", {}, element("td", { class: "tv-muted", text: "…" }),
      element("td", { style: { textAlign: "right" }, text: `${rest.length} more` }),
      element("td", { style: { textAlign: "right", padding: "0 .5em" }, text: `= ${asNumber(sum)}` }), bar(sum)));
    return element("table", { class: "tv-mono", style: { borderCollapse: "collapse", width: "100%", maxWidth: "calc(560px * var(--tv-scale, 1))", fontSize: ".95em" } }, ...rows);
  }

  // Where this numerator stands among those of its row.
  function numerators(cell) {
    const box = element("div", { style: { display: "flex", alignItems: "flex-end", height: "2.6em", width: "100%", margin: "2px 0",
      borderBottom: "1px solid var(--jp-border-color1, #bdbdbd)" }, title: "the numerators of this row, one bar a key; each is at most 1" });
    // At most 160 bars: the largest of each group, so that none is lost.
    const each = Math.ceil(cell.visible / 160);
    for (let start = 0; start < cell.visible; start += each) {
      const end = Math.min(start + each, cell.visible), here = cell.column >= start && cell.column < end;
      const most = Math.max(...cell.exps.subarray(start, end));
      box.append(element("div", { style: { flex: "1 1 0", minWidth: "1px", height: `${Math.max(here ? 4 : 0, 100 * most)}%`, background: here ? "#D55E00" : "#56B4E9" } }));
    }
    return box;
  }

  return {
    node,
    message(text) { node.replaceChildren(element("div", { class: "tv-muted", style: { padding: ".5em 0" }, text })); delete node.dataset.cell; },
    show(cell, tokens) {
      const name = (position) => `“${visibleText(tokens[position] || "")}”`;
      const visible = cell.causal ? `keys 0 to ${cell.row}` : `all ${cell.context} keys, no mask`;
      const scale = cell.scaled ? `${asNumber(cell.dot)} · ${asNumber(cell.scale)}` : `${asNumber(cell.dot)} · 1`;
      const fate = cell.masked ? `${cell.column} > ${cell.row}: in the future, so −∞` : cell.column > cell.row
        ? `${cell.column} > ${cell.row}: would be hidden; WHAT IF it is not` : `${cell.column} ≤ ${cell.row}: may be seen`;
      const sizes = cell.q.length;
      node.replaceChildren(
        element("div", { style: { marginBottom: "2px" } }, bold(name(cell.row)), ` at ${cell.row} looks at `, bold(name(cell.column)), ` at ${cell.column}`,
          element("span", { class: "tv-muted", text: `  layer ${cell.layer}, head ${cell.head}, keys of KV head ${cell.kv_head}` })),
        cell.causal && cell.scaled ? "" : element("div", { style: { color: "#fff", background: "#7a4a00", padding: "0 .5em", borderRadius: "4px", display: "inline-block" },
          text: `WHAT IF: ${[cell.causal ? "" : "no mask", cell.scaled ? "" : "no scale"].filter(Boolean).join(", ")}` }),
        products(cell),
        element("table", { style: { borderCollapse: "collapse", marginTop: "2px" } },
          line("q · k", [bold(asNumber(cell.dot)), `  sum of ${sizes} products`]),
          line("× scale", [`${scale} = `, bold(asNumber(cell.score)), cell.scaled ? `  (1/√${sizes})` : "  (scale off)"], "scores grow with the number of products; the scale takes that back"),
          line("mask", fate),
          line("row maximum", `m = ${asNumber(cell.row_max)}  of ${visible}`, "taken off so that exp cannot overflow; it cancels"),
          line("numerator", [cell.masked ? "exp(−∞) = " : `exp(${asNumber(cell.score)} − ${asNumber(cell.row_max)}) = `, bold(asNumber(cell.exp))]),
          line("denominator", `Σ exp = ${asNumber(cell.denominator)}`),
          line("weight", [`${asNumber(cell.exp)} / ${asNumber(cell.denominator)} = `, bold(asNumber(cell.weight))])),
        numerators(cell));
      Object.assign(node.dataset, { cell: [cell.layer, cell.head, cell.row, cell.column].join(","), dot: cell.dot, score: cell.score, weight: cell.weight,
        masked: cell.masked, denominator: cell.denominator, exp: cell.exp });
    },
  };
}
