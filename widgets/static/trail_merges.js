// How one piece of text is merged from bytes into tokens, step by step.

function makeMerges(ui) {
  const title = element("div"), caption = element("div", { "aria-live": "polite" });
  const row = element("div", { class: "tv-trail-symbols" }), list = element("ol", { class: "tv-trail-merges tv-mono" });
  const slider = element("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "merges done" });
  const go = (k) => { step = Math.max(0, Math.min(data.merges.length, k)); draw(); };
  const buttons = [button("|◀", "no merge yet", () => go(0)), button("◀", "one merge back", () => go(step - 1)),
    button("▶", "next merge", () => go(step + 1)), button("▶|", "all merges", () => go(Infinity))];
  slider.addEventListener("input", () => go(Number(slider.value)));
  const controls = element("div", { class: "tv-row" }, ...buttons.slice(0, 2), slider, ...buttons.slice(2));
  const node = element("div", { class: "tv-trail-half" }, title, controls, row, caption, list);
  let data = { merges: [] }, step = 0, asked = "";

  const words = (symbol) => {
    const [text, hex] = data.spelt[symbol];
    return text.includes("\uFFFD") ? hex : visibleText(text);
  };
  const symbolsAfter = (count) => {
    const symbols = [...data.symbols];
    for (const [at, left, right] of data.merges.slice(0, count)) symbols.splice(at, 2, left + right);
    return symbols;
  };
  const draw = () => {
    const { merges } = data, next = merges[step], last = merges[step - 1];
    const symbols = symbolsAfter(step), isDone = step === merges.length;
    slider.max = merges.length;
    slider.value = step;
    buttons[0].disabled = buttons[1].disabled = step === 0;
    buttons[2].disabled = buttons[3].disabled = isDone;
    row.replaceChildren(...symbols.map((symbol, i) => {
      const [text, hex] = data.spelt[symbol], joins = next && (i === next[0] || i === next[0] + 1);
      return element("span", { class: "tv-trail-symbol tv-mono", "data-joins": String(Boolean(joins)),
        "data-new": String(Boolean(last && i === last[0])),
        title: `bytes ${hex}${text.includes("\uFFFD") ? ": not whole characters" : ""}; spelt ${symbol} in tokenizer.json` },
      element("span", { text: words(symbol) }), element("small", { text: isDone ? data.ids[i] : symbol }));
    }));
    caption.textContent = next
      ? `Merge ${step + 1} of ${merges.length}: “${words(next[1])}” + “${words(next[2])}”, `
        + `rank ${asCount(next[3])} of ${asCount(data.num_merges)}, is the lowest of all pairs here.`
      : merges.length ? `Done: no pair that is left is in the list of merges. ${symbols.length === 1 ? "One token" : `${symbols.length} tokens`}.`
      : data.whole ? "It is one token as a whole: no merges." : "Nothing to merge: each byte is a token.";
    list.replaceChildren(...merges.map(([, left, right, rank], i) => element("li", { "data-done": String(i < step),
      "aria-current": i === step ? "step" : null, onclick: () => go(i + 1) },
    `${words(left)} + ${words(right)} → ${words(left + right)}`, element("small", { text: `  rank ${asCount(rank)}` }))));
    const at = list.querySelector("[aria-current]");
    if (at) scrollWithin(list, at);
    Object.assign(node.dataset, { step, steps: merges.length, symbols: JSON.stringify(symbols),
      ids: isDone ? JSON.stringify(data.ids) : "" });
  };
  const empty = (text) => {
    data = { symbols: [], merges: [], ids: [], spelt: {}, num_merges: 0, whole: true };
    step = 0;
    draw();
    caption.textContent = text;
    controls.hidden = true;
  };
  empty("");
  return {
    node,
    // what: {spelling} of a piece or {token_id}; heading: what it says above; or a text alone, why there is nothing.
    async show(heading, what, refusal) {
      title.textContent = heading;
      const key = JSON.stringify(what || refusal);
      if (key === asked) return;
      asked = key;
      if (!what) { empty(refusal); return; }
      try {
        const answer = await ui.ask("trail.merges", what);
        if (key !== asked) return;
        data = answer;
        controls.hidden = !data.merges.length;
        step = data.merges.length; // as it ends; the way there is one click off
        draw();
      } catch (error) { if (key === asked) empty(error.message); }
    },
  };
}

function scrollWithin(box, child) {
  const outer = box.getBoundingClientRect(), inner = child.getBoundingClientRect();
  if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top;
  else if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
}
