// BitLens: a number in several formats, bit by bit. What is where in a pattern, and all rounding, is in formats.js.

const FIELDS = [["sign", "#D55E00"], ["exponent", "#009E73"], ["mantissa", "#0072B2"]];

const BIT_LENS_STYLE = `
.bl-entry, .bl-special, .bl-near { display: flex; flex-wrap: wrap; align-items: center; gap: calc(6px * var(--tv-scale, 1)); margin: calc(4px * var(--tv-scale, 1)) 0; }
.bl-entry .tv-input { width: 14em; max-width: 100%; padding: 0 .5em; }
.bl-legend { display: flex; flex-wrap: wrap; gap: 1em; margin-left: auto; }
.bl-swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.bl-row { display: flex; flex-wrap: wrap; gap: calc(4px * var(--tv-scale, 1)) calc(14px * var(--tv-scale, 1)); align-items: center;
  padding: calc(5px * var(--tv-scale, 1)) calc(6px * var(--tv-scale, 1)); border-left: calc(4px * var(--tv-scale, 1)) solid transparent; }
.bl-row[data-active="true"] { border-left-color: var(--jp-brand-color1, #1565c0); background: color-mix(in srgb, var(--jp-layout-color2, #eee) 45%, transparent); }
.bl-name { width: 8.2em; text-align: left; }
.bl-bits { display: flex; gap: calc(7px * var(--tv-scale, 1)); }
.bl-field { display: flex; flex-direction: column; align-items: center; }
.bl-cells { display: flex; }
.bl-bit { box-sizing: border-box; width: var(--bl-cell); height: calc(var(--bl-cell) * 1.3); padding: 0; margin: 0; cursor: pointer;
  font: 600 calc(var(--bl-cell) * .68)/1 var(--jp-code-font-family, ui-monospace, monospace); border: 1px solid; border-radius: 3px; }
.bl-caption { font-size: .8em; white-space: nowrap; color: var(--tv-muted); }
.bl-words { flex: 1 1 22em; min-width: min(22em, 100%); }
.bl-value { font-weight: 600; overflow-wrap: anywhere; }
.bl-rounding { color: var(--tv-muted); font-size: .92em; }
.bl-address { padding: calc(4px * var(--tv-scale, 1)) calc(8px * var(--tv-scale, 1)); margin: 4px 0; border-left: calc(4px * var(--tv-scale, 1)) solid #CC79A7; overflow-wrap: anywhere; }
.bl-address:empty, .bl-patch[hidden] { display: none; }
.bl-texts { display: flex; flex-wrap: wrap; gap: calc(10px * var(--tv-scale, 1)); }
.bl-text { flex: 1 1 18em; padding: 6px 8px; border: 1px solid var(--jp-border-color1, #bdbdbd); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
.bl-text b { display: block; }
.bl-text mark { color: inherit; background: none; border-bottom: calc(3px * var(--tv-scale, 1)) solid #E69F00; }
.bl-patch .tv-input { flex: 1 1 16em; padding: 0 .5em; }
`;

