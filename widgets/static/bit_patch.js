// The lens on a value of the running model: where it comes from, and for a weight: write, generate again, restore.

function weightPatching(ui, { addressLine, state, setBits, patternOf, letGo }) {
  const { client, model } = ui;
  let told = null;        // what `inspect` answered for state().address
  let patches = 0, busy = "", texts = {};  // texts: prompt typed -> {before, after}
  const write = button("write into the running model", "", () => act("writing", writeIt));
  const again = button("generate again", "Run the prompt once more, greedily, with the weights as they are", () => act("generating", () => generate()));
  const restore = button("restore", "Put every changed weight back", () => act("restoring", restoreIt));
  const prompt = element("input", { class: "tv-input", type: "text", value: model.get("prompt"), "aria-label": "prompt",
    placeholder: "prompt (empty: the newest)" });
  prompt.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Enter") again.click(); });
  const status = element("div", { class: "bl-rounding", role: "status" }), results = element("div", { class: "bl-texts" });
  const tools = element("div", { class: "bl-entry" }, write, prompt, again, restore);
  const node = element("div", { class: "bl-patch", hidden: true }, tools, status, results);
  ui.body.append(node);

  // ---- what is looked at ----

  async function look(address) {
    const { n, ...place } = address;
    told = null;
    if (place.bits !== undefined) setBits(FORMATS[place.format], place.bits, { address, seen: n });
    try {
      const answer = await ui.ask("inspect", place);
      if ((client.inspected.n || 0) > n) return;  // something else was clicked meanwhile
      told = answer;
      patches = answer.patches;
      setBits(FORMATS[answer.format], answer.bits, { address, seen: n });
    } catch (error) {
      if ((client.inspected.n || 0) > n) return;
      ui.complain(error);
    }
  }
  // The running model may change under the lens: look again soon after it has stepped, or when somebody comes back.
  let pending = 0, lastStep = null, looking = false;
  const soon = () => { pending = pending || setTimeout(() => { pending = 0; refresh(); }, 300); };
  async function refresh() {
    const { address } = state(), before = told;
    if (!address || !told || told.source !== "model" || busy || looking) return;
    const { n, ...place } = address;
    looking = true;
    let answer = null;
    try { answer = await ui.ask("inspect", place); } catch (error) { told.note = `no longer: ${error.message}`; }
    looking = false;
    if (state().address !== address || told !== before || busy) return;
    if (!answer) { show(); return; }
    const untouched = patternOf(FORMATS[told.format]) === told.bits && state().format.name === told.format;
    told = answer;
    patches = answer.patches;
    if (untouched && state().bits !== answer.bits) setBits(FORMATS[answer.format], answer.bits);
    else show();
  }
  function follow() {
    ui.root.addEventListener("pointerenter", soon);
    ui.root.addEventListener("focusin", soon);
    ui.undo.push(client.onLive((live) => { if (live.step !== lastStep) { lastStep = live.step; soon(); } }), () => clearTimeout(pending));
    const news = () => {
      const address = client.inspected;
      if (address.n && address.n > (state().seen || 0)) look(address);
    };
    ui.undo.push(client.onInspect(news), client.onLive(showStatus));
    if (state().address && !(client.inspected.n > state().seen)) look({ ...state().address, n: state().seen });  // page reloaded
    news();
  }

  // ---- what is done ----

  async function act(name, what) {
    if (busy) return;
    busy = name;
    show();
    try { await what(); ui.complain(null); } catch (error) { ui.complain(error); }
    busy = "";
    show();
  }
  const candidate = () => patternOf(FORMATS[told.format]);
  async function writeIt() {
    const { name, row, column } = state().address, bits = candidate();
    if (!patches && !texts[prompt.value.trim()]?.before) await generate().catch(() => {});  // to compare with; without a prompt, nothing
    const answer = await ui.ask("set_weight", { name, row, column: column ?? null, bits });
    if (told.loaded === null) told.loaded = answer.old;
    if (told.loaded === bits) told.loaded = null;
    told.bits = bits;
    patches = answer.patches;
  }
  async function restoreIt() {
    await ui.ask("restore_weights");
    patches = 0;
    if (told && told.loaded !== null) { told.bits = told.loaded; told.loaded = null; }
    if (told && told.editable) setBits(FORMATS[told.format], told.bits);
  }
  async function generate() {
    const typed = prompt.value.trim();
    const failed = new Promise((_, reject) => {
      const end = client.onLive((live) => { if (live.state === "failed") { end(); reject(new Error(`the engine stopped: ${live.error}`)); } });
    });
    const answer = await Promise.race([ui.ask("generate_again", { prompt: typed, max_tokens: model.get("max_tokens") }), failed]);
    const both = texts[typed] = texts[typed] || {};
    if (answer.patches) both.after = answer; else both.before = answer;
    patches = answer.patches;
    if (both.after && both.before && both.after.prompt !== both.before.prompt) delete both[answer.patches ? "before" : "after"];
  }

  // ---- showing it ----

  const weights = (n) => `${asCount(n)} ${n === 1 ? "weight" : "weights"}`;
  function showAddress() {
    addressLine.replaceChildren();
    const address = state().address;
    if (!address || !told) { addressLine.dataset.words = ""; return; }
    const format = FORMATS[told.format], parts = [];
    if (told.source === "model") parts.push(`${told.editable ? "in the running model" : "the engine's own bits"} ${format.hex(told.bits)}`);
    if (told.loaded !== null) parts.push(`loaded as ${format.hex(told.loaded)}`);
    if (address.offset !== undefined) {
      const size = FORMATS[address.format].numBits / 8;
      parts.push(`in ${address.file} ${FORMATS[address.format].hex(address.bits)}, bytes ${asCount(address.offset)} to ${asCount(address.offset + size - 1)}`);
    }
    if (told.note) parts.push(told.note);
    addressLine.append(element("b", { text: told.words }), element("span", { text: parts.length ? ` · ${parts.join(" · ")} ` : " " }),
      button("let go", "Look at numbers of your own again", letGo));
    Object.assign(addressLine.dataset, { words: told.words, source: told.source, bits: told.bits });
  }
  function showStatus() {
    const parts = [];
    if (busy) parts.push(client.live.state === "paused" && busy !== "writing" ? "waiting: the engine is paused, let it run" : `${busy} …`);
    if (patches) parts.push(`${weights(patches)} of the running model ${patches === 1 ? "is" : "are"} not as loaded`);
    status.textContent = parts.join(" · ");
  }
  function showTexts() {
    const { before, after } = texts[prompt.value.trim()] || {};
    results.replaceChildren();
    Object.assign(results.dataset, { before: before ? before.text : "", after: after ? after.text : "" });
    let same = 0;
    if (before && after) while (same < Math.max(before.text.length, after.text.length) && before.text[same] === after.text[same]) same++;
    const differs = before && after && before.text !== after.text;
    const box = (title, answer) => {
      const shown = element("div", { class: "bl-text" }, element("b", { text: title }));
      if (!answer) shown.append(element("span", { class: "tv-muted", text: "not generated yet" }));
      else if (!differs) shown.append(answer.text || "(no text)");
      else shown.append(answer.text.slice(0, same), element("mark", { text: answer.text.slice(same) }));
      if (answer && answer.finish_reason === "abort") shown.append(element("span", { class: "tv-muted", text: " (ended early)" }));
      return shown;
    };
    if (!before && !after) return;
    results.append(box("weights as loaded", before), box(after ? `with ${weights(after.patches)} changed` : "with a weight changed", after));
    if (before && after) results.append(element("div", { class: "bl-rounding", style: { flexBasis: "100%" }, text: differs ? `The texts part after ${asCount(same)} characters.` : "The same text." }));
  }
  function show() {
    if (!state().address) told = null;
    showAddress();
    node.hidden = !(told && told.editable) && !patches;
    if (node.hidden) return;
    const canWrite = told && told.editable && state().address, same = canWrite && candidate() === told.bits;
    write.disabled = Boolean(busy) || !canWrite || same;
    write.title = !canWrite ? "No weight is being looked at" : same ? "Toggle a bit first: the running model has these bits" : `Write ${FORMATS[told.format].hex(candidate())} over ${FORMATS[told.format].hex(told.bits)}`;
    again.disabled = Boolean(busy);
    restore.disabled = Boolean(busy) || !patches;
    node.dataset.patches = patches;
    node.dataset.busy = busy;
    showStatus();
    showTexts();
  }
  prompt.addEventListener("input", show);
  ui.listen(model, "change:prompt", () => { prompt.value = model.get("prompt"); show(); });
  return { look, follow, show };
}
