// TensorFile: the byte ruler of a safetensors file; a tensor of it as a heat map; a row of that; its bytes; its bits.

const TENSOR_FILE_STYLE = `
.tf-legend, .tf-note { font-size: .85em; margin: 2px 0; }
.tf-kinds { display: flex; flex-wrap: wrap; gap: .2em 1.1em; margin: 2px 0; }
.tf-kinds canvas { width: 1em; height: 1em; margin-right: .35em; vertical-align: -.12em; border-radius: 2px; }
.tf-facts { margin: calc(6px * var(--tv-scale, 1)) 0; overflow-wrap: anywhere; }
.tf-facts b { font-size: 1.08em; }
.tf-values { display: flex; flex-wrap: wrap; gap: calc(5px * var(--tv-scale, 1)); margin: calc(5px * var(--tv-scale, 1)) 0; align-items: stretch; }
.tf-value { font: inherit; color: inherit; background: none; padding: 2px .5em; min-width: 6.6em; text-align: center; cursor: pointer;
  border: 1px solid var(--jp-border-color1, #bdbdbd); border-radius: 4px; }
.tf-value[aria-pressed="true"] { border: 2px solid var(--jp-brand-color1, #1565c0); background: var(--jp-layout-color2, #eee); }
.tf-value div:nth-child(2) { font-weight: 600; font-size: 1.1em; }
.tf-json { margin: 4px 0 0; max-height: calc(11em * 1.0); overflow: auto; padding: 4px 8px; border: 1px solid var(--jp-border-color1, #bdbdbd); border-radius: 4px; font-size: .92em; }
.tf-json div { white-space: pre-wrap; overflow-wrap: anywhere; padding-left: 1.2em; text-indent: -1.2em; cursor: pointer; }
.tf-json div[aria-current="true"] { background: #F0E442; color: #000; }
.tf-select { max-width: 100%; }
.tf-body [hidden] { display: none; }
`;