async function render({ model, el }) {
  const ui = await panel(model, el, "Bits of a number",
    "Click a bit, or move with the arrow keys and press space. A format's name takes it apart below. On the number line: click a tick, or arrow keys; + and \u2212 zoom.");
  ui.root.prepend(element("style", { text: BIT_LENS_STYLE }));
  ui.root.classList.add("bl");
  let state = {};   // {format, bits, real, text, address, seen}
  const rows = new Map();

  // ---- the number ----

  const patternOf = (format) => format === state.format ? state.bits : format.encode(state.real);
  function setBits(format, bits, more) {
    const real = format.decode(bits);
    change({ format, bits, real, text: realText(real), ...more });
  }
  function setReal(real, text) { change({ real, text, bits: state.format.encode(real) }); }
  function change(what, tell = true) {
    state = { ...state, ...what };
    ui.complain(null);
    if (tell) {
      const { format, bits, text, address, seen } = state;
      model.set("shown", { format: format.name, bits, value: text, address: address || null, seen: seen || 0 });
      model.save_changes();
    }
    show();
  }
  function readShown() {
    const { format, bits, value, address, seen } = model.get("shown");
    if (state.format && state.format.name === format && state.bits === bits && state.text === value && !address === !state.address) return;
    const real = FORMATS[format].kind(bits) === "nan" ? FORMATS[format].decode(bits) : parseReal(value);
    change({ format: FORMATS[format], bits, real, text: value, address, seen }, false);
  }

  // ---- entry and special values ----

  const input = element("input", { class: "tv-input tv-mono", type: "text", spellcheck: "false", "aria-label": "a number, or 0x and a pattern" });
  const read = () => {
    const said = input.value.trim();
    if (said === state.text) return;
    try {
      if (/^0x[0-9a-f]+$/i.test(said)) {
        const bits = Number(said);
        if (!(bits < 2 ** state.format.numBits)) throw new Error(`${said} has more than the ${state.format.numBits} bits of ${state.format.title}`);
        setBits(state.format, bits);
      } else setReal(parseReal(said), said);
    } catch (error) { ui.complain(error); }
  };
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") read();
    if (event.key === "Escape") { input.value = state.text; ui.complain(null); }
  });
  input.addEventListener("change", read);
  ui.body.append(element("div", { class: "bl-entry" }, element("label", { text: "number" }), input,
    element("span", { class: "tv-muted", text: "0.1   1/3   2^-133   nan   0x3F80" }),
    element("span", { class: "bl-legend" }, ...FIELDS.map(([field, colour]) =>
      element("span", {}, element("span", { class: "bl-swatch", style: { background: colour } }), field)))));

  const special = element("div", { class: "bl-special" });
  const SPECIAL = [["0", () => 0], ["\u22120", (f) => f.signBit], ["smallest", () => 1], ["largest subnormal", (f) => f.hidden - 1],
    ["smallest normal", (f) => f.hidden], ["1", (f) => f.bias * f.hidden], ["largest", (f) => f.largest],
    ["∞", (f) => f.infinity], ["NaN", (f) => f.nan], ["NaN with payload", (f) => f.hasInfinity ? f.nan + 1 : null]];
  const specialButtons = SPECIAL.map(([name, pattern]) => {
    const node = button(name, "", () => setBits(state.format, pattern(state.format)));
    node.dataset.special = name;
    special.append(node);
    return [node, name, pattern];
  });
  const eight = button("fp8", "Show the two 8-bit formats as well", () => {
    const has = model.get("formats").includes("e4m3");
    const without = model.get("formats").filter((name) => name !== "e4m3" && name !== "e5m2");
    model.set("formats", has && without.length ? without : [...without, "e4m3", "e5m2"]);
    model.save_changes();
  });
  ui.tools.append(eight);

  // ---- one row a format ----

  const list = element("div", { class: "bl-rows" });
  const addressLine = element("div", { class: "bl-address" });
  ui.body.append(addressLine, list, special);

  function makeRow(format) {
    const bits = [];
    const fields = FIELDS.map(([field, colour], k) => {
      const cells = element("div", { class: "bl-cells" });
      const count = [1, format.exponentBits, format.mantissaBits][k];
      for (let i = 0; i < count; i++) {
        const place = format.numBits - 1 - bits.length;  // 0 is the last bit
        const cell = element("button", { class: "bl-bit", type: "button", tabindex: "-1", "data-place": place });
        cell.addEventListener("click", () => {
          const now = patternOf(format), one = 2 ** place;
          setBits(format, Math.floor(now / one) % 2 ? now - one : now + one);
          rove(format, bits.indexOf(cell), false);
        });
        cell.addEventListener("keydown", (event) => moveFocus(event, format, bits.indexOf(cell)));
        cells.append(cell);
        bits.push(cell);
        cell.colour = colour;
        cell.field = field;
      }
      const caption = element("div", { class: "bl-caption" });
      return { node: element("div", { class: "bl-field" }, cells, caption), caption };
    });
    const name = button(format.title, `Take ${format.title} apart below`, () => setActive(format), { class: "tv-button bl-name" });
    const value = element("div", { class: "bl-value tv-mono" }), rounding = element("div", { class: "bl-rounding" });
    const node = element("div", { class: "bl-row", role: "group", "aria-label": format.title, "data-format": format.name },
      name, element("div", { class: "bl-bits" }, ...fields.map((f) => f.node)), element("div", { class: "bl-words" }, value, rounding));
    return { node, name, bits, captions: fields.map((f) => f.caption), value, rounding, roving: 0 };
  }
  // Only one bit of a row is a tab stop; the arrow keys go on from there.
  function rove(format, index, focus = true) {
    const row = rows.get(format.name);
    row.bits[row.roving].tabIndex = -1;
    row.roving = Math.min(Math.max(index, 0), row.bits.length - 1);
    row.bits[row.roving].tabIndex = 0;
    if (focus) row.bits[row.roving].focus();
  }
  function moveFocus(event, format, index) {
    const names = model.get("formats"), at = names.indexOf(format.name);
    if (event.key === "ArrowLeft") rove(format, index - 1);
    else if (event.key === "ArrowRight") rove(format, index + 1);
    else if (event.key === "Home") rove(format, 0);
    else if (event.key === "End") rove(format, format.numBits - 1);
    else if (event.key === "ArrowUp" && at > 0) rove(FORMATS[names[at - 1]], index);
    else if (event.key === "ArrowDown" && at < names.length - 1) rove(FORMATS[names[at + 1]], index);
    else if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    event.stopPropagation();
  }
  function setActive(format) { change({ format, bits: patternOf(format) }); }
  function makeRows() {
    rows.clear();
    for (const name of model.get("formats")) rows.set(name, makeRow(FORMATS[name]));
    list.replaceChildren(...[...rows.values()].map((row) => row.node));
    for (const row of rows.values()) row.bits[0].tabIndex = 0;
    eight.setAttribute("aria-pressed", String(model.get("formats").includes("e4m3")));
    fit();
  }
  // The widest format decides how large a bit can be.
  function fit() {
    const widest = Math.max(...model.get("formats").map((name) => FORMATS[name].numBits));
    const room = (ui.body.clientWidth || 800) - 40 * ui.scale;
    ui.root.style.setProperty("--bl-cell", `${Math.max(9, Math.min(24 * ui.scale, Math.floor(room / widest)))}px`);
  }

  // ---- showing it ----

  function showRow(format, row) {
    const bits = patternOf(format), kind = format.kind(bits), text = bits.toString(2).padStart(format.numBits, "0");
    row.node.dataset.bits = bits;
    row.node.dataset.kind = kind;
    row.node.dataset.active = String(format === state.format);
    row.name.setAttribute("aria-pressed", String(format === state.format));
    row.bits.forEach((cell, i) => {
      const one = text[i] === "1", ink = theme.ink;
      if (cell.textContent !== text[i]) cell.textContent = text[i];
      Object.assign(cell.style, { background: one ? cell.colour : "transparent", color: one ? inkOn(cell.colour) : ink, borderColor: cell.colour });
      cell.setAttribute("aria-label", `${cell.field} bit ${cell.dataset.place} is ${text[i]}`);
      cell.setAttribute("aria-pressed", String(one));
    });
    const [sign, exponent, mantissa] = format.parts(bits), stored = Math.max(exponent, 1) - format.bias;
    row.captions[0].textContent = sign ? "\u2212" : "+";
    row.captions[1].textContent = kind === "infinity" || kind === "nan" ? "all ones" : exponent
      ? `${exponent} \u2212 ${format.bias} = ${withMinus(String(stored))}` : `0 means ${withMinus(String(stored))}`;
    row.captions[2].textContent = kind === "nan" ? "" : `${mantissa} / ${format.hidden}`;
    row.value.textContent = `${format.hex(bits)}  ${valueText(format, bits, kind)}`;
    row.value.title = kind === "infinity" || kind === "nan" ? "" : exactDecimal(format.decode(bits));
    row.rounding.textContent = roundingText(format, bits, kind);
  }

  function valueText(format, bits, kind) {
    const sign = bits >= format.signBit ? "\u2212" : "";
    if (kind === "infinity") return `${sign}∞`;
    if (kind === "nan") {
      const quietBit = format.hidden / 2, mantissa = format.parts(bits)[2];
      if (!format.hasInfinity) return "NaN (the only one)";
      return `NaN, ${mantissa >= quietBit ? "quiet" : "signalling"}, payload ${mantissa % quietBit}`;
    }
    if (kind === "zero") return `= ${sign}0`;
    const real = format.decode(bits), exact = exactDecimal(real), [n, p] = format.integerAndPower(bits);
    const [, exponent, mantissa] = format.parts(bits), digits = mantissa.toString(2).padStart(format.mantissaBits, "0");
    const decimal = exact.length <= 22 ? `= ${exact}` : `≈ ${shortDecimal(real)}`;
    const lead = exponent ? 1 : 0, power = Math.max(exponent, 1) - format.bias;
    const binary = format.mantissaBits <= 10 ? ` = ${sign}${lead}.${digits}₂ × 2${superscript(power)}` : "";
    return `${withMinus(decimal)} = ${sign}${n} × 2${superscript(p)}${binary}${kind === "subnormal" ? " (subnormal)" : ""}`;
  }

  function off(format, real, bits) {
    const error = minus(format.decode(bits), real);
    if (error.num === 0n) return "exact";
    const size = approximately(error), own = approximately(real), power = format.ulpPower(bits);
    const plain = (x) => Math.abs(x) >= 0.001 ? Number(Math.abs(x).toPrecision(3)) : Math.abs(x).toExponential(1);
    const signed = (x) => `${x < 0 ? "\u2212" : "+"}${plain(x)}`;
    const decimal = withMinus(shortDecimal(error, 3)), plus = error.negative ? "" : "+";
    return `${plus}${decimal} (${signed(size / 2 ** power)} ulp${own ? `, ${signed((100 * size) / Math.abs(own))} %` : ""})`;
  }

  function roundingText(format, bits, kind) {
    const real = state.real;
    if (real.kind !== "finite") return format === state.format || kind === real.kind ? "" : `has no ${real.kind}`;
    if (kind === "infinity" || kind === "nan") return `${state.text} is beyond ${shortDecimal(format.decode(format.largest), 5)}, the largest number`;
    const nearest = off(format, real, bits), cut = format.encode(real, true);
    if (nearest === "exact") return format === state.format ? "" : "exact: nothing is lost";
    if (cut === bits) return `rounded: ${nearest}; cut off: the same`;
    return `rounded: ${nearest}; cut off: ${format.hex(cut)} ${off(format, real, cut)}`;
  }

  // ---- the chosen format on the number line ----

  const near = element("div", { class: "bl-near" });
  ui.body.append(near);
  const line = numberLine(ui, { state: () => state, pick: (bits) => setBits(state.format, bits) });
  const nearText = element("span", { class: "tv-mono" });
  near.append(button("◀", "The next number below", () => line.step(-1), { "aria-label": "next number below" }),
    button("▶", "The next number above", () => line.step(1), { "aria-label": "next number above" }),
    button("+", "Zoom in", line.zoomIn, { "aria-label": "zoom in" }), button("\u2212", "Zoom out", line.zoomOut, { "aria-label": "zoom out" }), nearText);

  function showNear() {
    const { format, bits } = state, power = format.ulpPower(bits);
    const name = (pattern) => pattern === null ? "nothing" : format.kind(pattern) === "infinity"
      ? (pattern >= format.signBit ? "\u2212∞" : "∞") : withMinus(shortDecimal(format.decode(pattern)));
    const [below, above] = format.neighbours(bits);
    nearText.textContent = power === null && below === null && above === null ? `${format.title}: NaN has no neighbours`
      : `${format.title}: below ${name(below)}, above ${name(above)}${power === null ? "" : `, 1 ulp = 2${superscript(power)} = ${shortDecimal(finite(false, 1n, 1n, power), 6)}`}`;
    Object.assign(near.dataset, { below: below ?? "", above: above ?? "", ulp: power ?? "" });
    for (const [node, label, pattern] of specialButtons) {
      const target = pattern(format);
      node.disabled = target === null;
      node.title = target === null ? `${format.title} has none` : `${format.hex(target)} in ${format.title}`;
      node.setAttribute("aria-pressed", String(target === bits));
      node.setAttribute("aria-label", `${label} of ${format.title}`);
    }
  }

  function show() {
    theme.ink = theme(ui.root).text;
    if (document.activeElement !== input || input.value.trim() !== state.text) input.value = state.text;
    if (!rows.has(state.format.name)) makeRows();
    for (const [name, row] of rows) showRow(FORMATS[name], row);
    showNear();
    line.invalidate();
    patching.show();
    Object.assign(ui.root.dataset, { active: state.format.name, bits: state.bits, value: state.text });
    const row = rows.get(state.format.name);
    if (row) ui.say(`${state.format.title}: ${row.value.textContent}. ${row.rounding.textContent}`);
  }

  const patching = weightPatching(ui, { addressLine, state: () => state, setBits, patternOf, letGo: () => change({ address: null }) });
  makeRows();
  readShown();
  ui.listen(model, "change:shown", readShown);
  ui.listen(model, "change:formats", () => {
    if (!model.get("formats").includes(state.format.name)) setActive(FORMATS[model.get("formats")[0]]);
    makeRows();
    show();
  });
  ui.listen(model, "change:scale", () => { fit(); show(); });
  const resize = new ResizeObserver(fit);
  resize.observe(ui.body);
  ui.undo.push(() => resize.disconnect(), onTheme(show));
  patching.follow();
  ui.subscribe("live_numbers", {}, { snapshot() {}, delta() {} });
  return ui.dispose;
}

export default { render };
