// One attention weight with every number on the way to it.

function asNumber(x) {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : x < 0 ? "−∞" : "NaN";
  const plain = x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5);
  return (plain ? String(Number(x.toPrecision(4))) : x.toExponential(2)).replace("-", "−");
}

// A box that shows a cell. message(text), or show(cell, tokens); cell: what Python answered to "attention_cell".
function arithmeticBox(ui, parent) {
  const node = element("div", { class: "tv-arithmetic", style: { overflowX: "auto", paddingTop: "4px",
    borderTop: "1px solid var(--jp-border-color2, #e0e0e0)" } });
  parent.append(node);
  const bold = (text) => element("b", { text });
  const line = (left, right, title) => element("tr", { title },
    element("td", { style: { padding: "1px .7em 1px 0", whiteSpace: "nowrap", verticalAlign: "top" }, text: left }),
    element("td", { class: "tv-mono", style: { padding: "1px 0" } }, ...(typeof right === "string" ? [right] : right)));
  const plain = { font: "inherit", color: "inherit", background: "none", border: "none", borderBottom: "1px dotted",
    padding: "0", cursor: "pointer" };
  const bitsOf = (value, address) => element("button", { class: "tv-mono", type: "button", style: plain,
    title: "this number's bits", text: asNumber(value), onclick: () => ui.client.inspect(address) });

  // A product's bar, to the right or the left of the middle.
  function bar(value, most) {
    const share = 50 * Math.min(1, Math.abs(value) / most);
    return element("td", { style: { width: "30%", minWidth: "6em" } }, element("div", { style: { height: ".8em",
      width: `${share}%`, marginLeft: `${value < 0 ? 50 - share : 50}%`, background: value < 0 ? "#D55E00" : "#0072B2" } }));
  }

  // The largest products one by one; the others as one sum.
  function products(cell) {
    const order = [...cell.products.keys()].sort((a, b) => Math.abs(cell.products[b]) - Math.abs(cell.products[a]));
    const most = Math.abs(cell.products[order[0]]) || 1, rest = order.slice(6), wide = { textAlign: "right", whiteSpace: "nowrap" };
    const row = (name, factors, value) => element("tr", {}, element("td", { class: "tv-muted", text: name }),
      element("td", { style: wide }, ...factors),
      element("td", { style: { ...wide, padding: "0 .5em" }, text: `= ${asNumber(value)}` }), bar(value, most));
    const rows = order.slice(0, 6).map((d) => row(String(d), [
      bitsOf(cell.q[d], { kind: "query", layer: cell.layer, head: cell.head, position: cell.row, dim: d }), " · ",
      bitsOf(cell.k[d], { kind: "kv", part: "key", layer: cell.layer, block: cell.block_id, head: cell.kv_head,
        offset: cell.offset, dim: d })], cell.products[d]));
    if (rest.length) rows.push(row("…", [`${rest.length} more`], rest.reduce((sum, d) => sum + cell.products[d], 0)));
    return element("table", { class: "tv-mono", style: { borderCollapse: "collapse", width: "100%", fontSize: ".95em",
      maxWidth: "calc(560px * var(--tv-scale, 1))" } }, ...rows);
  }

  // Where this numerator stands among those of its row. At most 160 bars: the largest of each group, so that none is lost.
  function numerators(cell) {
    const box = element("div", { title: "the numerators of this row, one bar a key; each is at most 1", style: {
      display: "flex", alignItems: "flex-end", height: "2.6em", width: "100%", margin: "2px 0",
      borderBottom: "1px solid var(--jp-border-color1, #bdbdbd)" } });
    const each = Math.ceil(cell.visible / 160);
    for (let start = 0; start < cell.visible; start += each) {
      const end = Math.min(start + each, cell.visible), here = cell.column >= start && cell.column < end;
      const most = Math.max(...cell.exps.subarray(start, end));
      box.append(element("div", { style: { flex: "1 1 0", minWidth: "1px", background: here ? "#D55E00" : "#56B4E9",
        height: `${Math.max(here ? 4 : 0, 100 * most)}%` } }));
    }
    return box;
  }

  function steps(cell) {
    const fate = cell.masked ? `${cell.column} > ${cell.row}: in the future, so −∞`
      : cell.column > cell.row ? `${cell.column} > ${cell.row}: would be hidden; WHAT IF it is not`
        : `${cell.column} ≤ ${cell.row}: may be seen`;
    const keys = cell.causal ? `keys 0 to ${cell.row}` : `all ${cell.context} keys, no mask`, n = cell.q.length;
    const power = cell.masked ? "exp(−∞) = " : `exp(${asNumber(cell.score)} − ${asNumber(cell.row_max)}) = `;
    return element("table", { style: { borderCollapse: "collapse", marginTop: "2px" } },
      line("q · k", [bold(asNumber(cell.dot)), `  sum of ${n} products`]),
      line("× scale", [`${asNumber(cell.dot)} · ${cell.scaled ? asNumber(cell.scale) : "1"} = `, bold(asNumber(cell.score)),
        cell.scaled ? `  (1/√${n})` : "  (scale off)"], "scores grow with the number of products; the scale takes that back"),
      line("mask", fate),
      line("row maximum", `m = ${asNumber(cell.row_max)}  of ${keys}`, "taken off so that exp cannot overflow; it cancels"),
      line("numerator", [power, bold(asNumber(cell.exp))]),
      line("denominator", `Σ exp = ${asNumber(cell.denominator)}`),
      line("weight", [`${asNumber(cell.exp)} / ${asNumber(cell.denominator)} = `, bold(asNumber(cell.weight))]));
  }

  return {
    node,
    message(text) {
      node.replaceChildren(element("div", { class: "tv-muted", style: { padding: ".5em 0" }, text }));
      delete node.dataset.cell;
    },
    show(cell, tokens) {
      const name = (position) => bold(`“${visibleText(tokens[position] || "")}”`);
      const where = `  layer ${cell.layer}, head ${cell.head}, keys of KV head ${cell.kv_head}`;
      const whatIf = element("div", { text: whatIfWords(cell.causal, cell.scaled), hidden: cell.causal && cell.scaled,
        style: { color: "#fff", background: "#7a4a00", padding: "0 .5em", borderRadius: "4px", width: "fit-content" } });
      node.replaceChildren(
        element("div", { style: { marginBottom: "2px" } }, name(cell.row), ` at ${cell.row} looks at `, name(cell.column),
          ` at ${cell.column}`, element("span", { class: "tv-muted", text: where })),
        whatIf, products(cell), steps(cell), numerators(cell));
      const { dot, score, weight, masked, denominator, exp } = cell;
      Object.assign(node.dataset, { cell: [cell.layer, cell.head, cell.row, cell.column].join(","), dot, score, weight,
        masked, denominator, exp });
    },
  };
}