async function render({ model, el }) {
  const ui = await panel(model, el, "The model's file, byte by byte",
    "Click a part of the file, then an element of its heat map, then a value: it opens in BitLens. On the rulers: arrow keys from tensor to tensor, + and \u2212 zoom, 0 shows all, Enter goes in.");
  ui.root.prepend(element("style", { text: TENSOR_FILE_STYLE }));
  ui.body.classList.add("tf-body");
  const key = () => ({ key: model.get("key"), file: told ? told.file : model.get("file") });
  let told = null, parts = [], part = null, at = [0, 0], shownBytes = 0;
  let saving = false;  // several traits change together: nobody looks at them in between
  const save = (what) => {
    saving = true;
    for (const [name, value] of Object.entries(what)) model.set(name, value);
    saving = false;
    model.save_changes();
  };

  // ---- the file and its parts ----

  const files = element("select", { class: "tv-select tf-select", "aria-label": "file", hidden: true });
  const choice = element("select", { class: "tv-select tf-select", "aria-label": "part of the file" });
  files.addEventListener("change", () => { save({ file: files.value, tensor: "", row: 0, column: 0 }); load(); });
  choice.addEventListener("change", () => choose(parts[choice.selectedIndex]));
  const bytesAt = async (begin, count) => (await ui.ask("tensor_bytes", { ...key(), begin, count })).bytes;
  const kinds = element("div", { class: "tf-kinds" });
  const ruler = byteRuler(ui, { pick: (chosen) => choose(chosen), open: (chosen) => { ruler.zoomTo(chosen); heat.node.focus({ preventScroll: true }); }, bytes: bytesAt });
  ui.tools.append(files, choice, button("whole file", "Show all of the file", ruler.all), button("zoom to it", "Fill the ruler with the selected part", () => part && ruler.zoomTo(part)),
    button("+", "Zoom in", ruler.zoomIn, { "aria-label": "zoom in" }), button("\u2212", "Zoom out", ruler.zoomOut, { "aria-label": "zoom out" }));
  const facts = element("div", { class: "tf-facts" });
  ui.body.append(kinds, facts);
  const heat = heatMap(ui, {
    load: (rows, columns, most_rows, most_columns) => ui.ask("tensor_heat", { ...key(), name: part.name, rows, columns, most_rows, most_columns }),
    pick: (row, column) => choose(part, row, column), open: () => inspect(),
  });
  const values = element("div", { class: "tf-values", role: "group", "aria-label": "values of the row" });
  const json = element("div", { class: "tf-json tv-mono", tabindex: "0", role: "region", "aria-label": "JSON header of the file" });
  ui.body.append(values, json);

  async function load() {
    let answer;
    try { answer = await ui.ask("tensor_file", { key: model.get("key"), file: model.get("file") }); }
    catch (error) { fail(error); return; }
    told = answer;
    ui.complain(null);
    parts = [
      { name: "header length", label: "8 bytes", kind: "length", begin: 0, end: 8 },
      { name: "JSON header", label: "JSON", kind: "header", begin: 8, end: told.data_start },
      ...told.tensors.map((tensor) => ({ ...tensor, label: shortName(tensor.name) })),
    ];
    files.hidden = told.files.length < 2;
    files.replaceChildren(...told.files.map((name) => element("option", { text: name, value: name, selected: name === told.file })));
    choice.replaceChildren(...parts.map(({ name }) => element("option", { text: name })));
    showKinds();
    showJson();
    ruler.set(parts, told.size);
    Object.assign(ui.root.dataset, { file: told.file, size: told.size, parts: parts.length });
    const wanted = parts.find(({ name }) => name === model.get("tensor"));
    choose(wanted || parts[0], wanted ? model.get("row") : 0, wanted ? model.get("column") : 0);
  }
  function fail(error) {
    told = part = null;
    parts = [];
    ruler.set([], 1);
    for (const node of [kinds, facts, values, json, choice]) node.replaceChildren();
    heat.hide(true);
    ui.root.dataset.parts = 0;
    ui.complain(error);
  }
  const shortName = (name) => name.replace(/^model\./, "").replace(/^layers\./, "").replace(/\.weight$/, "");

  function showKinds() {
    const there = new Set(parts.map(({ kind }) => kind));
    kinds.replaceChildren(...Object.entries(PART_LOOKS).filter(([kind]) => there.has(kind)).map(([kind, look]) => {
      const swatch = element("canvas", { width: 14, height: 14 }), ctx = swatch.getContext("2d");
      ctx.fillStyle = hatched(ctx, look.colour, look.hatch);
      ctx.fillRect(0, 0, 14, 14);
      const size = parts.filter((p) => p.kind === kind).reduce((sum, p) => sum + p.end - p.begin, 0);
      return element("span", {}, swatch, `${look.title} ${percent(size)}`);
    }));
  }
  const percent = (size) => { const p = (100 * size) / told.size; return `${p >= 1 ? p.toFixed(1) : p.toPrecision(2)} %`; };

  // The header as it stands in the file, one tensor a line.
  function showJson() {
    const line = (name, text) => {
      const node = element("div", { text, "data-name": name });
      node.addEventListener("click", () => { const found = parts.find((p) => p.name === name); if (found) choose(found); });
      return node;
    };
    if (told.header === null) { json.replaceChildren(line("JSON header", "This header is too long to show.")); return; }
    const entries = Object.entries(JSON.parse(told.header)), most = 2000;
    const lines = entries.slice(0, most).map(([name, entry], i) =>
      line(name, `${JSON.stringify(name)}: ${JSON.stringify(entry).replace(/([:,])(?=\S)/g, "$1 ")}${i < entries.length - 1 ? "," : ""}`));
    json.replaceChildren(line("JSON header", "{"), ...lines, line("JSON header", entries.length > most ? `... and ${asCount(entries.length - most)} more }` : "}"));
  }

  // ---- what is selected ----

  // tell: whether the notebook hears of it; what the notebook itself has set is not said back.
  function choose(chosen, row = 0, column = 0, tell = true) {
    if (!chosen || !told) return;
    const isTensor = chosen.dtype !== undefined, isNew = chosen !== part;
    part = chosen;
    at = isTensor ? [clamp(row, chosen.rows), clamp(column, chosen.columns)] : [0, 0];
    choice.selectedIndex = parts.indexOf(part);
    ruler.select(part);
    showFacts();
    if (isNew) {
      heat.hide(!isTensor);
      if (isTensor) heat.set(chosen.item_size ? chosen.rows : 0, chosen.item_size ? chosen.columns : 0);
      for (const node of json.children) node.setAttribute("aria-current", String(node.dataset.name === part.name || (part.kind === "header" && node.dataset.name === "JSON header")));
      scrollJson();
      const layer = /layers\.(\d+)\./.exec(part.name);
      if (layer) ui.client.select({ layer: Number(layer[1]) });
    }
    if (isTensor) heat.select(...at);
    if (tell) save({ file: told.file, tensor: isTensor ? part.name : "", row: at[0], column: at[1] });
    showValues();
  }
  function scrollJson() {
    const current = json.querySelector("[aria-current=true]");
    if (current) json.scrollTop = current.offsetTop - json.offsetTop - json.clientHeight / 2;
  }
  const clamp = (n, size) => Math.min(Math.max(n, 0), Math.max(size - 1, 0));

  function showFacts() {
    const size = part.end - part.begin, words = [`bytes ${asCount(part.begin)} to ${asCount(part.end - 1)}`, `${asBytes(size)}, ${percent(size)} of the file`];
    if (part.dtype !== undefined) words.unshift(`${part.dtype} [${part.shape.join(", ")}]`, `${asCount(part.rows * part.columns)} values`);
    if (part.kind === "length") words.push(`says how long the JSON header is: ${asCount(told.header_length)} bytes, the lowest byte first`);
    if (part.kind === "header") words.push(`${asCount(told.tensors.length)} tensors; their data_offsets count from byte ${asCount(told.data_start)}`);
    facts.replaceChildren(element("b", { text: part.name }), ` · ${words.join(" · ")}`);
    Object.assign(facts.dataset, { name: part.name, begin: part.begin, end: part.end });
    ui.say(`${part.name}: ${words.join(", ")}`);
  }

  // A stretch of the row as it stands in the file: place, bytes in hexadecimal, value.
  async function showValues() {
    const mine = ++shownBytes, now = part, [row, column] = at;
    const isTensor = now.dtype !== undefined, item = isTensor ? now.item_size : 8;
    if (isTensor && (!item || now.begin === now.end)) { values.replaceChildren(); return; }
    const room = Math.max(3, Math.floor((ui.body.clientWidth || 800) / (96 * ui.scale)));
    const first = isTensor ? clamp(Math.min(column - (room >> 1), now.columns - room), now.columns) : 0;
    const count = isTensor ? Math.min(room, now.columns - first) : 1;
    const begin = isTensor ? now.begin + (row * now.columns + first) * item : now.begin;
    let data;
    try { data = await bytesAt(begin, now.kind === "header" ? 48 : count * item); } catch (error) { ui.complain(error); return; }
    if (mine !== shownBytes) return;
    if (!isTensor) { showRaw(now, begin, data); return; }
    values.replaceChildren(...Array.from({ length: count }, (_, i) => valueButton(now, row, first + i, begin + i * item, data.subarray(i * item, (i + 1) * item))));
  }
  const hexOf = (data) => Array.from(data, (b) => b.toString(16).padStart(2, "0")).join(" ");
  function valueButton(tensor, row, column, offset, data) {
    const bits = data.reduceRight((sum, b) => sum * 256 + b, 0), format = FORMATS[tensor.format];  // the lowest byte first
    let value = "";
    if (format) {
      const real = format.decode(bits);
      value = real.kind === "finite" ? withMinus(shortDecimal(real, 6)) : withMinus(realText(real));
    }
    const place = tensor.shape.length > 1 ? `[${row}, ${column}]` : `[${column}]`;
    const node = element("button", { class: "tf-value tv-mono", type: "button", "aria-pressed": String(column === at[1]),
      title: `byte ${asCount(offset)} of ${told.file}${format ? "; click: open its bits" : ""}`,
      "data-offset": offset, "data-hex": hexOf(data), "data-bits": format ? bits : null, "data-row": row, "data-column": column },
    element("div", { class: "tv-muted", text: place }), element("div", { text: hexOf(data) }), element("div", { text: value }));
    node.addEventListener("click", () => { choose(tensor, row, column); inspect(); });
    return node;
  }
  function showRaw(raw, begin, data) {
    const text = Array.from(data, (b) => b >= 32 && b < 127 ? String.fromCharCode(b) : "·").join("");
    const box = element("div", { class: "tv-mono", "data-offset": begin, "data-hex": hexOf(data) }, `${hexOf(data)}${raw.kind === "header" ? ` …  = ${text}…` : `  = ${asCount(told.header_length)}`}`);
    values.replaceChildren(box);
  }

  // Open the selected element in BitLens, with what the file holds there.
  async function inspect() {
    if (!part || !part.format) { if (part && part.dtype) ui.complain(`BitLens has no format for ${part.dtype}.`); return; }
    const [row, column] = at, tensor = part, offset = tensor.begin + (row * tensor.columns + column) * tensor.item_size;
    try {
      const data = await bytesAt(offset, tensor.item_size), isVector = tensor.shape.length < 2;
      ui.client.inspect({ kind: "weight", name: tensor.name, row: isVector ? column : row, column: isVector ? null : column,
        format: tensor.format, bits: data.reduceRight((sum, b) => sum * 256 + b, 0), file: told.file, offset });
    } catch (error) { ui.complain(error); }
  }

  // ---- what comes from outside ----

  ui.listen(model, "change:file", () => { if (!saving && (!told || model.get("file") !== told.file)) load(); });
  for (const name of ["tensor", "row", "column"]) {
    ui.listen(model, `change:${name}`, () => {
      if (saving) return;
      const wanted = model.get("tensor") ? parts.find((p) => p.name === model.get("tensor")) : part;
      const [row, column] = [model.get("row"), model.get("column")];
      if (wanted && (wanted !== part || row !== at[0] || column !== at[1])) choose(wanted, row, column, false);
      else if (model.get("tensor") && !wanted && told) ui.complain(`${told.file} has no tensor '${model.get("tensor")}'.`);
    });
  }
  // The same tensor of another layer, when that layer is selected elsewhere.
  ui.undo.push(ui.client.onSelection(() => {
    const { layer } = ui.client.selection;
    if (!part || !/layers\.\d+\./.test(part.name) || layer === null || layer === undefined) return;
    const twin = parts.find((p) => p.name === part.name.replace(/layers\.\d+\./, `layers.${layer}.`));
    if (twin && twin !== part) choose(twin, ...at);
  }));
  let width = 0;
  const resize = new ResizeObserver(() => {
    if (!part || Math.round(ui.body.clientWidth / ui.scale) === width) return;
    width = Math.round(ui.body.clientWidth / ui.scale);
    showValues();
    scrollJson();
  });
  resize.observe(ui.body);
  ui.undo.push(() => resize.disconnect());
  load();
  ui.subscribe("live_numbers", {}, { snapshot() {}, delta() {} });
  return ui.dispose;
}

export default { render };
