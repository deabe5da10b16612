// TokenTrail: a text as tokens, the merges behind them, and where a token goes from there.

const TOKEN_COLOURS = ["#9BD2F2", "#F3C66B", "#7CCFB3", "#E3B5CE", "#F4EC90"];
const MOST_SHOWN = 300; // of a request: the newest
const MODES = { text: ["Raw text", "the text as a prompt of its own"],
  chat: ["With chat template", "the text as a user's message, in the form that the model was trained on"],
  request: ["Selected request", "the tokens of the request that is selected, as they come"] };

async function render({ model, el }) {
  const ui = await panel(model, el, "TokenTrail", "Arrow keys: another token. Enter: its merges.");
  const { client } = ui;
  const modes = Object.entries(MODES).map(([mode, [text, title]]) => button(text, title, () => {
    model.set("mode", mode);
    model.save_changes();
  }, { "data-mode": mode }));
  const field = element("textarea", { class: "tv-input tv-trail-field", rows: 2, "aria-label": "text to cut into tokens",
    spellcheck: "false", placeholder: "Type something" });
  const count = element("div", { class: "tv-muted" });
  const strip = element("div", { class: "tv-trail-strip", role: "listbox", "aria-label": "tokens", "aria-orientation": "horizontal" });
  const merges = makeMerges(ui), path = makePath(ui);
  ui.tools.append(...modes);
  ui.body.append(field, count, strip, element("div", { class: "tv-trail-below" }, merges.node, path.node));

  let tokens = [];          // {id, text, hex, special, piece, at}
  let pieces = [], refusal = null, current = 0, firstShown = 0, drawn = null, hasChosen = false;
  let request = { request: null, blocks: [], tokens: [] };
  const mode = () => model.get("mode");
  const isRequest = () => mode() === "request";

  // ---- the strip ----

  const makeToken = (token) => {
    const node = element("span", { class: "tv-trail-token", role: "option", tabindex: "-1", "data-at": token.at, "data-id": token.id },
      element("span", { text: token.hex ? token.hex.toUpperCase() : token.text === null ? "?" : visibleText(token.text) || "∅" }),
      element("small", { text: token.id }));
    if (token.special) node.dataset.special = "";
    else node.style.backgroundColor = TOKEN_COLOURS[(token.piece === null ? token.at : token.piece) % TOKEN_COLOURS.length];
    if (token.piece !== null && token.at && tokens[token.at - 1]?.piece !== token.piece) node.dataset.begins = "";
    if (token.hex) node.dataset.split = "";
    node.setAttribute("aria-label", `${token.text === null ? "token" : token.text}, id ${token.id}`);
    return node;
  };
  const drawStrip = () => {
    drawn = tokens;
    firstShown = isRequest() ? Math.max(0, tokens.length - MOST_SHOWN) : 0;
    if (isRequest() && current < firstShown) firstShown = current;
    strip.replaceChildren(...tokens.slice(firstShown).map(makeToken));
    markComputed();
  };
  // Tokens were added to the same list: only they are drawn.
  const drawMore = () => {
    const isLong = tokens.length - firstShown > MOST_SHOWN * 2 && current >= tokens.length - MOST_SHOWN;
    if (tokens !== drawn || isLong) { drawStrip(); return; }
    strip.append(...tokens.slice(firstShown + strip.children.length).map(makeToken));
    markComputed();
  };
  const nodeAt = (at) => strip.children[at - firstShown];
  const markComputed = () => {
    if (!isRequest()) return;
    for (const node of strip.children) {
      const at = Number(node.dataset.at);
      node.toggleAttribute("data-pending", at >= request.computed);
      node.toggleAttribute("data-output", at >= request.prompt);
    }
  };
  const choose = (at, tell) => {
    current = Math.max(0, Math.min(tokens.length - 1, at));
    hasChosen = hasChosen || Boolean(tell);
    for (const node of strip.querySelectorAll("[aria-selected='true']")) {
      node.setAttribute("aria-selected", "false");
      node.tabIndex = -1;
    }
    const token = tokens[current], node = nodeAt(current);
    if (node) { node.setAttribute("aria-selected", "true"); node.tabIndex = 0; scrollWithin(strip, node); }
    strip.dataset.current = current;
    if (!token) { merges.show("", null, ""); path.show(null); return; }
    showMerges(token);
    path.show(token, tokens, request, beginsAlike(current));
    if (tell && request.request && beginsAlike(current)) client.select({ token: token.at });
  };
  // What to show before anybody has chosen: the word with the most to merge.
  const longest = () => {
    const length = (token) => token.special ? -1 : (token.text || "").length;
    return tokens.reduce((best, token, at) => length(token) > length(tokens[best]) ? at : best, 0);
  };
  const showMerges = (token) => {
    if (client.live.kind === "replay" && isRequest()) merges.show("Merges", null, "not recorded");
    else if (token.special) merges.show("Merges", null, "A special token is found as a whole before anything is merged.");
    else if (isRequest()) merges.show(`Token ${token.id} by itself`, { token_id: token.id });
    else if (refusal) merges.show("Merges", null, refusal);
    else if (pieces[token.piece]) {
      const [spelling, isAdded] = pieces[token.piece];
      merges.show(`The piece “${visibleText(textOfPiece(token.piece))}”`, isAdded ? null : { spelling }, "An added token is found as a whole.");
    }
  };
  const textOfPiece = (piece) => {
    const hex = tokens.filter((token) => token.piece === piece).map((token) => token.hex || asHex(token.text)).join(" ");
    return new TextDecoder().decode(Uint8Array.from(hex.split(" "), (byte) => parseInt(byte, 16)));
  };
  // Whether the selected request has the same tokens up to this one: only then are keys and values the same.
  const beginsAlike = (at) => {
    if (isRequest()) return true;
    for (let i = 0; i <= at; i++) if (!request.tokens[i] || request.tokens[i].id !== tokens[i].id) return false;
    return true;
  };

  // ---- from a text ----

  let busy = false, again = false;
  const encode = async () => {
    if (isRequest()) return;
    if (busy) { again = true; return; }
    busy = true;
    const text = model.get("text"), chat = mode() === "chat";
    try {
      const answer = await ui.ask("trail.encode", { text, chat });
      if (!isRequest()) {
        ui.complain(null);
        tokens = answer.tokens.map(([id, word, hex, special, piece], at) => ({ id, text: word, hex, special, piece, at }));
        ({ pieces, refusal } = answer);
        const more = answer.count - tokens.length, special = tokens.filter((token) => token.special).length;
        const bytes = new TextEncoder().encode(text).length;
        count.textContent = `${asCount([...text].length)} characters, ${asCount(bytes)} bytes → ${asCount(answer.count)} tokens`
          + (special ? `, ${special} of them special` : "") + (more > 0 ? `; the first ${asCount(tokens.length)} are shown` : "");
        Object.assign(strip.dataset, { count: answer.count, text: answer.rendered });
        drawStrip();
        choose(hasChosen ? Math.min(current, tokens.length - 1) : longest());
        ui.say(count.textContent);
      }
    } catch (error) {
      if (!isRequest()) { tokens = []; drawStrip(); choose(0); count.textContent = error.message; }
    }
    busy = false;
    if (again) { again = false; encode(); }
  };
  let saving = 0;
  ui.undo.push(() => clearTimeout(saving));
  field.addEventListener("input", () => {
    model.set("text", field.value);
    clearTimeout(saving);
    saving = setTimeout(() => model.save_changes(), 150);
  });
  field.addEventListener("keydown", (event) => event.stopPropagation());

  // ---- from a request ----

  const showRequest = () => {
    if (!isRequest()) { if (tokens[current]) path.showSlot(tokens[current], request, beginsAlike(current)); return; }
    tokens = request.tokens;
    const chosen = placeOf(client.selection.token);
    drawMore();
    const numPrompt = request.isPromptRecorded ? request.prompt : 0;
    count.textContent = !request.request ? "No request is selected: click one, for example in TokenRace."
      : `Request ${request.request}: ${asCount(request.prompt)} prompt tokens, ${asCount(tokens.length - numPrompt)} generated, `
      + `${asCount(request.computed)} computed` + (firstShown ? `; the last ${asCount(tokens.length - firstShown)} are shown` : "")
      + (request.isPromptRecorded ? "" : "; the prompt's ids were not recorded");
    strip.dataset.count = tokens.length;
    if (!tokens.length) choose(0);
    else if (chosen === null) { follow(); if (tokens[current]) path.showSlot(tokens[current], request, true); }
    else if (chosen !== current || strip.dataset.current === undefined) choose(chosen);
    else path.showSlot(tokens[current], request, true);
  };
  // Nothing is chosen: the newest token, five times a second at most, since each is looked up in the engine.
  let following = 0;
  const follow = () => {
    if (following) return;
    following = setTimeout(() => {
      following = 0;
      const isShown = nodeAt(current)?.getAttribute("aria-selected") === "true";  // else it was chosen before it was drawn
      if (isRequest() && placeOf(client.selection.token) === null && (current !== tokens.length - 1 || !isShown)) {
        choose(tokens.length - 1);
      }
    }, 200);
  };
  ui.undo.push(() => clearTimeout(following));
  // A position of the selected request as an index of `tokens`, or null.
  const placeOf = (position) => {
    const place = Number.isInteger(position) && tokens.length ? position - tokens[0].at : -1;
    return place >= 0 && place < tokens.length ? place : null;
  };
  const take = (value) => {
    if (value.begins) {
      request = { tokens: [], blocks: [] };
      if (isRequest()) delete strip.dataset.current;
    }
    const start = request.tokens.length;
    const offset = value.is_prompt_recorded === false ? value.prompt : 0;
    request = { ...request, request: value.request, status: value.status,
      prompt: value.prompt ?? 0, computed: value.computed ?? 0, cached: value.cached ?? 0,
      block_size: value.block_size, isPromptRecorded: value.is_prompt_recorded !== false };
    if (value.blocks) request.blocks = Array.from(value.blocks);
    Array.from(value.ids).forEach((id, i) => {
      const [text, hex, special] = value.tokens[i];
      request.tokens.push({ id, text, hex, special, piece: null, at: offset + start + i });
    });
    if (!wanted) wanted = requestAnimationFrame(() => { wanted = 0; showRequest(); });
  };
  let wanted = 0;
  ui.undo.push(() => cancelAnimationFrame(wanted));
  ui.subscribe("trail", {}, { snapshot: take, delta: take });

  // ---- hands ----

  strip.addEventListener("click", (event) => {
    const node = event.target.closest(".tv-trail-token");
    if (node) { choose([...strip.children].indexOf(node) + firstShown, true); node.focus({ preventScroll: true }); }
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step) { choose(current + step, true); nodeAt(current)?.focus({ preventScroll: true }); }
    else if (event.key === "Enter") merges.node.querySelector("input").focus({ preventScroll: true });
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  merges.node.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { nodeAt(current)?.focus({ preventScroll: true }); event.stopPropagation(); }
  });

  const setMode = () => {
    for (const node of modes) node.setAttribute("aria-pressed", node.dataset.mode === mode());
    field.hidden = isRequest();
    if (isRequest()) { delete strip.dataset.current; drawn = null; showRequest(); } else encode();
  };
  const setText = () => { if (field.value !== model.get("text")) field.value = model.get("text"); encode(); };
  const setHeight = () => { strip.style.maxHeight = `${ui.height}px`; };
  ui.listen(model, "change:mode", setMode);
  ui.listen(model, "change:text", setText);
  window.addEventListener("resize", setHeight);
  ui.undo.push(() => window.removeEventListener("resize", setHeight));
  ui.listen(model, "change:height", setHeight);
  ui.listen(model, "change:scale", setHeight);
  ui.undo.push(client.onSelection(() => {
    const place = placeOf(client.selection.token);
    if (isRequest() && place !== null && place !== current) choose(place);
  }));
  setHeight();
  field.value = model.get("text");
  setMode();
  return ui.dispose;
}

export default { render };
